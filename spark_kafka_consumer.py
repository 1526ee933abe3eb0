"""Kafka topic -> Silver: streams sensor readings from Kafka into a Delta table.

    Kafka topic sensor_data ──> lake/silver/sensor_data
                          └───> lake/silver/sensor_data_quarantine

Each record of the topic is checked against the contract in readings.py (--readings). A valid reading is appended to the table,
any other record to the quarantine beside it, unchanged and with the reason. Every record is in one of the two, exactly
once, also when the script or the machine is killed: the checkpoint holds the offsets that were read, and a batch that is
repeated is not written twice. The first start reads the topic from its earliest offset, each later one from where the
last ended. Ctrl+C lets the running batch finish. If Kafka stops answering, it waits five minutes for it; if Kafka
no longer has records that were not read, it stops and says which.

    python3 spark_kafka_consumer.py
    python3 spark_kafka_consumer.py --once
    python3 spark_kafka_consumer.py --bootstrap-servers broker1:9092,broker2:9092 --trigger "30 seconds"
    python3 spark_kafka_consumer.py --kafka-config kafka.properties
"""

import common.process  # isort: skip  # noqa: F401 # first, so that Ctrl+C during the other imports is clean too

import argparse
from collections.abc import Iterator
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from common.console import argument_parser, at_least, run
from common.contract import load_contract
from common.kafka_source import KafkaSource, records_of
from common.process import REPOSITORY
from common.record_lookup import kafka_options
from common.session import build_spark
from common.streams import TO_ITS_END, add_stream_options, run_until_stopped, trigger_of
from common.tables import SILVER, silver_tables
from common.topics import Topic, add_topic_options


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    topic = Topic.of(options)
    topic.wait(options.wait)
    spark = build_spark("kafka-to-silver", verbose=options.verbose)
    source = KafkaSource(topic, options.accept_data_loss, options.group_id or topic.group_of(options.table))
    run_until_stopped(spark, streams_of(spark, source, options), source, silver_tables(options.table, contract.columns), contract,
                      options)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_topic_options(parser)
    add_stream_options(parser, SILVER, str(REPOSITORY / "checkpoints" / "silver_sensor_data"), trigger="2 seconds")
    parser.add_argument("--max-offsets-per-trigger", type=at_least(1), metavar="N", default=2_000_000,
                        help="the most records that one batch takes")
    parser.add_argument("--group-id", metavar="NAME",
                        help="consumer group under which Kafka's own tools show how far the stream is; it never reads that itself "
                             "(default: group.id of --kafka-config, or pipeline- and the table's name)")
    parser.add_argument("--accept-data-loss", action="store_true",
                        help="go on though Kafka has lost records that were not read, or has a new topic of this name; what it "
                             "loses later stops the stream again")
    return parser.parse_args()


def streams_of(spark: SparkSession, source: KafkaSource, options: argparse.Namespace) -> Iterator[tuple[DataFrame, dict[str, Any]]]:
    """The topic as streams, each with its trigger: if data loss is accepted, first one that passes over what is lost by now;
    then the one that the options ask for, which stops where Kafka loses more."""
    if options.accept_data_loss:
        yield read_topic(spark, source, options, fail_on_data_loss=False), TO_ITS_END
        source.accept_data_loss = False
    yield read_topic(spark, source, options), trigger_of(options)


def read_topic(spark: SparkSession, source: KafkaSource, options: argparse.Namespace, fail_on_data_loss: bool = True) -> DataFrame:
    """The topic as a stream of `records_of`; `ingest_time` is the start of its batch."""
    topic = source.topic
    kafka = (
        spark.readStream.format("kafka")
        .option("kafka.max.poll.records", 5000)  # 500, Kafka's default, takes half as long again
        # Whatever a batch is to read is there. Kafka's default waits half a second in each partition for what comes after it.
        .option("kafka.fetch.max.wait.ms", 0)
        .options(**kafka_options(topic))
        .option("subscribe", topic.name)
        .option("startingOffsets", source.starting_offsets)
        .option("maxOffsetsPerTrigger", options.max_offsets_per_trigger)
        .option("failOnDataLoss", fail_on_data_loss)
        # A large batch is cut into many small parts, which TableWriter joins to files of one size for all cores.
        .option("maxRecordsPerPartition", 20_000)
        # What a batch reads is there: two minutes, the default, would only hide that Kafka is away.
        .option("kafkaConsumer.pollTimeoutMs", 60_000)
        # A broker that does not answer is waited for by `run_until_stopped`, which says so.
        .option("fetchOffset.numRetries", 1)
        .load()
    )
    # The checkpoint keeps the time, so a batch that is repeated has the same.
    return records_of(kafka, topic.name, F.current_timestamp())


if __name__ == "__main__":
    run(main)
