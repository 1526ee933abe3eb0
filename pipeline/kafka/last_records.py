"""The last records that a stream has read from a topic. They show whether Kafka still has the same ones.

Kafka may lose the end of a partition, for example when an older copy of its data is restored, and then fill its offsets with
other records.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

from pipeline.contract.contract import MAX_RECORD_BYTES
from pipeline.contract.judge import json_sql
from pipeline.delta.tables import TablePair
from pipeline.kafka.lookup import MAX_LOOKUP_SECONDS, MAX_WAIT_SECONDS, Offsets, RecordLookup, Result, kafka_options
from pipeline.kafka.private import KafkaReader
from pipeline.kafka.records import IS_SAME_PLACE, differs, hash_of, is_same_sql, known_time, md5_sql, time_sql

from delta.tables import DeltaTable
from kafka.errors import KafkaTimeoutError
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

REMEMBERED_OFFSETS = 10  # offsets at the end of each partition whose records are remembered; some may hold no record
# Offsets searched first for the last record that was read, or that Kafka and the tables have in common.
FIRST_SEARCH_OFFSETS = 100_000


class LastRecords:
    """The last records read from each partition of the topic that `lookup` searches, and their comparison with Kafka's.

    A record is remembered by its offset, `time` (`time_sql`) and `md5` (`md5_sql`).
    """

    def __init__(self, lookup: RecordLookup):
        self.lookup, self.topic = lookup, lookup.topic
        self._remembered: dict[int, list[dict[str, Any]]] = {}  # by partition
        self.reader: KafkaReader | None = None

    def restore(self, note: str | None) -> None:
        """`note`: the latest result of `add`."""
        self._remembered = {int(partition): records for partition, records in json.loads(note or "{}").items()}

    def forget(self, partitions: Collection[int]) -> None:
        self._remembered = {
            partition: records for partition, records in self._remembered.items() if partition not in partitions
        }

    def observed(self, ends: dict[int, int], is_record: Column) -> Column:
        """An aggregate over the records of a batch with these ends: the string that `add` takes. See `Source.last_records`."""
        by_partition = F.array(*(F.lit(ends.get(partition)).cast("bigint") for partition in range(1 + max(ends))))
        is_last = F.col("offset") >= F.get(by_partition, F.col("partition")) - REMEMBERED_OFFSETS
        time = F.expr(time_sql("unix_millis(kafka_timestamp)")).alias("time")
        records = F.collect_list(
            F.when(is_last & is_record, F.struct("partition", "offset", time, F.expr(md5_sql("raw")).alias("md5")))
        )
        return F.to_json(F.struct(records.alias("records"), F.collect_set("partition").alias("partitions")))

    def add(self, spark: SparkSession, observed: str | None, begins: dict[int, int], ends: dict[int, int]) -> str:
        """Remembers the records `observed` at the end of a batch from `begins` to `ends`, and returns a note of all remembered
        records. A partition without a record in the batch keeps those of an earlier one.
        """
        batch = json.loads(observed or "{}")
        newest: dict[int, list[dict[str, Any]]] = {}
        for record in batch.get("records", ()):
            newest.setdefault(record.pop("partition"), []).append(record)
        # Partitions whose records all precede the last offsets, for example because an aborted transaction takes those
        # offsets.
        for partition in batch.get("partitions", ()):
            begin, end, size = begins.get(partition, 0), ends[partition], FIRST_SEARCH_OFFSETS
            while partition not in newest and end > begin:
                rows = self._in_kafka(
                    spark,
                    {partition: (max(begin, end - size), end)},
                    lambda records: records.orderBy(F.desc("offset")).limit(REMEMBERED_OFFSETS).collect(),
                )
                last = [{"offset": row.offset, "time": row.time, "md5": row.md5} for row in rows]
                newest |= {partition: last} if last else {}
                end, size = end - size, size * 10
        self._remembered |= newest
        return json.dumps(self._remembered)

    def replaced(self, spark: SparkSession) -> list[tuple[int, int]]:
        """The partitions that now have a different record at the offset of the last one read, with that offset. Raises KafkaError if Kafka
        does not answer.
        """
        newest = {
            partition: max(records, key=lambda record: record["offset"])
            for partition, records in self._remembered.items()
            if records
        }
        offsets = {
            partition: (record["offset"], record["offset"] + 1)
            for partition, record in newest.items()
            if record.get("time") is not None or record.get("md5")
        }
        there, silent = self._few_in_kafka(spark, offsets, MAX_LOOKUP_SECONDS)
        if silent:
            there, silent = self._few_in_kafka(spark, offsets, MAX_WAIT_SECONDS)
        if silent:
            raise KafkaTimeoutError(f"partitions {', '.join(map(str, sorted(silent)))}")
        return [
            (partition, offset)
            for partition, offset, time, md5 in there
            if differs((newest[partition].get("time"), newest[partition].get("md5")), (time, md5))
        ]

    def partitions_replaced(
        self, spark: SparkSession, first: dict[int, int], end: dict[int, int], next_offsets: dict[int, int]
    ) -> set[int]:
        """The partitions that have records other than the remembered ones. `first`, `end`: those of the topic, by partition.

        Other records are recognised by their values. With read_committed, any record between the last one read and the next
        offset also counts as different.
        """
        known = {
            (partition, record["offset"]): (record.get("time"), record.get("md5"))
            for partition, records in self._remembered.items()
            for record in records
            if partition in end
        }
        last = dict(sorted(known))  # the last offset of each partition wins
        is_committed = self.topic.isolation_level.lower() == "read_committed"
        ranges = {
            partition: (
                max(offset - REMEMBERED_OFFSETS, first[partition]),
                min(max(offset + 1, next_offsets.get(partition, 0) if is_committed else 0), end[partition]),
            )
            for partition, offset in last.items()
        }
        there, unread = self._few_in_kafka(spark, ranges, MAX_WAIT_SECONDS)
        if unread != set():
            there = [
                (row.partition, row.offset, row.time, row.md5)
                for row in self._in_kafka(spark, ranges, DataFrame.collect)
            ]
        return {
            partition
            for partition, offset, time, md5 in there
            if offset > last[partition] or differs(known.get((partition, offset), (time, md5)), (time, md5))
        }

    def common_end(self, spark: SparkSession, tables: TablePair, partition: int, first: int, end: int) -> int:
        """The offset between `first` and `end` at which Kafka and the tables begin to differ."""

        def newest_same(records: DataFrame) -> int | None:
            [[offset]] = _same(spark, tables, records).agg(F.max("offset")).collect()
            return offset

        size = FIRST_SEARCH_OFFSETS
        while first < end:
            begin = max(first, end - size)
            newest = self._in_kafka(spark, {partition: (begin, end)}, newest_same)
            if newest is not None:
                return newest + 1
            end, size = begin, size * 10
        return first

    def delete_from(self, spark: SparkSession, tables: TablePair, offsets: Offsets) -> None:
        """Deletes the records that Kafka has at these offsets from `tables`, which may have others at the same offsets."""

        def delete(records: DataFrame) -> None:
            conditions = is_same_sql(tables)
            if "elements" in spark.read.format("delta").load(tables.quarantine).columns:
                # Only one of a message's rows has its value.
                records = _same(spark, tables, records).distinct().localCheckpoint().alias("record")
                conditions = dict.fromkeys(conditions, IS_SAME_PLACE)
            for table, is_same in conditions.items():
                DeltaTable.forPath(spark, table).alias("row").merge(records, is_same).whenMatchedDelete().execute()

        self._in_kafka(spark, offsets, delete)

    def _few_in_kafka(
        self, spark: SparkSession, offsets: Offsets, seconds: float
    ) -> tuple[list[tuple[int, int, int | None, str | None]], set[int] | None]:
        """Like `_in_kafka`, for so few records that a Spark job would take longer; see `KafkaReader.records_between`."""
        self.reader = self.reader or KafkaReader(spark, kafka_options(self.topic))
        found, unread = self.reader.records_between(self.topic.name, offsets, seconds, MAX_RECORD_BYTES)
        if unread:
            self.reader.close()  # its connection may be dead
            self.reader = None
        return [
            (partition, offset, known_time(time), hash_of(value)) for partition, offset, time, value in found
        ], unread

    def _in_kafka(self, spark: SparkSession, offsets: Offsets, question: Callable[[DataFrame], Result]) -> Result:
        """Returns `question`'s answer for the records that Kafka has at these offsets, aliased as "record": `partition`,
        `offset`, `time` (`time_sql`), and the hashes (`md5_sql`) of the value, `md5`, and of its JSON text, `json_md5`.
        """
        return self.lookup.ask(
            spark,
            offsets,
            lambda records: question(
                records.selectExpr(
                    "partition",
                    "offset",
                    f"{time_sql('timestamp')} AS time",
                    "md5(value) AS md5",
                    f"md5({json_sql('value')}) AS json_md5",
                ).alias("record")
            ),
        )


def _same(spark: SparkSession, tables: TablePair, records: DataFrame) -> DataFrame:
    """Those of Kafka's records that the tables have, too."""
    same = [
        spark.read.format("delta").load(table).alias("row").join(records, F.expr(is_same)).select("record.*")
        for table, is_same in is_same_sql(tables).items()
    ]
    return same[0].union(same[1])
