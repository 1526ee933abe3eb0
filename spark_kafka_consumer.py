"""Kafka topic -> Silver: streams sensor readings from Kafka into a Delta table.

    Kafka topic sensor_data ──> lake/silver/sensor_data
                          └───> lake/silver/sensor_data_quarantine

Each record of the topic is checked against the contract in readings.py (--readings). Valid readings are appended to the
table; all other records go to its quarantine, unchanged and with a reason. Every record ends up in one of the two,
exactly once, even if the script or the machine is killed: the checkpoint holds the offsets read so far, and a repeated
batch is not written twice. The first start reads the topic from its earliest offset, and each later start continues
where the previous run ended. Ctrl+C finishes the running batch first. If Kafka stops answering, the script waits for up
to five minutes. If Kafka has lost unread records, the script names them and stops.

    python3 spark_kafka_consumer.py
    python3 spark_kafka_consumer.py --once
    python3 spark_kafka_consumer.py --bootstrap-servers broker1:9092,broker2:9092 --trigger "30 seconds"
    python3 spark_kafka_consumer.py --kafka-config kafka.properties
"""

import argparse

from pipeline.contract.contract import load_contract
from pipeline.delta.tables import silver_tables
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.stream import streams_of
from pipeline.kafka.topics import Topic, add_topic_options
from pipeline.paths import SILVER
from pipeline.spark.session import build_spark
from pipeline.streaming.query import add_stream_options, parse_stream_options, run_until_stopped
from pipeline.terminal.arguments import argument_parser, at_least
from pipeline.terminal.script import run


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    topic = Topic.of(options)
    topic.wait(options.wait)
    spark = build_spark("kafka-to-silver", verbose=options.verbose)
    source = KafkaSource(topic, options.accept_data_loss, options.group_id or topic.group_of(options.table))
    run_until_stopped(
        spark,
        streams_of(spark, source, options),
        source,
        silver_tables(options.table, contract.columns, options.keep_history, bool(contract.array)),
        contract,
        options,
    )


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_topic_options(parser)
    add_stream_options(parser, SILVER, trigger="2 seconds")
    parser.add_argument(
        "--max-offsets-per-trigger",
        type=at_least(1),
        metavar="N",
        default=2_000_000,
        help="maximum number of records per batch",
    )
    parser.add_argument(
        "--group-id",
        metavar="NAME",
        help="consumer group that the stream commits its offsets to, for Kafka's own tools; it never reads them itself "
        '(default: group.id in --kafka-config, or "pipeline-" plus the table\'s name)',
    )
    parser.add_argument(
        "--accept-data-loss",
        action="store_true",
        help="continue even if Kafka has lost unread records or the topic was recreated; a later loss stops the stream again",
    )
    return parse_stream_options(parser)


if __name__ == "__main__":
    run(main)
