"""Looking up records of a topic by offset, also in the neighbourhood of records that do not fit into memory.

A compressed batch of a few kilobytes can expand to a gigabyte. Kafka's consumer decompresses a record when it comes to it.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pipeline.contract.contract import MAX_RECORD_BYTES
from pipeline.kafka.private import KAFKA_RECORD, forget_fetched_records, kafka_records, large_records
from pipeline.kafka.properties import spark_options
from pipeline.kafka.topics import Topic
from pipeline.spark.private import OUT_OF_MEMORY
from pipeline.terminal.errors import java_class, root_cause

from kafka.errors import KafkaTimeoutError
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

MAX_LOOKUP_SECONDS = 2  # for looking up a single record
MAX_WAIT_SECONDS = 10  # for looking up a few records at startup
# Limit for a record including its headers, where a closer measurement would require unpacking it.
MAX_MESSAGE_RECORD_BYTES = 2 * MAX_RECORD_BYTES
# Options of a consumer that unpacks a record only on request, and nothing of the next message.
ONE_BY_ONE = {"kafka.max.poll.records": 1, "kafka.max.partition.fetch.bytes": 1}
SEVERAL = {"kafka.max.poll.records": 500}
NEAR_OFFSETS = 2 * SEVERAL["kafka.max.poll.records"]  # twice a poll, because some offsets may hold no record

Result = TypeVar("Result")
Offsets = dict[int, tuple[int, int]]  # by partition: the first offset, and the one after the last


class Gap(NamedTuple):
    """Offsets that are not read, from `begin` up to but excluding `end`: a record that is too large, and the records behind it in
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
        | spark_options(topic.properties)
        | {"kafka.bootstrap.servers": topic.servers}
    )


def is_too_large(error: BaseException) -> bool:
    """Whether reading has failed because a record does not fit into memory. A consumer reports this once as an
    OutOfMemoryError, and from then on with this message.
    """
    return java_class(error) == OUT_OF_MEMORY or "Received exception when fetching the next record" in root_cause(error)


class RecordLookup:
    """Looks up records of `topic` by offset."""

    def __init__(self, topic: Topic):
        self.topic = topic
        self._gaps: list[Gap] = []  # those found so far
        self._one_by_one = 0  # how many offsets before each gap, and before the end, are read one record at a time

    def ask(
        self, spark: SparkSession, offsets: Offsets, question: Callable[[DataFrame], Result], has_failed: bool = False
    ) -> Result:
        """Returns the answer of `question` to the records at these offsets (see `records`). If they don't fit into memory, asks again
        without the records that are too large.

        `has_failed`: whether reading these offsets is known to run out of memory.
        """
        for one_by_one in (0, NEAR_OFFSETS, sys.maxsize)[has_failed:]:
            if one_by_one:
                self._find_gaps(spark, offsets, one_by_one)
            try:
                return question(self.records(spark, offsets))
            except (PySparkException, Py4JJavaError) as error:
                if one_by_one == sys.maxsize or not is_too_large(error):
                    raise
        raise AssertionError("the last reading returns or raises")

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
        pieces: dict[tuple[int, bool], Offsets] = {}  # Spark reads at most one range per partition at a time
        for partition, (begin, end) in offsets.items():
            for number, gap in enumerate([*self.gaps({partition: (begin, end)}), Gap(partition, end, end, end)]):
                near = max(begin, gap.after - self._one_by_one)
                for is_near, (first, last) in enumerate([(begin, near), (near, gap.after)]):
                    if first < last:
                        pieces.setdefault((number, bool(is_near)), {})[partition] = first, last
                begin = gap.end
        kinds = KAFKA_RECORD | {"timestampType": "INT"}
        parts = [self._read(spark, piece, is_near, fail_on_data_loss) for (_, is_near), piece in pieces.items()]
        if not parts:
            return spark.createDataFrame([], ", ".join(map(" ".join, kinds.items())))
        return functools.reduce(DataFrame.union, parts)

    def _read(self, spark: SparkSession, offsets: Offsets, is_near: bool, fail_on_data_loss: bool) -> DataFrame:
        begin, end = (
            json.dumps({self.topic.name: {partition: each[which] for partition, each in offsets.items()}})
            for which in (0, 1)
        )
        return kafka_records(
            spark.read.format("kafka")
            .options(**kafka_options(self.topic) | (ONE_BY_ONE if is_near else SEVERAL))
            .option("assign", json.dumps({self.topic.name: list(offsets)}))
            .option("startingOffsets", begin)
            .option("endingOffsets", end)
            .option("failOnDataLoss", fail_on_data_loss)
            .option("maxRecordsPerPartition", 20_000)
            .load(),
            MAX_RECORD_BYTES,
        )

    def _find_gaps(self, spark: SparkSession, offsets: Offsets, one_by_one: int) -> None:
        """Finds the records at these offsets that are too large.

        `one_by_one`: how many offsets before each of them, and before the end, are read one record at a time from now on.
        """
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
