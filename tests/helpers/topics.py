"""Topics on a real broker, and the tables written from them."""

import argparse
import time
import uuid
from pathlib import Path

from pipeline.delta.tables import silver_tables
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.stream import streams_of
from pipeline.kafka.topics import Topic
from pipeline.paths import quarantine_of
from pipeline.streaming.writer import TableWriter

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import TopicAlreadyExistsError

from helpers.streams import run_streams
from readings import CONTRACT


def tables(spark, options: list) -> tuple:
    """The table and the quarantine named by the options of a stream."""
    table = str(options[options.index("--table") + 1])
    return tuple(spark.read.format("delta").load(path) for path in (table, f"{table}_quarantine"))


def topic_offsets(broker: str, topic: str, end: bool = True) -> dict[int, int]:
    """The end offset of each partition, or its beginning offset."""
    with KafkaConsumer(bootstrap_servers=broker) as consumer:
        places = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
        offsets = consumer.end_offsets(places) if end else consumer.beginning_offsets(places)
        return {place.partition: offset for place, offset in offsets.items()}


def origins(spark, broker: str, options: list) -> tuple[list, list, list]:
    """(topic, partition, offset) of each record in the topic, in the table and in the quarantine."""
    topic = options[options.index("--topic") + 1]
    first, end = (topic_offsets(broker, topic, end) for end in (False, True))
    sent = [(topic, partition, offset) for partition in end for offset in range(first[partition], end[partition])]
    return sent, *(
        [tuple(row) for row in table.select("topic", "partition", "offset").collect()]
        for table in tables(spark, options)
    )


class Transactions:
    """Java's transactional producer, with its first transaction begun. kafka-python's (3.0.12) waits for a commit without a
    time limit.
    """

    def __init__(self, java, broker: str):
        settings = java.java.util.HashMap()
        settings.put("bootstrap.servers", broker)
        settings.put("transactional.id", uuid.uuid4().hex)
        serializer = java.org.apache.kafka.common.serialization.ByteArraySerializer()
        kafka = java.org.apache.kafka.clients.producer
        self.record, self.producer = kafka.ProducerRecord, kafka.KafkaProducer(settings, serializer, serializer)
        self.producer.initTransactions()
        self.begin()

    def __enter__(self) -> "Transactions":
        return self

    def __exit__(self, *_: object) -> None:
        self.producer.close()

    def begin(self) -> None:
        self.producer.beginTransaction()

    def send(self, topic: str, value: bytes, partition: int = 0, timestamp_ms: int | None = None) -> None:
        """Returns when the record is in the topic, where nobody else may see it yet."""
        self.producer.send(self.record(topic, partition, timestamp_ms, None, value)).get()

    def commit(self) -> None:
        self.producer.commitTransaction()

    def abort(self) -> None:
        self.producer.abortTransaction()


class World:
    """A topic with a table, and the contents of both. The stream runs in the tests' session."""

    def __init__(self, spark, topic: Topic, table: Path, checkpoint: Path):
        self.spark, self.topic, self.broker = spark, topic, topic.servers
        self.options = argparse.Namespace(
            table=str(table), checkpoint=str(checkpoint), once=True, max_offsets_per_trigger=100
        )

    def make(self, partitions: int = 1, **configs: str) -> None:
        with KafkaAdminClient(bootstrap_servers=self.broker) as admin:
            admin.create_topics(
                {
                    self.topic.name: {
                        "num_partitions": partitions,
                        "replication_factor": 1,
                        "configs": {name.replace("_", "."): value for name, value in configs.items()},
                    }
                },
                wait_for_metadata=True,
            )

    def send(self, *records: bytes | None, partition: int = 0, key: bytes | None = None, **settings) -> None:
        with KafkaProducer(bootstrap_servers=self.broker, **settings) as producer:
            for record in records:
                producer.send(self.topic.name, record, key=key, partition=partition)

    def transaction(self) -> "Transactions":
        """A producer that has begun a transaction."""
        return Transactions(self.spark._jvm, self.broker)

    def consume(self, writer_type: type = TableWriter, accept_data_loss: bool = False) -> tuple[int, int]:
        """Runs the stream on everything available, like a new start of the script.

        Returns how many rows each table gained.
        """
        before = self.rows()
        self.options.accept_data_loss = accept_data_loss
        source = KafkaSource(self.topic, accept_data_loss, group=self.topic.name)
        run_streams(
            self.spark,
            streams_of(self.spark, source, self.options),
            source,
            silver_tables(self.options.table, CONTRACT.columns),
            self.options,
            writer_type,
        )
        accepted, rejected = (len(now) - len(then) for now, then in zip(self.rows(), before))
        return accepted, rejected

    def rows(self) -> tuple[list, list]:
        """(partition, offset) of each row, for both tables."""
        paths = (self.options.table, quarantine_of(self.options.table))
        return tuple(
            [tuple(row) for row in self.spark.read.format("delta").load(path).select("partition", "offset").collect()]
            if Path(path, "_delta_log").exists()
            else []
            for path in paths
        )

    def kept(self) -> list[tuple[int, int]]:
        """(partition, offset) of each record that a plain consumer finds in the topic."""
        with KafkaConsumer(
            self.topic.name,
            bootstrap_servers=self.broker,
            auto_offset_reset="earliest",
            isolation_level=self.topic.isolation_level,
            consumer_timeout_ms=2000,
        ) as consumer:
            return [(message.partition, message.offset) for message in consumer]

    def check(self, account, what: str) -> None:
        """Checks the tables against the records in the topic."""
        account(what, self.kept(), *self.rows())


def world_of(spark, options: list) -> World:
    """The World of a stream whose script has these options (see `silver`)."""
    _, broker, _, topic, _, table, _, checkpoint = options
    world = World(spark, Topic(broker, topic), table, checkpoint)
    world.options.max_offsets_per_trigger = 100_000
    return world


def make_topic(admin, topic: str, partitions: int = 1) -> None:
    while topic not in admin.list_topics():
        try:
            admin.create_topics(
                {topic: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True
            )
        except TopicAlreadyExistsError:  # the old one is still being deleted
            time.sleep(0.2)
