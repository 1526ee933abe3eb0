"""Replaying a quarantine: rejected records that the contract now accepts move to the table, each exactly once.

Delta has no transactions across tables. So each part of the quarantine moves in four commits:

1. Its rows are marked: their reject_reason begins with "replay N: ". New rows never begin like that, so the part no longer changes.
2. The marked rows are judged and rewritten. Valid ones stay marked; the others get their new reason.
3. The valid ones are appended to the table, as version 2 N of the application REPLAY in Delta's transactions.
4. The marked rows are deleted from the quarantine.

If a replay is killed, the next one finds the mark. If the table has transaction 2 N, only step 4 is left to do. Otherwise the next
replay commits an empty transaction 2 N + 1, so that Spark can't commit 2 N after its script was killed, and removes the mark. Each
commit is synced to the disk before the next one.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.contract.columns import BEFORE, LISTED
from pipeline.contract.contract import DUPLICATE, MAX_RECORD_BYTES, MOVING, OVERSIZED, UNREADABLE, Contract
from pipeline.contract.elements import by_record
from pipeline.contract.judge import json_sql, parse
from pipeline.delta.commits import NEWEST_COMMITS, REPLAY, REPLAY_NOTE, Commits, sync_commits
from pipeline.delta.duplicates import mark_duplicates
from pipeline.delta.locks import with_retries
from pipeline.delta.private import newest_state, version_and_last_batch
from pipeline.delta.tables import WRITER, TablePair, add_missing_columns, properties_of
from pipeline.spark.private import code_generation, free_checkpoints
from pipeline.terminal.errors import PipelineError

from delta.exceptions import ConcurrentTransactionException
from delta.tables import DeltaTable
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

MAX_PART_ROWS, MAX_PART_BYTES = 200_000, 500_000_000  # limits of a part; the stream waits while one is moved
IS_PART = f"{LISTED} is set"  # whether a row of the quarantine lists elements
SETTINGS = {
    "spark.databricks.delta.commitInfo.userMetadata": REPLAY_NOTE,
    # The rewritten rows need not meet the condition that selects the rows they replace.
    "spark.databricks.delta.replaceWhere.constraintCheck.enabled": "false",
}


class Verdict(NamedTuple):
    """Why a reading was rejected, and why it is rejected now (None: it is valid)."""

    before: str
    now: str | None


@contextmanager
def replaying(spark: SparkSession) -> Iterator[None]:
    """Must be active while anything is moved."""
    for name, value in SETTINGS.items():
        spark.conf.set(name, value)
    try:
        yield
    finally:
        for name in SETTINGS:
            spark.conf.unset(name)


@dataclass
class Replay:
    """Moves those rows of the quarantine that meet the SQL condition `chosen` and that the contract accepts."""

    spark: SparkSession
    tables: TablePair
    contract: Contract
    chosen: str
    synced: dict[str, int] = field(default_factory=dict)  # the version up to which each table is synced to the disk

    @property
    def quarantine(self) -> DataFrame:
        return self.spark.read.format("delta").load(self.tables.quarantine)

    @property
    def selected(self) -> str:
        """SQL: whether a row of the quarantine was chosen and can be judged."""
        is_small = " AND ".join(
            f"coalesce(octet_length({name}), 0) <= {MAX_RECORD_BYTES}"
            for name in ("raw", "kafka_key")
            if name in self.tables.quarantine_columns
        )
        conditions = [
            self.chosen,
            "ingest_time IS NOT NULL",  # otherwise, the row is not the pipeline's
            f"NOT reject_reason RLIKE '^{MOVING}'".replace("\\", "\\\\"),
            # Without their record, whole files and messages that were too large to read can't be judged.
            f"reject_reason <> '{UNREADABLE}'",
            f"(reject_reason <> '{OVERSIZED}' OR raw IS NOT NULL AND {is_small})",
        ]
        if "elements" in self.quarantine.columns and not self.contract.array:
            conditions.append("elements IS NULL")  # the table already has the other readings of these messages
        if not self.contract.key and DUPLICATE not in self.contract.rules:
            conditions.append(
                f"reject_reason <> '{DUPLICATE}'"
            )  # valid apart from their key, which the table already has
        return " AND ".join(conditions)

    def prepare(self) -> int:
        """Finishes or undoes an interrupted replay. Returns the number of rows that were still marked. Raises PipelineError if the
        stream has to repair a table first.
        """
        for table in (self.tables.table, self.tables.quarantine):
            self._require_intact(table)
            self._sync(table)
        number = F.regexp_extract("reject_reason", f"^{MOVING}", 1).alias("number")
        marked = self.quarantine.groupBy(number).count().where("number <> ''").collect()
        for row in marked:
            if not self._is_appended(int(row.number)):
                self._prevent(int(row.number))
            if self._is_appended(int(row.number)):
                self._delete(int(row.number))
            else:
                self._set_reason(f"startswith(reject_reason, '{_mark(row.number)}')", _unmarked(row.number))
        return sum(row["count"] for row in marked)

    def _require_intact(self, table: str) -> None:
        """Raises PipelineError if the stream has to write its last batch again, after a crash or a power cut."""
        _, damage = Commits(self.spark, table, newest_state(self.spark, table)[1]).damage()
        writer = (properties_of(self.spark, self.tables.table) or {}).get(WRITER)
        written, rejected = (
            version_and_last_batch(self.spark, each, writer)[1] for each in (self.tables.table, self.tables.quarantine)
        )
        if damage or rejected > written:
            problem = damage or "its quarantine has a batch that the table lacks"
            raise PipelineError(
                f"The table {table} is incomplete, perhaps after a power cut: {problem}. First start its stream, which repairs "
                f"the table or says what to do."
            )

    def parts(self) -> list[str]:
        """Divides the selected rows into parts. Returns an SQL condition for each."""
        figures = F.count("*").alias("rows"), F.sum(F.coalesce(F.octet_length("raw"), F.lit(0))).alias("size")
        batches = self.quarantine.where(self.selected).groupBy(F.unix_micros("ingest_time").alias("time"))
        parts: list[list[int]] = []  # first time, last time, rows, bytes
        for time, rows, size in batches.agg(*figures).sort("time").collect():
            if parts and parts[-1][2] + rows <= MAX_PART_ROWS and parts[-1][3] + size <= MAX_PART_BYTES:
                parts[-1] = [parts[-1][0], time, parts[-1][2] + rows, parts[-1][3] + size]
            else:
                parts.append([time, time, rows, size])
        conditions = []
        for first, last, rows, size in parts:
            slices = max(1, -(-rows // MAX_PART_ROWS), -(-size // MAX_PART_BYTES))  # of a large batch
            conditions += [
                f"ingest_time BETWEEN timestamp_micros({first}) AND timestamp_micros({last}) "
                f"AND pmod(xxhash64(raw), {slices}) = {number}"
                for number in range(slices)
            ]
        return conditions

    def judge(self, rows: DataFrame) -> DataFrame:
        """Judges rows of the quarantine. Returns their readings: the columns of `parse`, and BEFORE, the former reject_reason. They
        are judged only once, and the result is kept on disk.

        BEFORE is null for a reading that was originally accepted and is returned only because it carries the `raw` of its message.
        """
        records = rows.withColumnRenamed("reject_reason", BEFORE)
        if "raw_json" in self.tables.columns:
            records = records.withColumn("raw_json", F.expr(json_sql("raw")))
        if self.tables.has_elements:
            elements = F.col("elements") if "elements" in rows.columns else F.lit(None).cast("array<int>")
            records = records.withColumns({LISTED: elements, IS_PART: elements.isNotNull()}).drop("elements")
        with code_generation(self.spark):
            # A cache would hold a batch of rows in memory.
            cores = self.spark.sparkContext.defaultParallelism
            judged = parse(records.coalesce(cores), self.contract).localCheckpoint(storageLevel=StorageLevel.DISK_ONLY)
            if self.tables.has_elements:
                judged = _without_accepted(judged).localCheckpoint(storageLevel=StorageLevel.DISK_ONLY)
        if not self.contract.key:
            return judged
        table = self.spark.read.format("delta").load(self.tables.table)
        there = {name.lower() for name in table.columns}
        new = {
            name: F.lit(None).cast(kind) for name, kind in self.contract.columns.items() if name.lower() not in there
        }
        return mark_duplicates(judged, self.contract, table.withColumns(new))

    def move(self, part: str) -> Counter[Verdict]:
        """Moves the valid readings of a part to the table. Returns the number of readings with each verdict."""
        condition = f"{self.selected} AND {part}"
        verdicts = counted(self.judge(self.quarantine.where(condition)))
        free_checkpoints(self.spark)
        if all(verdict.before == verdict.now for verdict in verdicts):
            return verdicts
        add_missing_columns(self.spark, self.tables.table, self.tables.columns)
        add_missing_columns(self.spark, self.tables.quarantine, self.tables.quarantine_columns)
        number = self._last_transaction() // 2 + 1
        is_marked = f"startswith(reject_reason, '{_mark(number)}')"
        self._set_reason(condition, F.concat(F.lit(_mark(number)), "reject_reason"))
        judged = self.judge(self.quarantine.where(is_marked).withColumn("reject_reason", _unmarked(number)))
        verdicts = counted(judged)
        if any(verdict.now for verdict in verdicts):
            reason = F.coalesce("reject_reason", F.concat(F.lit(_mark(number)), BEFORE))
            rows = judged.withColumn("reject_reason", F.when(F.col(BEFORE).isNotNull(), reason))
            with_retries(
                lambda: (
                    self._as_rejected(rows)
                    .write.format("delta")
                    .mode("overwrite")
                    .option("replaceWhere", is_marked)
                    .save(self.tables.quarantine)
                )
            )
            self._sync(self.tables.quarantine)
        if not all(verdict.now for verdict in verdicts):
            valid = judged.where(F.col(BEFORE).isNotNull() & F.col("reject_reason").isNull())
            with_retries(
                lambda: (
                    valid.select(*(f"`{column}`" for column in self.tables.columns))
                    .write.format("delta")
                    .mode("append")
                    .options(txnAppId=REPLAY, txnVersion=2 * number)
                    .save(self.tables.table)
                )
            )
            self._sync(self.tables.table)
            self._delete(number)
        free_checkpoints(self.spark)
        return verdicts

    def _as_rejected(self, rows: DataFrame) -> DataFrame:
        """The rejected or marked rows, with the quarantine's columns."""
        columns = [*self.tables.quarantine_columns]
        if not self.tables.has_elements:
            return rows.select(*columns)
        # Even if a message is now rejected as a whole, its accepted readings are still in the table.
        found = by_record(rows, [*columns, LISTED])
        return found.withColumn("elements", F.coalesce("elements", LISTED)).select(*columns)

    def _set_reason(self, condition: str, reason: Column) -> None:
        quarantine = DeltaTable.forPath(self.spark, self.tables.quarantine)
        with_retries(lambda: quarantine.update(condition, {"reject_reason": reason}))
        self._sync(self.tables.quarantine)

    def _delete(self, number: int) -> None:
        quarantine = DeltaTable.forPath(self.spark, self.tables.quarantine)
        with_retries(lambda: quarantine.delete(f"startswith(reject_reason, '{_mark(number)}')"))
        self._sync(self.tables.quarantine)

    def _last_transaction(self) -> int:
        """The number of the last replay transaction in the table; -1 if there is none."""
        newest_state(self.spark, self.tables.table)  # brings Delta's view of the table up to date
        return version_and_last_batch(self.spark, self.tables.table, REPLAY)[1]

    def _is_appended(self, number: int) -> bool:
        # No later part begins until this one is finished, so its transaction is the last.
        return self._last_transaction() == 2 * number

    def _prevent(self, number: int) -> None:
        """Makes sure that the rows with this mark can no longer be appended to the table, unless they already were."""
        rows = self.spark.read.format("delta").load(self.tables.table).limit(0)
        with suppress(ConcurrentTransactionException):  # they have just been appended
            (
                rows.write.format("delta")
                .mode("append")
                .options(txnAppId=REPLAY, txnVersion=2 * number + 1)
                .save(self.tables.table)
            )
        self._sync(self.tables.table)

    def _sync(self, table: str) -> None:
        """Syncs the newest commits of a table to the disk."""
        newest = newest_state(self.spark, table)[1]
        first = self.synced.get(table, newest - NEWEST_COMMITS) + 1
        sync_commits(self.spark, table, range(max(0, first), newest + 1))
        self.synced[table] = newest


def counted(judged: DataFrame) -> Counter[Verdict]:
    """The number of readings with each verdict, from the result of `Replay.judge`."""
    verdicts = judged.where(F.col(BEFORE).isNotNull()).groupBy(BEFORE, "reject_reason").count().collect()
    return Counter({Verdict(before, now): count for before, now, count in verdicts})


def _mark(number: int | str) -> str:
    return f"replay {number}: "  # MOVING


def _unmarked(number: int | str) -> Column:
    """The former reject_reason of a marked row."""
    return F.expr(f"substring(reject_reason, {len(_mark(number)) + 1})")


def _without_accepted(judged: DataFrame) -> DataFrame:
    """Drops the originally accepted readings, which the quarantine does not list. One that carries the `raw` of its message stays, with
    a null BEFORE.
    """
    lists = judged.where(F.col(LISTED).isNotNull()).select("_record", F.explode(LISTED).alias("element"))
    rows = judged.join(lists.withColumn("@match", F.lit(True)), ["_record", "element"], "left")
    was_rejected = F.expr(f"NOT `{IS_PART}` OR `@match` OR element IS NULL")
    # An accepted reading stays where it is, whatever the contract says about it now.
    reason = F.when(was_rejected, F.col("reject_reason")).otherwise("accepted")
    rows = rows.withColumns({BEFORE: F.when(was_rejected, F.col(BEFORE)), "reject_reason": reason})
    rows = rows.where(F.col(BEFORE).isNotNull() | F.col("raw").isNotNull()).drop("@match")
    # The contract may now name a different, shorter array. Listed readings that this array lacks stay as they are.
    gone = lists.join(judged, ["_record", "element"], "left_anti")
    gone = gone.join(judged.where("element IS NULL"), "_record", "left_anti")
    messages = judged.where("raw IS NOT NULL").drop("element", "raw").withColumn("reject_reason", F.col(BEFORE))
    return rows.unionByName(gone.join(messages, "_record"), allowMissingColumns=True)
