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

from common.console import java_class
from common.contract import LONGEST_RECORD
from common.internals import KAFKA_RECORD, OUT_OF_MEMORY, KafkaReader, kafka_records
from common.kafka_config import spark_options
from common.topics import Topic

MAX_LOOKUP_SECONDS = 2  # for a single record

Result = TypeVar("Result")
Offsets = dict[int, tuple[int, int]]  # partition: the first offset, and the one after the last


class Gap(NamedTuple):
    """Offsets whose records don't fit into the memory: from `begin` to before `end`."""
    partition: int
    begin: int
    end: int


def kafka_options(topic: Topic) -> dict[str, Any]:
    """The options of Spark's Kafka source that say which cluster it reads, and how."""
    return ({"kafka.isolation.level": topic.isolation_level} | spark_options(topic.properties)
            | {"kafka.bootstrap.servers": topic.servers})


class RecordLookup:
    """Reads the records of `topic` at given offsets."""

    def __init__(self, topic: Topic):
        self.topic = topic
        self._gaps: set[Gap] = set()  # that were found

    def ask(self, spark: SparkSession, offsets: Offsets, question: Callable[[DataFrame], Result]) -> Result:
        """The answer of `question` to the records at these offsets (`records`). If some don't fit into the memory, finds out which, and
        asks it about the others."""
        try:
            return question(self.records(spark, offsets))
        except (PySparkException, Py4JJavaError) as error:
            if java_class(error) != OUT_OF_MEMORY:
                raise
        self._find_gaps(spark, offsets)
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
        return functools.reduce(DataFrame.union, parts) if parts else spark.createDataFrame([], ", ".join(map(" ".join, kinds.items())))

    def _read(self, spark: SparkSession, offsets: Offsets, fail_on_data_loss: bool) -> DataFrame:
        begin, end = (json.dumps({self.topic.name: {partition: each[which] for partition, each in offsets.items()}}) for which in (0, 1))
        # A consumer unpacks several records together, and must not come to one in the gap.
        at_once = {"kafka.max.poll.records": 1} if self._gaps else {}
        return kafka_records(
            spark.read.format("kafka").options(**kafka_options(self.topic) | at_once)
            .option("assign", json.dumps({self.topic.name: list(offsets)})).option("startingOffsets", begin).option("endingOffsets", end)
            .option("failOnDataLoss", fail_on_data_loss).option("maxRecordsPerPartition", 20_000).load(), LONGEST_RECORD)

    def _find_gaps(self, spark: SparkSession, offsets: Offsets) -> None:
        several, single = (KafkaReader(spark, kafka_options(self.topic), at_once) for at_once in (5000, 1))
        try:
            for partition, (offset, end) in offsets.items():
                while offset < end:
                    following = self._after(several, partition, offset)
                    if following is None:
                        following = self._after(single, partition, offset)
                    if following is None:  # a consumer gets to none that is packed after it in the same batch
                        following = self.topic.end_of_batch(partition, offset)
                        self._gaps.add(Gap(partition, offset, following))
                    if following == offset:
                        break  # Kafka has no more of them
                    offset = following
        finally:
            several.close()
            single.close()

    def _after(self, reader: KafkaReader, partition: int, offset: int) -> int | None:
        return reader.next_offset(self.topic.name, partition, offset, MAX_LOOKUP_SECONDS)
