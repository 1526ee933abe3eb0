"""The topic as the source of a stream: what is lost of it, how far behind the stream is, and what to do when Kafka is away."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kafka.errors import KafkaError
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from common.batches import done_in
from common.console import PipelineError, first_line, root_cause, say, warn
from common.internals import query_of
from common.process import StopFlag, Stopped
from common.source import Left, Source, SourceAwayError
from common.topics import Topic

GOES_ON = "it goes on with what there is"
INCONSISTENT = "inconsistent_verdict"  # the reason of a record that one reading has accepted and another one has not
TOPIC_ID, TOPIC_NAME = "pipeline.topic.id", "pipeline.topic.name"  # properties of a table: the topic that it is written from


class KafkaSource(Source):
    """The topic as the source of a stream (common/source.py). `accept_data_loss`: passes over the records that it has lost by now.

    `group`: the consumer group under which it notes how far it is.
    """

    def __init__(self, topic: Topic, accept_data_loss: bool, group: str):
        self.topic, self.accept_data_loss, self.group = topic, accept_data_loss, group
        self.mode = f"isolation.level={topic.isolation_level}"
        self.beginning: dict[int, int] = {}  # of the topic at the start, by partition, if data loss is accepted
        self.has_failed = False  # for lost records, and was started again
        self.has_warned = False  # that it can't note how far it is

    def __str__(self) -> str:
        return str(self.topic)

    def read_batch(self, batch: DataFrame) -> DataFrame:
        """Ends the stream that passes over lost records as soon as it is past them: the next one stops where more is lost."""
        if self.accept_data_loss and (done := done_in(query_of(batch))):
            end = self._offsets(done[-1], "endOffset")
            if all(end.get(partition, -1) >= offset for partition, offset in self.beginning.items()):
                raise Stopped
        return batch

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        warn(f"Records of {self.topic} were judged twice, with different results. Those that the table lacks are in the quarantine, as "
             f"{INCONSISTENT} where the second judgement accepts them. Check the contract's rules.")
        row, record = written.alias("row"), judged.alias("record")
        is_written = F.expr("row.partition = record.partition AND row.offset = record.offset AND "
                            "row.kafka_timestamp <=> record.kafka_timestamp")
        return record.join(row, is_written, "left_anti").withColumn("reject_reason", F.coalesce("reject_reason", F.lit(INCONSISTENT)))

    def identity(self) -> dict[str, str]:
        with self._asking():
            topic_id = self.topic.id()
        return {TOPIC_ID: topic_id, TOPIC_NAME: self.topic.name} if topic_id else {}  # brokers before 2.8 have none

    def is_made_anew(self, identity: dict[str, str], written_from: dict[str, str], unread: dict[str, Any]) -> bool:
        is_other_topic = self.topic.name not in (unread or [written_from.get(TOPIC_NAME, self.topic.name)])
        if written_from.get(TOPIC_ID) in (None, identity.get(TOPIC_ID)) or not identity or is_other_topic:
            return False
        start = unread.get(self.topic.name) or "its beginning"
        self._lose(f"{self.topic} was deleted and recreated since the table was written: what the old one had from {start} on "
                   f"(partition: offset) is gone.", "the new topic is read from its beginning")
        return True

    def check_unread(self, unread: dict[str, Any], checkpoint: str, last_records: str | None) -> None:
        if self.accept_data_loss:
            with self._asking():
                self.beginning = self.topic.beginning()
        if not unread:
            return
        if self.topic.name not in unread:
            raise PipelineError(f"The checkpoint {checkpoint} is that of the topic {', '.join(unread)}. Give the topic "
                                f"{self.topic.name} a --table and a --checkpoint of its own.")
        next_offsets = {int(partition): offset for partition, offset in unread[self.topic.name].items()}
        with self._asking():
            lost, too_far = self.topic.lost(next_offsets), self.topic.read_too_far(next_offsets)
        if lost:
            self._lose(f"Kafka no longer has records of {self.topic} that were not read yet: {lost}. Its retention removed them, "
                       f"or something else did.", GOES_ON)
        if too_far:
            raise PipelineError(f"More of {self.topic} was read than is committed: a transaction is still open in {too_far}. Start "
                                f"again when it has ended, or go on with isolation.level=read_uncommitted in --kafka-config.")

    def wait_out(self, error: Exception, stopping: StopFlag) -> None:
        problem = root_cause(error)
        if re.search("may have been lost|is out of range for partition", problem):  # the start looks at what is lost
            if self.has_failed:  # and has found nothing
                self._lose(f"Kafka no longer has records of {self.topic} that were not read yet ({first_line(problem)}).", GOES_ON)
            self.has_failed = True
            return
        self.topic.wait_out(error.__cause__ if isinstance(error.__cause__, KafkaError) else error, stopping)

    def note(self, progress: dict[str, Any]) -> None:
        self.has_failed = False
        try:
            self.topic.note_offsets(self.group, self._offsets(progress, "endOffset"))
        except Exception as error:  # whatever it is, it is no reason to stop
            if not self.has_warned:
                warn(f"Kafka does not note how far the stream is ({type(error).__name__}), so that its tools can't show the lag of the "
                     f"group {self.group}. The stream goes on without. It needs permission to read that group, which can have no "
                     f"other member; --group-id names another one.")
            self.has_warned = True

    def lag(self, progress: dict[str, Any]) -> dict[int, int]:
        end, latest = (self._offsets(progress, which) for which in ("endOffset", "latestOffset"))
        return {partition: max(0, offset - end.get(partition, offset)) for partition, offset in latest.items()}

    def left(self, progress: dict[str, Any], rows: int) -> Left | None:
        lag = self.lag(progress)
        return Left(sum(lag.values()), "behind", rows) if lag else None

    def _offsets(self, progress: dict[str, Any], which: str) -> dict[int, int]:
        """The offsets of this name by partition, in what Spark reports of a batch; {} for none."""
        [kafka] = progress["sources"]
        of_topics = json.loads(kafka[which] or "null") or {}
        return {int(partition): offset for partition, offset in of_topics.get(self.topic.name, {}).items()}

    def _lose(self, problem: str, what_follows: str) -> None:
        """Says what is lost if that was accepted, else raises PipelineError."""
        problem = problem[0].upper() + problem[1:]
        if not self.accept_data_loss:
            raise PipelineError(f"{problem} Nothing was skipped. With --accept-data-loss {what_follows}.")
        say(f"{problem} --accept-data-loss: {what_follows}.")

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except KafkaError as error:
            raise SourceAwayError(f"Kafka on {self.topic.servers} no longer answers ({first_line(str(error))}). Start it, "
                                  f"then this script: it goes on from the last committed offsets.") from error
