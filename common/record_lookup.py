"""The records of a topic by their offsets, also around those that don't fit into the memory.

A few kilobytes of a compressed message can hold a gigabyte, which Kafka unpacks as it reads the record, not before.
"""

import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from common.console import java_class, root_cause
from common.contract import LONGEST_RECORD
from common.internals import KAFKA_RECORD, OUT_OF_MEMORY, forget_fetched_records, kafka_records, large_records
from common.kafka_config import spark_options
from common.topics import Topic

MAX_LOOKUP_SECONDS = 2  # for a single record
MAX_WAIT_SECONDS = 60  # for some records, at a start
TOO_LARGE = 2 * LONGEST_RECORD  # for a record with its headers, where it would have to be unpacked to be measured any closer
# Options of a consumer that unpacks a record only when it is asked for, and none of the message after it.
ONE_BY_ONE = {"kafka.max.poll.records": 1, "kafka.max.partition.fetch.bytes": 1}

Result = TypeVar("Result")
Offsets = dict[int, tuple[int, int]]  # partition: the first offset, and the one after the last


class Gap(NamedTuple):
    """Offsets that are not read, from `begin` to before `end`: a record that is too large, and what is packed in a message after it, to
    which a consumer comes only by unpacking it."""
    partition: int
    begin: int
    end: int


def kafka_options(topic: Topic) -> dict[str, Any]:
    """The options of Spark's Kafka source that say which cluster it reads, and how."""
    return ({"kafka.isolation.level": topic.isolation_level} | spark_options(topic.properties)
            | {"kafka.bootstrap.servers": topic.servers})


def is_too_large(error: BaseException) -> bool:
    """Whether a reading has failed for a record that does not fit into the memory. A consumer says so once, then this."""
    return java_class(error) == OUT_OF_MEMORY or "Received exception when fetching the next record" in root_cause(error)


class RecordLookup:
    """Reads the records of `topic` at given offsets."""

    def __init__(self, topic: Topic):
        self.topic = topic
        self._gaps: set[Gap] = set()  # that were found
        self._is_careful = False  # since some records did not fit

    def ask(self, spark: SparkSession, offsets: Offsets, question: Callable[[DataFrame], Result]) -> Result:
        """The answer of `question` to the records at these offsets (`records`). If they don't fit into the memory, the question is asked
        again without those that are too large."""
        try:
            return question(self.records(spark, offsets))
        except (PySparkException, Py4JJavaError) as error:
            if not is_too_large(error):
                raise
        self.find_gaps(spark, offsets)
        return question(self.records(spark, offsets))

    def gaps(self, offsets: Offsets) -> list[Gap]:
        """The gaps that were found within these offsets."""
        within = [gap._replace(begin=max(gap.begin, offsets[gap.partition][0]), end=min(gap.end, offsets[gap.partition][1]))
                  for gap in sorted(self._gaps) if gap.partition in offsets]
        return [gap for gap in within if gap.begin < gap.end]

    def records(self, spark: SparkSession, offsets: Offsets, fail_on_data_loss: bool = False) -> DataFrame:
        """The records at these offsets, but for the gaps that were found, as `kafka_records` gives them."""
        pieces: list[Offsets] = []  # Spark reads no more than one of each partition at a time
        for partition, (begin, end) in offsets.items():
            for number, gap in enumerate([*self.gaps({partition: (begin, end)}), Gap(partition, end, end)]):
                pieces += [{}] * (number == len(pieces))
                pieces[number] = pieces[number] | ({partition: (begin, gap.begin)} if begin < gap.begin else {})
                begin = gap.end
        kinds = KAFKA_RECORD | {"timestampType": "INT"}
        parts = [self._read(spark, piece, fail_on_data_loss) for piece in filter(None, pieces)]
        if not parts:
            return spark.createDataFrame([], ", ".join(map(" ".join, kinds.items())))
        return functools.reduce(DataFrame.union, parts)

    def _read(self, spark: SparkSession, offsets: Offsets, fail_on_data_loss: bool) -> DataFrame:
        begin, end = (json.dumps({self.topic.name: {partition: each[which] for partition, each in offsets.items()}}) for which in (0, 1))
        return kafka_records(
            spark.read.format("kafka").options(**kafka_options(self.topic) | (ONE_BY_ONE if self._is_careful else {}))
            .option("assign", json.dumps({self.topic.name: list(offsets)})).option("startingOffsets", begin).option("endingOffsets", end)
            .option("failOnDataLoss", fail_on_data_loss).option("maxRecordsPerPartition", 20_000).load(), LONGEST_RECORD)

    def find_gaps(self, spark: SparkSession, offsets: Offsets) -> None:
        """Finds out which of the records at these offsets are too large, after reading them has failed for one. From then on, records are
        read one by one."""
        self._is_careful = True
        forget_fetched_records(spark, and_consumers=True)
        beginning = self.topic.beginning()
        for partition, (offset, end) in offsets.items():
            offset = max(offset, beginning.get(partition, 0))
            while offset < end:
                offset, large = large_records(spark, self.topic.messages(partition, offset), TOO_LARGE)
                self._gaps |= {Gap(partition, *each) for each in large}
