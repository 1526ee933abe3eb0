"""Creates a Silver table with the given number of rows, and its quarantine, in batches of a million as a stream would.

PYTHONPATH=. python3 benchmarks/make_table.py TABLE ROWS
"""

import sys
import time

from pipeline.delta.tables import silver_tables
from pipeline.spark.session import build_spark
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.source import Source
from pipeline.streaming.start import Start
from pipeline.streaming.writer import TableWriter

from pyspark.sql import functions as F

from readings import CONTRACT

BATCH = 1_000_000

table, rows = sys.argv[1], int(sys.argv[2])
spark = build_spark("make-table")


class Made(Source):
    """Generated records that look as if they came from a topic."""

    mode = "made"


begun = int(time.time() - 10 * rows / BATCH) * 1_000_000  # ten seconds per batch, the last one ending now
writer = TableWriter(
    silver_tables(table, CONTRACT.columns), CONTRACT, Made(), Start(Checkpoint(spark, f"{table}_checkpoint"), {}, {})
)
for number, begin in enumerate(range(0, rows, BATCH)):
    records = spark.range(begin, min(begin + BATCH, rows), numPartitions=4).select(
        F.format_string(
            '{"timestamp": "%s", "device_id": "sensor-%03d", "building": "A", "floor": %d, "type": "co2", "value": %d.5, "unit": "ppm"}',
            F.date_format(
                F.timestamp_micros(begun + F.col("id") * (10_000_000 // BATCH)), "yyyy-MM-dd'T'HH:mm:ss.SSSSSS'Z'"
            ),
            F.col("id") % 997,
            F.col("id") % 6,
            F.col("id") % 9000,
        )
        .cast("binary")
        .alias("raw"),
        F.lit("sensor_data").alias("topic"),
        (F.col("id") % 3).cast("int").alias("partition"),
        F.col("id").alias("offset"),
        F.current_timestamp().alias("kafka_timestamp"),
        F.lit(b"sensor").alias("kafka_key"),
        F.timestamp_micros(F.lit(begun + number * 10_000_000)).alias("ingest_time"),
    )
    writer.write(records.withColumn("raw_json", F.col("raw").cast("string")), number, "made")
