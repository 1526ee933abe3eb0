"""Reading a sample: a file, or the newest messages of a topic."""

import json
import time

from pipeline.files.reading import read_lines, read_values
from pipeline.kafka.lookup import kafka_options
from pipeline.kafka.records import records_of
from pipeline.kafka.topics import Topic
from pipeline.spark.file_system import FileSystem
from pipeline.terminal.errors import PipelineError

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F


def of_file(spark: SparkSession, path: str, multiline: bool) -> DataFrame:
    """The records of a file, read as streaming_files_to_delta_bronze.py reads it."""
    files = FileSystem(spark, path)
    if files.is_folder(path) or files.size(path) is None:
        raise PipelineError(f"There is no file {path}. Name a file with some records.")
    file = Row(path=files.qualified(path), length=files.size(path), modified=0, arrival=time.time_ns() // 1000)
    read = read_values if multiline else read_lines
    return read(spark, [file], {}, max_unpacked=1_000_000_000, careful=True)


def of_topic(spark: SparkSession, topic: Topic, newest: int) -> DataFrame:
    """The newest messages of a topic."""
    first, end = topic.beginning(), topic.end()
    begin = {partition: max(first[partition], offset - newest) for partition, offset in end.items()}
    messages = (
        spark.read.format("kafka")
        .options(**kafka_options(topic))
        .option("subscribe", topic.name)
        .option("startingOffsets", json.dumps({topic.name: begin}))
        .option("endingOffsets", json.dumps({topic.name: end}))
        .load()
    )
    return records_of(messages.orderBy(F.desc("timestamp")).limit(newest), topic.name, F.current_timestamp())
