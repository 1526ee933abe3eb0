"""Spark's shortest job for the same work, the baseline for the streams. It has no rules, quarantine or settings.

    python3 benchmarks/shortest_job.py kafka localhost:9092 sensor_data TABLE CHECKPOINT
    python3 benchmarks/shortest_job.py files FOLDER TABLE CHECKPOINT
    python3 benchmarks/shortest_job.py row TABLE

With --once at the end, it reads everything available and ends. `row` prints one row of a table: the shortest possible
reader.
"""

import sys

from delta import configure_spark_with_delta_pip
from pyspark.sql import SparkSession

SCHEMA = "timestamp TIMESTAMP, device_id STRING, building STRING, floor INT, type STRING, value DOUBLE, unit STRING"
KAFKA_SOURCE = "org.apache.spark:spark-sql-kafka-0-10_2.13:4.2.0"

kind, *arguments = [argument for argument in sys.argv[1:] if argument != "--once"]
builder = SparkSession.builder.config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension").config(
    "spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog"
)
spark = configure_spark_with_delta_pip(builder, [KAFKA_SOURCE] if kind == "kafka" else []).getOrCreate()
spark.sparkContext.setLogLevel("ERROR")
if kind == "row":
    spark.read.format("delta").load(arguments[0]).show(1)
    sys.exit()
if kind == "kafka":
    broker, topic, *arguments = arguments
    readings = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", broker)
        .option("subscribe", topic)
        .option("startingOffsets", "earliest")
        .load()
        .selectExpr(
            f"from_json(CAST(value AS STRING), '{SCHEMA}') AS reading",
            "topic",
            "partition",
            "offset",
            "timestamp AS kafka_timestamp",
            "key AS kafka_key",
            "CAST(value AS STRING) AS raw_json",
        )
        .select("reading.*", "topic", "partition", "offset", "kafka_timestamp", "kafka_key", "raw_json")
    )
else:
    folder, *arguments = arguments
    readings = spark.readStream.schema(SCHEMA).json(folder)
table, checkpoint = arguments
trigger = {"availableNow": True} if "--once" in sys.argv else {"processingTime": "0 seconds"}
(
    readings.writeStream.format("delta")
    .option("checkpointLocation", checkpoint)
    .trigger(**trigger)
    .start(table)
    .awaitTermination()
)
