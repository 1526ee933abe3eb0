"""Looking up records of a topic by offset, even near records that do not fit in memory.

A compressed batch of a few kilobytes can expand to a gigabyte. Kafka's consumer decompresses a record on reaching it.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pipeline.contract.contract import MAX_RECORD_BYTES
from pipeline.kafka.private import forget_fetched_records, kafka_records, large_records
from pipeline.kafka.topics import Topic
from pipeline.spark.private import OUT_OF_MEMORY, SPARK_ERRORS
from pipeline.terminal.errors import java_class, root_cause
from pipeline.terminal.messages import say

from kafka.errors import KafkaTimeoutError
from pyspark.sql import DataFrame, SparkSession

MAX_LOOKUP_SECONDS = 2  # for looking up a single record
MAX_WAIT_SECONDS = 10  # for looking up a few records at startup
# Limit for a record including its headers, where a closer measurement would require unpacking it.
MAX_MESSAGE_RECORD_BYTES = 2 * MAX_RECORD_BYTES
# Options of a consumer that unpacks a record only on request, and no part of the next message.
ONE_BY_ONE = {"kafka.max.poll.records": 1, "kafka.max.partition.fetch.bytes": 1}
SEVERAL = {"kafka.max.poll.records": 500}
OF_TASK = 20_000  # offsets
NEAR_OFFSETS = 2 * SEVERAL["kafka.max.poll.records"]  # twice a poll, because some offsets may hold no record

Result = TypeVar("Result")
Offsets = dict[int, tuple[int, int]]  # by partition: the first offset, and the one after the last


class Gap(NamedTuple):
    """Offsets that are not read, from `begin` up to but excluding `end`: a record that is too large, and the records after it in
    the same batch, which a consumer can only reach by decompressing it. There are no records between `after` and `begin`.
    """

    partition: int
    after: int
    begin: int
    end: int


def kafka_options(topic: Topic) -> dict[str, Any]:
    """The options of Spark's Kafka source that say which cluster to read, and how."""
    return (
        {"kafka.isolation.level": topic.isolation_level}
        | {f"kafka.{name}": value for name, value in topic.properties.items()}
        | {"kafka.bootstrap.servers": topic.servers}
    )


def is_too_large(error: BaseException) -> bool:
    """Whether reading has failed because a record does not fit in memory. A consumer reports this once as an
    OutOfMemoryError, and from then on with this message.
    """
    return java_class(error) == OUT_OF_MEMORY or "Received exception when fetching the next record" in root_cause(error)


class RecordLookup:
    """Looks up records of `topic` by offset."""

    def __init__(self, topic: Topic):
        self.topic = topic
        self._gaps: list[Gap] = []  # those found so far
        self._one_by_one = 0  # how many offsets before each gap, and before the end, are read one record at a time
        self._has_consumers = False  # that are left from earlier readings

    def ask(
        self, spark: SparkSession, offsets: Offsets, question: Callable[[DataFrame], Result], has_failed: bool = False
    ) -> Result:
        """Returns `question`'s answer for the records at these offsets (see `records`). If they don't fit in memory, asks again
        without the records that are too large.

        `has_failed`: whether reading these offsets is known to run out of memory.
        """
        for one_by_one in (0, NEAR_OFFSETS, sys.maxsize)[has_failed:]:
            if one_by_one:
                self._find_gaps(spark, offsets, one_by_one)
            try:
                return question(self.records(spark, offsets))
            except SPARK_ERRORS as error:
                if one_by_one == sys.maxsize or not is_too_large(error):
                    raise
        raise AssertionError("the last reading returns or raises")

    def forget_fetched_records(self, spark: SparkSession) -> None:
        """Makes the next batch read all of its records from Kafka, and closes the consumers of this lookup."""
        forget_fetched_records(spark, and_consumers=self._has_consumers)
        self._has_consumers = False

    def gaps(self, offsets: Offsets) -> list[Gap]:
        """The known gaps within these offsets."""
        return [
            Gap(gap.partition, *(min(max(offset, begin), end) for offset in gap[1:]))
            for gap in sorted(self._gaps)
            for begin, end in [offsets.get(gap.partition, (0, 0))]
            if gap.after < end and gap.end > begin
        ]

    def records(self, spark: SparkSession, offsets: Offsets, fail_on_data_loss: bool = False) -> DataFrame:
        """The records at these offsets, without the known gaps, in the format of `kafka_records`."""
        self._has_consumers = True
        far, near = [], []
        for partition, (begin, end) in offsets.items():
            for gap in [*self.gaps({partition: (begin, end)}), Gap(partition, end, end, end)]:
                middle = max(begin, gap.after - self._one_by_one)
                far += [(partition, first, min(first + OF_TASK, middle)) for first in range(begin, middle, OF_TASK)]
                near += [
                    (partition, first, min(first + OF_TASK, gap.after)) for first in range(middle, gap.after, OF_TASK)
                ]
                begin = gap.end
        read = [
            kafka_records(
                spark,
                kafka_options(self.topic) | options,
                self.topic.name,
                ranges,
                fail_on_data_loss,
                MAX_RECORD_BYTES,
            )
            for ranges, options in ((far, SEVERAL), (near, ONE_BY_ONE))
        ]
        return read[0].union(read[1])

    def _find_gaps(self, spark: SparkSession, offsets: Offsets, one_by_one: int) -> None:
        """Finds the records at these offsets that are too large.

        `one_by_one`: how many offsets before each of them, and before the end, are read one record at a time from now on.
        """
        say(f"A record of {self.topic} doesn't fit in memory. Searching the batch for such records …")
        self._one_by_one = one_by_one
        self._gaps = []
        forget_fetched_records(spark, and_consumers=True)
        beginning = self.topic.beginning()
        for partition, (offset, end) in offsets.items():
            offset = max(offset, beginning.get(partition, 0))
            while offset < end:
                following, large = large_records(
                    spark, self.topic.messages(partition, offset), offset, MAX_MESSAGE_RECORD_BYTES
                )
                if following is None:
                    raise KafkaTimeoutError(f"no message at offset {offset} of partition {partition}")
                self._gaps += [Gap(partition, *record) for record in large]
                offset = following
