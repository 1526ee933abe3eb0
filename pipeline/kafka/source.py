"""The topic as the source of a stream: lost records, the backlog, and outages of Kafka."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.contract.contract import INCONSISTENT, MAX_RECORD_BYTES, OVERSIZED
from pipeline.delta.tables import TablePair
from pipeline.kafka.last_records import LastRecords
from pipeline.kafka.lookup import Gap, RecordLookup, is_too_large
from pipeline.kafka.private import kafka_offsets
from pipeline.kafka.records import GREGORIAN_START_MS, MAX_TIMESTAMP_MS, is_oversized, records_of
from pipeline.kafka.topics import GROUP, TOPIC_NAME, Topic
from pipeline.spark.private import SPARK_ERRORS
from pipeline.streaming.batches import done_in
from pipeline.streaming.private import batch_time_ms, query_of
from pipeline.streaming.source import Backlog, Source, SourceAwayError
from pipeline.terminal.errors import PipelineError, first_line, java_class, root_cause
from pipeline.terminal.messages import say, warn
from pipeline.terminal.signals import StopFlag, Stopped

from kafka.errors import KafkaError, NotLeaderForPartitionError
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

GOES_ON = "the stream continues with the remaining records"
PART = 20_000  # messages of a batch that a task reads at a time
EARLIEST = -2  # Spark's number for the earliest offset
ELECTION_SECONDS = 3  # seconds after an election until all replicas agree on the end of a partition
TOPIC_ID = "pipeline.topic.id"  # a property of a table: the topic that it is written from


class KafkaSource(Source):
    """The topic as the source of a stream (streaming/source.py).

    `accept_data_loss`: skips records already lost. `group`: the consumer group to commit offsets to.
    """

    knows_records = has_keys = True

    def __init__(self, topic: Topic, accept_data_loss: bool, group: str):
        self.topic, self.accept_data_loss, self.group = topic, accept_data_loss, group
        self.notes = {GROUP: group}
        self.mode = f"isolation.level={topic.isolation_level}"
        self.beginning: dict[int, int] = {}  # of the topic at startup, by partition, if data loss is accepted
        self.starting_offsets = "earliest"  # for a stream without a checkpoint, in Spark's format
        self.has_started = False
        self.begins: dict[int, int] = {}  # of the batch being written, by partition, where known
        self.ends: dict[int, int] = {}
        self.lookup = RecordLookup(topic)
        self.last = LastRecords(self.lookup)
        self.has_failed = False  # because of lost records, and was restarted
        self.has_warned = False  # that it can't commit offsets to Kafka

    def __str__(self) -> str:
        return str(self.topic)

    def read_batch(self, batch: DataFrame) -> DataFrame:
        """Also ends a stream that skips lost records as soon as it is past them. The stream after it stops if more is lost."""
        if self.accept_data_loss and (done := done_in(query_of(batch))):
            end = self._offsets(done[-1], "endOffset")
            if all(end.get(partition, -1) >= offset for partition, offset in self.beginning.items()):
                raise Stopped
        self.lookup.forget_fetched_records(batch.sparkSession)
        return batch

    def is_small(self, records: DataFrame) -> bool:
        messages = sum(end - self.begins.get(partition, 0) for partition, end in self.ends.items())
        return messages <= PART and super().is_small(records)

    def contents(self, batch: DataFrame, end: dict[str, Any]) -> dict[str, Any]:
        if end and self.topic.name not in end:
            raise PipelineError(
                f"The checkpoint has begun a batch of the topic {', '.join(end)}. Give the topic {self.topic.name} its "
                f"own --table and --checkpoint."
            )
        if self.ends != (ends := self._by_partition(end)):  # otherwise a second attempt at the same batch
            self.begins, self.ends = self.ends, ends
        if any(self.ends.get(partition, -1) < offset for partition, offset in self.begins.items()):
            # Without failOnDataLoss, Spark would silently go back.
            raise SourceAwayError(
                f"Kafka has reported outdated offsets for {self.topic}."
            ) from NotLeaderForPartitionError()
        return end

    def last_records(self, is_record: Column) -> Column | None:
        return self.last.observed(self.ends, is_record) if self.ends else None

    def remember(self, spark: SparkSession, last_records: str | None) -> str | None:
        with self._asking():
            return self.last.add(spark, last_records, self.begins, self.ends)

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        warn(
            f"A batch of {self.topic} was read twice, with different results: a rule gives different results for "
            "the same record, or Kafka has different records than before. Those that the tables lack are in the "
            f"quarantine, the valid ones as {INCONSISTENT}."
        )
        row, record = written.alias("row"), judged.alias("record")
        # A record that was rejected as a whole has no elements in the tables. One that is now rejected as a whole may have some, and
        # others that are nowhere yet.
        is_element = (
            " AND (row.element IS NULL OR row.element <=> record.element)" if "element" in written.columns else ""
        )
        # For a record that is not read (`Gap`), Kafka's time is unknown.
        is_written = F.expr(
            "row.partition = record.partition AND row.offset = record.offset AND (row.kafka_timestamp <=> record.kafka_timestamp "
            f"OR row.kafka_timestamp IS NULL AND row.reject_reason = '{OVERSIZED}' "
            f"OR record.kafka_timestamp IS NULL AND record.reject_reason = '{OVERSIZED}'){is_element}"
        )
        return record.join(row, is_written, "left_anti").withColumn(
            "reject_reason", F.coalesce("reject_reason", F.lit(INCONSISTENT))
        )

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        """Reads a batch that Spark's reader can't: records with arbitrary times set by their producers, and records that do not fit
        in memory, which are skipped and named.
        """
        if not (has_large := is_too_large(error)) and java_class(error) != "java.lang.ArithmeticException":
            raise error
        spark, offsets = batch.sparkSession, kafka_offsets(batch)
        is_time = F.col("timestamp").between(GREGORIAN_START_MS, MAX_TIMESTAMP_MS)

        def unusual(records: DataFrame) -> list[Row]:
            records = records.withColumn("is_oversized", is_oversized(records)).where(~is_time | F.col("is_oversized"))
            figures = F.count("*").alias("records"), F.min(F.struct("offset", "timestamp")).alias("first")
            return records.groupBy("partition", "is_oversized").agg(*figures).sort("partition").collect()

        with self._asking():
            found, gaps = self.lookup.ask(spark, offsets, unusual, has_failed=has_large), self.lookup.gaps(offsets)
        self._name_unusual(found, gaps)
        records = self.lookup.records(spark, offsets, fail_on_data_loss=not self.accept_data_loss)
        records = records.withColumn("timestamp", F.when(is_time, F.timestamp_millis("timestamp")))
        if gaps:
            # At most 100,000 offsets in each row, because a sequence is an array in memory.
            rows = [
                (gap.partition, begin, min(begin + 100_000, gap.end))
                for gap in gaps
                for begin in range(gap.begin, gap.end, 100_000)
            ]
            missing = spark.createDataFrame(rows, "partition INT, begin BIGINT, end BIGINT").selectExpr(
                "partition",
                "explode(sequence(begin, end - 1)) AS offset",
                f"{MAX_RECORD_BYTES + 1} AS serializedValueSize",
            )
            records = records.unionByName(missing, allowMissingColumns=True)
        return records_of(records, self.topic.name, F.timestamp_millis(F.lit(batch_time_ms(batch))))

    def _name_unusual(self, found: list[Row], gaps: list[Gap]) -> None:
        strange = [
            f"{row.records:,} in partition {row.partition}, the first at offset {row.first.offset} ({row.first.timestamp})"
            for row in found
            if not row.is_oversized
        ]
        if strange:
            warn(
                f"Producers of {self.topic} set record timestamps that are not milliseconds since 1970: "
                f"{', '.join(strange)}. The records are read like any others, but their kafka_timestamp is null."
            )
        oversized = [
            f"{row.records:,} in partition {row.partition}, the first at offset {row.first.offset}"
            for row in found
            if row.is_oversized
        ]
        oversized += [f"partition {gap.partition} offsets {gap.begin} to {gap.end - 1}" for gap in gaps]
        if oversized:
            warn(
                f"Some records of {self.topic} unpack to more than {MAX_RECORD_BYTES:,} bytes, or are packed "
                f"together with one that does: {', '.join(oversized)}. They are in the quarantine as {OVERSIZED}, "
                "without their content."
            )

    def identity(self) -> dict[str, str]:
        with self._asking():
            topic_id = self.topic.id()
        return {TOPIC_ID: topic_id, TOPIC_NAME: self.topic.name} if topic_id else {}  # brokers before 2.8 have no ids

    def require_same_source(
        self, identity: dict[str, str], written_from: dict[str, str], unread: dict[str, Any]
    ) -> bool:
        is_other_topic = self.topic.name not in (unread or [written_from.get(TOPIC_NAME, self.topic.name)])
        if written_from.get(TOPIC_ID) in (None, identity.get(TOPIC_ID)) or not identity or is_other_topic:
            return False
        start = unread.get(self.topic.name) or "its beginning"
        self._lose(
            f"{self.topic} has been deleted and recreated since the table was written: the unread records of the old topic, from "
            f"{start} on (partition: offset), are gone.",
            "the new topic is read from its beginning",
            is_accepted=not self.has_started,
        )
        return True

    def require_unread_records(
        self,
        spark: SparkSession,
        tables: TablePair,
        unread: dict[str, Any],
        planned: dict[str, Any],
        checkpoint: str,
        last_records: str | None,
    ) -> str | None:
        self.last.restore(last_records)
        self.ends = next_offsets = self._by_partition(unread)  # where the next batch begins
        if self.accept_data_loss:
            with self._asking():
                self.beginning = self.topic.beginning()
        if unread and self.topic.name not in unread:
            raise PipelineError(
                f"The checkpoint {checkpoint} belongs to the topic {', '.join(unread)}. Give the topic "
                f"{self.topic.name} a --table and a --checkpoint of its own."
            )
        with self._asking():
            end = self._end_at_least(self._by_partition(planned or unread))
            shorter = ", ".join(
                f"partition {partition} offsets {end[partition]} to {offset - 1}"
                for partition, offset in sorted(self._by_partition(planned).items())
                if next_offsets.get(partition, 0) <= end.get(partition, offset) < offset
            )
            lost, too_far = self.topic.lost(next_offsets) if unread else "", self.topic.read_too_far(next_offsets)
        if lost:
            self._lose(
                f"Kafka no longer has unread records of {self.topic}: {lost}. Perhaps its retention has removed them.",
                GOES_ON,
            )
        if too_far:  # checked first, because records of an open transaction can't be read for the comparison
            raise PipelineError(
                f"More of {self.topic} was read than has been committed: a transaction is still open in {too_far}. Start "
                f"again when it has ended, or continue with isolation.level=read_uncommitted in --kafka-config."
            )
        places = self._replaced(spark, tables, next_offsets) if unread else {}
        if shorter:
            self._lose(
                f"Kafka lost records of {self.topic} that were about to be read: {shorter}.",
                GOES_ON,
                is_accepted=not self.has_started,
            )
            places = places or next_offsets
        if not places and not shorter:
            return None
        self.ends = places  # where the new checkpoint begins
        return json.dumps({self.topic.name: places})

    def _end_at_least(self, offsets: dict[int, int]) -> dict[int, int]:
        """The end of each partition. Waits if it is before these offsets, because a new leader may report a stale end for a moment."""
        deadline = time.monotonic() + ELECTION_SECONDS
        while True:
            end = self.topic.end()
            if (
                all(end.get(partition, offset) >= offset for partition, offset in offsets.items())
                or time.monotonic() > deadline
            ):
                return end
            time.sleep(0.5)

    def require_unchanged(self, spark: SparkSession, identity: dict[str, str]) -> None:
        """Compares the topic, and the last record of each partition read before this batch, with those that Kafka has now."""
        # An empty identity (deleted, or no permission to ask) does not count as a different one.
        if (now := self.identity()) and identity and now != identity:
            raise PipelineError(
                f"While it was being read, somebody deleted and recreated {self}. Start again: the next start names the "
                "lost records, and removes those of the new topic from the tables."
            )
        with self._asking():
            others = [f"partition {partition} offset {offset}" for partition, offset in self.last.replaced(spark)]
        if others:
            raise PipelineError(
                f"While the stream was running, Kafka lost records of {self.topic} that were already read, and now has "
                f"others in their place: {', '.join(others)}. Start again to see which records are lost."
            )

    def begin_at(self, place: str) -> None:
        self.has_started, self.starting_offsets = True, "earliest"
        if place:
            with self._asking():
                added = dict.fromkeys(self.topic.beginning(), EARLIEST)
            self.starting_offsets = json.dumps({self.topic.name: added | self._by_partition(json.loads(place))})

    def _replaced(self, spark: SparkSession, tables: TablePair, next_offsets: dict[int, int]) -> dict[int, int]:
        """Returns where to continue in each partition if some have lost records that were read, and may have others in their place;
        {} if none has.

        Raises PipelineError if the loss is not accepted.
        """
        with self._asking():
            first, end = self.topic.beginning(), self.topic.end()
            others = self.last.partitions_replaced(spark, first, end, next_offsets)
        others |= {partition for partition, offset in next_offsets.items() if end.get(partition, offset) < offset}
        if not others:
            return {}
        with self._asking():
            places = {
                partition: self.last.common_end(
                    spark, tables, partition, first[partition], min(end[partition], next_offsets[partition])
                )
                for partition in sorted(others & next_offsets.keys())
            }
        lost = ", ".join(
            f"partition {partition} offsets {place} to {next_offsets[partition] - 1}"
            for partition, place in places.items()
        )
        self._lose(
            f"Kafka has lost records of {self.topic} that were already read, and has, or will have, others in their place: "
            f"{lost}. Perhaps an older copy of its data was restored.",
            "the new records are read, too",
            is_accepted=not self.has_started,
        )
        self.last.forget(places.keys())
        return {
            partition: max(offset, next_offsets.get(partition, offset)) for partition, offset in first.items()
        } | places

    def take_back(self, spark: SparkSession, tables: TablePair, begin: dict[str, Any], end: dict[str, Any]) -> None:
        """Compares offset, time and value. Records that Kafka no longer has are kept."""
        begins, ends = self._by_partition(begin), self._by_partition(end)
        with self._asking():
            first, last = self.topic.beginning(), self.topic.end()
        ranges = {
            partition: (max(begins.get(partition, 0), first[partition]), min(offset, last[partition]))
            for partition, offset in ends.items()
            if partition in last
        }
        self.last.delete_from(spark, tables, ranges)

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Names the records that Kafka removes while the stream skips lost ones."""
        if not self.accept_data_loss:
            return
        with self._asking():
            first = self.topic.beginning()
        ranges = {
            partition: (
                max(self.beginning.get(partition, 0), self.begins.get(partition, 0)),
                min(offset, self.ends.get(partition, 0)),
            )
            for partition, offset in sorted(first.items())
        }
        if gone := ", ".join(
            f"partition {partition} offsets {begin} to {end - 1}"
            for partition, (begin, end) in ranges.items()
            if begin < end
        ):
            say(
                f"Kafka removed more records of {self.topic} while the stream caught up: {gone}. Those it had not read yet are lost."
            )
        self.beginning = first

    def wait_until_available(self, error: Exception, stopping: StopFlag) -> None:
        problem = root_cause(error)
        # The next start names the lost records.
        if re.search("may have been lost|is out of range for partition|Offsets out of range", problem):
            if self.has_failed:  # and the restart found nothing
                self._lose(
                    f"Kafka no longer has unread records of {self.topic} ({first_line(problem)}).",
                    GOES_ON,
                )
            self.has_failed = True
            return
        self.topic.wait_until_available(error.__cause__ if isinstance(error.__cause__, KafkaError) else error, stopping)

    def report(self, progress: dict[str, Any], rows: int) -> Backlog | None:
        """Commits the batch's offsets to Kafka."""
        self.has_failed = False
        end, latest = (self._offsets(progress, which) for which in ("endOffset", "latestOffset"))
        try:
            self.topic.commit_offsets(self.group, end)
        except Exception as error:  # no error here is a reason to stop
            if not self.has_warned:
                warn(
                    f"Kafka does not accept the stream's offsets ({type(error).__name__}), so its tools can't show the lag of the "
                    f"group {self.group}. The stream continues without this. It needs permission to read that "
                    "group, which must have no other member; --group-id names another group."
                )
            self.has_warned = True
        lag = {partition: max(0, offset - end.get(partition, offset)) for partition, offset in latest.items()}
        begin = self._offsets(progress, "startOffset")
        read = (
            sum(end[partition] - offset for partition, offset in begin.items() if partition in end) if begin else rows
        )
        return Backlog(sum(lag.values()), "messages behind", read, lag) if lag else None

    def _offsets(self, progress: dict[str, Any], which: str) -> dict[int, int]:
        """The offsets by partition that Spark reports for a batch under this name; {} if there are none."""
        [kafka] = progress["sources"]
        return self._by_partition(json.loads(kafka[which] or "null") or {})

    def _by_partition(self, offsets: dict[str, Any]) -> dict[int, int]:
        """The topic's offsets by partition, from offsets in Spark's format; {} if there are none."""
        return {int(partition): offset for partition, offset in offsets.get(self.topic.name, {}).items()}

    def _lose(self, problem: str, what_follows: str, is_accepted: bool = True) -> None:
        """Prints the loss if it was accepted, else raises PipelineError."""
        problem = problem[0].upper() + problem[1:]
        if not self.accept_data_loss or not is_accepted:
            raise PipelineError(f"{problem} Nothing was skipped. With --accept-data-loss, {what_follows}.")
        say(f"{problem} --accept-data-loss: {what_follows}.")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (KafkaError, TimeoutError) as error:
            raise SourceAwayError(
                f"Kafka on {self.topic.servers} no longer answers ({first_line(str(error))}). Start it, "
                f"then this script, which resumes from the last committed offsets."
            ) from error
        except SPARK_ERRORS as error:  # from a read by Spark
            self.topic.require_access(error)
            raise
