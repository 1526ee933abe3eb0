"""The topic as a stream of records."""

import argparse
from collections.abc import Iterator
from typing import Any

from pipeline.kafka.lookup import kafka_options
from pipeline.kafka.records import records_of
from pipeline.kafka.source import PART, KafkaSource
from pipeline.streaming.query import AVAILABLE_NOW, trigger_of

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F


def streams_of(
    spark: SparkSession, source: KafkaSource, options: argparse.Namespace
) -> Iterator[tuple[DataFrame, dict[str, Any]]]:
    """The topic as streams, each with its trigger. If data loss is accepted, the first stream skips the lost records. The
    last one has the trigger of the options, and stops if Kafka loses more.
    """
    if options.accept_data_loss:
        yield read_topic(spark, source, options, fail_on_data_loss=False), AVAILABLE_NOW
        source.accept_data_loss = False
    yield read_topic(spark, source, options), trigger_of(options)


def read_topic(
    spark: SparkSession, source: KafkaSource, options: argparse.Namespace, fail_on_data_loss: bool = True
) -> DataFrame:
    """The topic as a stream of `records_of`; `ingest_time` is the start of the batch."""
    topic = source.topic
    kafka = (
        spark.readStream.format("kafka")
        .option("kafka.max.poll.records", 5000)  # Kafka's default, 500, takes half as long again
        # Everything that a batch is going to read is already there. By default, Kafka would wait half a second in each
        # partition for records after that.
        .option("kafka.fetch.max.wait.ms", 0)
        .options(**kafka_options(topic))
        .option("subscribe", topic.name)
        .option("startingOffsets", source.starting_offsets)
        .option("maxOffsetsPerTrigger", options.max_offsets_per_trigger)
        .option("failOnDataLoss", fail_on_data_loss)
        # A large batch is split into many small parts, which TableWriter joins into files of equal size for all cores.
        .option("maxRecordsPerPartition", PART)
        # A batch reads only records that are already there; two minutes, the default, would only hide that Kafka is down.
        .option("kafkaConsumer.pollTimeoutMs", 60_000)
        # `run_until_stopped` waits for a broker that does not answer, and says so.
        .option("fetchOffset.numRetries", 1)
        .load()
    )
    # The checkpoint stores this time, so a repeated batch has the same one.
    return records_of(kafka, topic.name, F.current_timestamp())
