"""The same work done by a plain Python consumer, Kafka -> Delta, as one would write it without Spark.

    python3 -m benchmarks.python_consumer localhost:9092 sensor_data TABLE COUNT

Checks each record against the rules of readings.py, appends the valid ones to TABLE and the others, with the reason, to
TABLE_quarantine, and stores the batch number in both commits. Prints "N rows" after each batch of at most 200,000
records, and ends after COUNT records. It checks less than the stream does: msgspec does not notice duplicate names in
a record.
"""

import json
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Annotated

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Consumer, Message
from deltalake import CommitProperties, Transaction, write_deltalake

from readings import CONTRACT, SENSOR_TYPES

BATCH = 200_000
AHEAD = timedelta(days=1)
REQUIRED = [field.name for field in CONTRACT.fields if field.required]
MICROSECONDS = pa.timestamp("us", "UTC")
ARROW_TYPES = {
    "TIMESTAMP": MICROSECONDS,
    "STRING": pa.string(),
    "INT": pa.int32(),
    "DOUBLE": pa.float64(),
    "BINARY": pa.binary(),
}


class Reading(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    timestamp: Annotated[datetime, msgspec.Meta(tz=True)]
    device_id: str
    building: str
    type: str
    value: float
    unit: str
    floor: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None


decode = msgspec.json.Decoder(Reading).decode


def consume(check: Callable, broker: str, topic: str, table: str, count: int) -> None:
    """`check`: returns the rows for the table and those for its quarantine, from messages and the current time."""
    consumer = Consumer(
        {
            "bootstrap.servers": broker,
            "group.id": table,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe([topic])
    rows = number = 0
    while rows < count:
        size = min(BATCH, count - rows)
        messages: list[Message] = []
        while len(messages) < size:
            messages += consumer.consume(size - len(messages), timeout=0.5)
        accepted, rejected = check(messages, datetime.now(timezone.utc))
        commit = CommitProperties(app_transactions=[Transaction(table, number)])
        write_deltalake(f"{table}_quarantine", rejected, mode="append", commit_properties=commit)
        write_deltalake(table, accepted, mode="append", commit_properties=commit)
        consumer.commit(asynchronous=False)
        rows, number = rows + size, number + 1
        print(f"{accepted.num_rows + rejected.num_rows} rows", flush=True)
    consumer.close()


def check(messages: list[Message], now: datetime) -> tuple[pa.Table, pa.Table]:
    """Returns the rows for the table and those for its quarantine."""
    raws = [message.value() for message in messages]
    readings, rests, reasons = [], [], []
    for raw in raws:
        rest = reason = None
        try:
            reading = decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            reading, rest, reason = check_closely(raw)
        readings.append(reading)
        rests.append(rest)
        reasons.append(reason)
    columns = {
        field.column: pa.array(
            [reading and getattr(reading, field.name) for reading in readings], ARROW_TYPES[field.type]
        )
        for field in CONTRACT.fields
    }
    columns["ingest_time"] = pa.repeat(pa.scalar(now, MICROSECONDS), len(raws))
    columns |= origin(messages)
    rules = {
        f"missing_{field.name}": blank(columns[field.column]) for field in CONTRACT.fields if field.type == "STRING"
    }
    rules["invalid_timestamp"] = pc.greater(columns["event_time"], pa.scalar(now + AHEAD, MICROSECONDS))
    rules["no_clock"] = pc.less(
        columns["event_time"], pa.scalar(datetime(2001, 1, 1, tzinfo=timezone.utc), MICROSECONDS)
    )
    rules["unknown_type"] = pc.invert(pc.is_in(columns["type"], pa.array(list(SENSOR_TYPES))))
    wrong_unit = out_of_range = pa.repeat(False, len(raws))
    for name, sensor in SENSOR_TYPES.items():
        is_type = pc.equal(columns["type"], name)
        wrong_unit = pc.or_(wrong_unit, pc.and_(is_type, pc.not_equal(columns["unit"], sensor.unit)))
        is_outside = pc.or_(pc.less(columns["value"], sensor.low), pc.greater(columns["value"], sensor.high))
        out_of_range = pc.or_(out_of_range, pc.and_(is_type, is_outside))
    rules |= {"wrong_unit": wrong_unit, "out_of_range": out_of_range}
    reason = pc.coalesce(
        pa.array(reasons, pa.string()), *(pc.if_else(broken, name, None) for name, broken in rules.items())
    )
    raw = pa.array(raws, pa.binary())
    is_accepted = pc.is_null(reason)
    rejected = pa.table({"reject_reason": reason, "raw": raw, "ingest_time": columns["ingest_time"]} | origin(messages))
    accepted = pa.table(columns | {"raw": raw, "_rescued_data": pa.array(rests, pa.string())}).filter(is_accepted)
    text = accepted["raw"].cast(pa.string())
    return accepted.drop(["raw"]).append_column("raw_json", text), rejected.filter(pc.invert(is_accepted))


def check_closely(raw: bytes | None) -> tuple[Reading | None, str | None, str | None]:
    """Checks a record that is not plain. Returns the reading and its unknown fields, or the reason to reject it."""
    if raw is None or not raw.strip():
        return None, None, "empty_record"
    try:
        raw.decode()
    except UnicodeDecodeError:
        return None, None, "invalid_encoding"
    try:
        record = msgspec.json.decode(raw, type=dict)
    except msgspec.MsgspecError:
        return None, None, "malformed_json"
    for name in REQUIRED:
        if record.get(name) is None or isinstance(record[name], str) and not record[name].strip():
            return None, None, f"missing_{name}"
    known = {field.name: record.pop(field.name, None) for field in CONTRACT.fields}
    try:
        return msgspec.convert(known, Reading), json.dumps(record, ensure_ascii=False) if record else None, None
    except msgspec.ValidationError as error:
        return None, None, f"invalid_{str(error).rpartition('$.')[2].rstrip('`')}"


def blank(texts: pa.Array) -> pa.Array:
    return pc.equal(pc.utf8_length(pc.utf8_ltrim_whitespace(texts)), 0)


def origin(messages: list[Message]) -> dict[str, pa.Array]:
    """The origin of the messages, in the columns of Silver."""
    return {
        "topic": pa.repeat(messages[0].topic(), len(messages)),
        "partition": pa.array([message.partition() for message in messages], pa.int32()),
        "offset": pa.array([message.offset() for message in messages], pa.int64()),
        "kafka_timestamp": pa.array([message.timestamp()[1] for message in messages], pa.timestamp("ms", "UTC")).cast(
            MICROSECONDS
        ),
        "kafka_key": pa.array([message.key() for message in messages], pa.binary()),
    }


if __name__ == "__main__":
    consume(check, *sys.argv[1:4], int(sys.argv[4]))
