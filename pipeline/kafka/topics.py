"""The Kafka topic as a script sees it: whether it exists, whether it is still the same, and what to do if not."""

import argparse
import os
import re
import time
from functools import cached_property
from typing import Any

from pipeline.kafka.admin import Admin
from pipeline.kafka.brokers import Broker, NoBrokerError, add_broker_options
from pipeline.kafka.properties import read_properties
from pipeline.terminal.arguments import at_least
from pipeline.terminal.errors import PipelineError, first_line, java_class, root_cause
from pipeline.terminal.messages import say
from pipeline.terminal.progress import in_progress
from pipeline.terminal.signals import StopFlag

from kafka import TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import (
    AuthorizationError,
    BrokerResponseError,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    KafkaError,
    NoError,
    PolicyViolationError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.protocol.consumer.offsets import IsolationLevel
from kafka.structs import OffsetAndMetadata

TOPIC = "sensor_data"
# Properties of a table that a stream fills from a topic: the topic, and the consumer group that the stream commits its
# offsets to.
TOPIC_NAME, GROUP = "pipeline.topic.name", "pipeline.topic.group"
PARTITIONS = 3
# The broker rejects records whose Kafka time is more than a day ahead, such as a time in nanoseconds, and records that
# are too large when unpacked: https://kafka.apache.org/39/documentation.html#topicconfigs
CONFIGS = {"message.timestamp.after.max.ms": "86400000", "compression.type": "uncompressed"}
# Seconds that a stream waits for Kafka to commit its offsets. The first time, Kafka has to create a place for them.
COMMIT_OFFSETS_SECONDS = 3
MAX_OUTAGE_SECONDS = 300  # seconds that a running stream waits for its broker to come back


def add_topic_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `add_broker_options`, --topic and --wait."""
    add_broker_options(parser)
    parser.add_argument("--topic", type=topic_name, default=TOPIC, help="Kafka topic")
    parser.add_argument(
        "--wait",
        type=at_least(0, float),
        default=30,
        metavar="SECONDS",
        help="how long to wait for a broker or a topic that is not there yet",
    )


def topic_name(value: str) -> str:
    """The type of an option that takes a topic's name: https://kafka.apache.org/39/documentation.html#topicconfigs"""
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", value) or value in (".", ".."):
        raise argparse.ArgumentTypeError(
            f'{value!r} is not a valid topic name, which has only letters A to Z, digits, ".", "_" and "-", '
            f"at most 249 of them"
        )
    return value


class NoTopicError(PipelineError):
    """The broker answers but has no such topic."""


class Topic(Broker):
    """A topic of a cluster."""

    def __init__(self, servers: str | None, name: str = TOPIC, properties: dict[str, str] | None = None):
        super().__init__(servers, properties)
        self.name = name
        # Records of an aborted transaction count as never sent, and records of an uncommitted one may still be aborted.
        self.isolation_level = self.properties.get("isolation.level", "read_committed")
        if self.isolation_level.upper() not in IsolationLevel.__members__:
            raise PipelineError(
                f"The Kafka property isolation.level is {self.isolation_level}; it must be read_committed or "
                f"read_uncommitted."
            )

    def __str__(self) -> str:
        return f'the topic "{self.name}" on {self.servers}'

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Topic":
        """The topic named by the options of `add_topic_options`; the default topic if there are only those of `add_broker_options`."""
        return cls(
            options.bootstrap_servers,
            getattr(options, "topic", TOPIC),
            read_properties(options.kafka_config) if options.kafka_config else None,
        )

    def group_of(self, table: str) -> str:
        """The consumer group to which a stream into `table` commits its offsets, unless --group-id names another."""
        return self.properties.get("group.id", f"pipeline-{os.path.basename(table.rstrip('/'))}")

    def wait(self, seconds: float, create: int = 0, stopping: StopFlag | None = None) -> None:
        """Returns when the topic exists or `stopping` is set. `create`: partitions for a missing topic, or 0.

        Raises PipelineError if there is no broker or topic within `seconds`.
        """
        deadline = time.monotonic() + seconds
        with in_progress() as note:
            while not (stopping and stopping.is_set()):
                try:
                    return self._require(create)
                except (NoBrokerError, NoTopicError) as problem:
                    if time.monotonic() >= deadline:
                        raise
                    note(f"{problem} Waiting up to {seconds:g} s for it …")
                (stopping.wait if stopping else time.sleep)(0.5)

    def _require(self, create: int) -> None:
        """Raises NoBrokerError or NoTopicError if either is missing. `create`: see `wait`."""
        with self.asking() as admin:
            if self.name in admin.list_topics():
                [topic] = admin.describe_topics([self.name])
                if any(partition["leader_id"] < 0 for partition in topic["partitions"]):
                    raise NoBrokerError(f"The broker of some partitions of {self} is down.")
                # Asks each leader itself: the cluster may not know yet that one is down, or can't be reached from here.
                partitions = [
                    TopicPartition(self.name, partition["partition_index"]) for partition in topic["partitions"]
                ]
                admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
            elif create:
                self._create(admin, create)
            else:
                create_it = (
                    f"kafka-python admin -b {self.servers} topics create -t {self.name} --num-partitions {PARTITIONS} "
                    f"--replication-factor 1"
                )
                if "security.protocol" in self.properties:  # for which that command has no options
                    create_it = (
                        f"python3 kafka_producer.py --bootstrap-servers {self.servers} --topic {self.name} --create-topic "
                        f"--count 0, with the same --kafka-config"
                    )
                raise NoTopicError(
                    f'No topic "{self.name}" on {self.servers}, or none that this user may see. Create it: {create_it}.'
                )

    def _create(self, admin: Admin, partitions: int) -> None:
        topic = {"num_partitions": partitions, "replication_factor": -1}  # -1 stands for the brokers' default
        try:
            try:
                admin.create_topics({self.name: topic | {"configs": CONFIGS}}, wait_for_metadata=True)
            except (InvalidConfigurationError, PolicyViolationError):
                # Brokers before 3.6 don't know message.timestamp.after.max.ms, and others may not allow it.
                admin.create_topics({self.name: topic | {"configs": {}}}, wait_for_metadata=True)
        except TopicAlreadyExistsError:
            raise NoTopicError(f'The topic "{self.name}" on {self.servers} is being created or deleted.') from None
        except BrokerResponseError as error:
            # A broker that has just started does not know of any broker that could hold a replica.
            if error.retriable or isinstance(error, (AuthorizationError, InvalidReplicationFactorError)):
                raise
            raise PipelineError(
                f"Kafka refuses to create {self} ({type(error).__name__}). Choose another --topic, or ask somebody who "
                f"may create topics."
            ) from error
        say(f'Created the topic "{self.name}" with {partitions} partition{"s" * (partitions > 1)}.')

    @cached_property
    def _admin(self) -> Admin:
        return self.client(Admin)

    def id(self) -> str:
        """Kafka's id of the topic, which changes when it is deleted and recreated; "" if there is no topic."""
        [topic] = self._admin.describe_topics([self.name])
        return str(topic["topic_id"] or "")

    def lost(self, unread: dict[int, int]) -> str:
        """The offsets that the topic has lost since `unread` (partition: next offset), as text; "" if none."""
        first, end = self.beginning(), self.end()
        unread = dict.fromkeys(first, 0) | unread  # new partitions are read from their beginning
        return ", ".join(
            f"partition {partition} offsets {next_offset} to {first[partition] - 1}"
            if partition in end
            else f"partition {partition} from offset {next_offset} on"
            for partition, next_offset in sorted(unread.items())
            if partition not in end or first[partition] > next_offset
        )

    def beginning(self) -> dict[int, int]:
        """The first offset of each partition."""
        return self._offsets(OffsetSpec.EARLIEST)

    def end(self) -> dict[int, int]:
        """The offset after the last record of each partition."""
        return self._offsets(OffsetSpec.LATEST)

    def read_too_far(self, unread: dict[int, int]) -> str:
        """Where `unread` is beyond the start of a transaction that is still open, as text; "" if nowhere."""
        end = self.end()
        settled = self._offsets(OffsetSpec.LATEST, isolation_level=IsolationLevel[self.isolation_level.upper()])
        return ", ".join(
            f"partition {partition} from offset {settled[partition]} on"
            for partition, next_offset in sorted(unread.items())
            if partition in end and settled[partition] < next_offset <= end[partition]
        )

    def _offsets(self, spec: OffsetSpec, **options: Any) -> dict[int, int]:
        """The first or last offset of each partition."""
        [topic] = self._admin.describe_topics([self.name])
        if topic["error_code"]:  # a topic that the broker does not know yet would look empty
            raise for_code(topic["error_code"])()
        places = {TopicPartition(self.name, partition["partition_index"]): spec for partition in topic["partitions"]}
        return {
            place.partition: found.offset
            for place, found in self._admin.list_partition_offsets(places, **options).items()
        }

    def messages(self, partition: int, offset: int) -> bytes:
        """Raw record batches, beginning with the batch that contains `offset` (see `Admin.messages`)."""
        [topic] = self._admin.describe_topics([self.name])
        leaders = {each["partition_index"]: each["leader_id"] for each in topic["partitions"]}
        if partition not in leaders:
            raise UnknownTopicOrPartitionError(f"{self.name}, partition {partition}")
        return self._admin.messages(leaders[partition], self.name, partition, offset)

    @cached_property
    def _notes(self) -> Admin:
        """A client of its own, because the stream uses the other one at the same time."""
        return self.client(
            Admin, request_timeout_ms=COMMIT_OFFSETS_SECONDS * 1000, bootstrap_timeout_ms=COMMIT_OFFSETS_SECONDS * 1000
        )

    def commit_offsets(self, group: str, offsets: dict[int, int]) -> None:
        """Commits these offsets (partition: next offset) to Kafka for the consumer group `group`. Raises KafkaError."""
        places = {
            TopicPartition(self.name, partition): OffsetAndMetadata(offset, "", -1)
            for partition, offset in offsets.items()
        }
        deadline = time.monotonic() + COMMIT_OFFSETS_SECONDS
        while True:
            try:
                for error in set(self._notes.alter_group_offsets(group, places).values()) - {NoError}:
                    raise error()
                return
            except KafkaError as error:
                self._forget("_notes")  # it would keep sending the group's requests to a broker that no longer answers
                if not error.retriable or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def close(self) -> None:
        """Closes the clients; the next request creates new ones."""
        self._forget("_admin", "_notes")

    def _forget(self, *clients: str) -> None:
        for name in clients:
            if client := self.__dict__.pop(name, None):
                client.close()

    def unread(self, group: str) -> int | None:
        """The number of records after the offsets that the consumer group has committed for the topic; None if it has committed
        none.

        Raises KafkaError, or OSError if no broker listens.
        """
        self.require_listener()
        with self.client(Admin, bootstrap_timeout_ms=1000) as admin:
            of_group = admin.list_group_offsets([group])[group]
            noted = {place: note for place, note in of_group.items() if place.topic == self.name}
            ends = admin.list_partition_offsets(dict.fromkeys(noted, OffsetSpec.LATEST))
        return sum(max(0, ends[place].offset - note.offset) for place, note in noted.items()) if noted else None

    def require_access(self, error: Exception) -> None:
        """Raises PipelineError if the brokers have denied this client access, according to `error`."""
        message = f"{java_class(error) or type(error).__name__}: {root_cause(error)}"
        if re.search(r"(Authenticat|Authoriz|S[sS][lL])\w*(Exception|Error)", message):
            raise self.refused(first_line(root_cause(error))) from error

    def wait_until_available(self, error: Exception, stopping: StopFlag) -> None:
        """Returns when the topic can be read again after the `error` of a stream, or when `stopping` is set.

        Raises PipelineError if Kafka stays down or waiting is pointless, and `error` itself if it is not about Kafka.
        """
        self.require_access(error)
        message = f"{java_class(error) or type(error).__name__}: {root_cause(error)}"
        has_no_topic = re.search(
            r"UNKNOWN_TOPIC|UnknownTopic|does not host this topic|metadata for topic .* could not be found", message
        )
        is_away = (
            r"kafka\.\S*(Timeout|Disconnect|Network|NotAvailable|NotLeader)\w*Exception|"
            r"java\.util\.concurrent\.TimeoutException|No resolvable bootstrap urls"
        )
        if not (has_no_topic or isinstance(error, KafkaError) or re.search(is_away, message)):
            raise error
        if not has_no_topic:
            say(f"Kafka on {self.servers} no longer answers.")
        try:
            # For a moment after its start, a broker has no topics.
            self.wait(10 if has_no_topic else MAX_OUTAGE_SECONDS, stopping=stopping)
        except NoTopicError:
            raise PipelineError(
                f"{self} is gone, including any unread records, or this user may no longer see it. To continue with a "
                f"new topic, create it and start with --accept-data-loss.".replace("the", "The", 1)
            ) from error
        except NoBrokerError:
            if not has_no_topic:
                raise
            self.wait(MAX_OUTAGE_SECONDS, stopping=stopping)
        self.close()  # the clients do not recover from a long outage
