"""A plain Python consumer, Kafka -> Delta: the columns of Silver without rules, quarantine or exactly-once.

    python3 benchmarks/plain_consumer.py localhost:9092 sensor_data TABLE COUNT

It prints "N rows" after each batch, of 100,000 at most, and ends after COUNT.
"""

import io
import sys
import time
from datetime import datetime, timezone

import pyarrow as pa
from confluent_kafka import Consumer
from deltalake import write_deltalake
from pyarrow import json

BATCH = 100_000
MICROSECONDS = pa.timestamp("us", "UTC")
READING = pa.schema([("timestamp", MICROSECONDS), ("device_id", pa.string()), ("building", pa.string()),
                     ("floor", pa.int32()), ("type", pa.string()), ("value", pa.float64()), ("unit", pa.string())])

broker, topic, table, count = *sys.argv[1:4], int(sys.argv[4])
consumer = Consumer({"bootstrap.servers": broker, "group.id": f"plain-{time.time()}", "auto.offset.reset": "earliest",
                     "enable.auto.commit": False})
consumer.subscribe([topic])
rows = 0
while rows < count:
    messages = []
    while len(messages) < min(BATCH, count - rows):
        messages += consumer.consume(min(BATCH, count - rows) - len(messages), timeout=0.5)
    values = [message.value() for message in messages]
    readings = json.read_json(io.BytesIO(b"\n".join(values)), json.ReadOptions(block_size=8_000_000),
                              json.ParseOptions(explicit_schema=READING))
    columns = {
        "ingest_time": pa.array([datetime.now(timezone.utc)] * len(messages), MICROSECONDS),
        "topic": pa.array([topic] * len(messages)),
        "partition": pa.array([message.partition() for message in messages], pa.int32()),
        "offset": pa.array([message.offset() for message in messages], pa.int64()),
        "kafka_timestamp": pa.array([message.timestamp()[1] for message in messages],
                                    pa.timestamp("ms", "UTC")).cast(MICROSECONDS),
        "kafka_key": pa.array([message.key() for message in messages], pa.binary()),
        "raw_json": pa.array(values, pa.binary()).cast(pa.string()),
    }
    for name, column in columns.items():
        readings = readings.append_column(name, column)
    write_deltalake(table, readings.rename_columns({"timestamp": "event_time"}), mode="append")
    rows += len(messages)
    print(f"{len(messages)} rows", flush=True)
consumer.close()
