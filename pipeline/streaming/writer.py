"""Writing a micro-batch: every record to the table or to its quarantine, exactly once."""

import json
import os
from contextlib import suppress
from typing import Any, NamedTuple

from pipeline.contract.contract import Contract
from pipeline.contract.elements import by_record
from pipeline.contract.judge import parse
from pipeline.delta.commits import AGAIN, NEWEST_COMMITS, Commits, contents_note, sync_commits
from pipeline.delta.duplicates import mark_duplicates
from pipeline.delta.private import compact_own_files, newest_state, version_and_last_batch
from pipeline.delta.tables import WRITER, TablePair, clean_up, create_table, history_of, rows_at
from pipeline.paths import local_path
from pipeline.spark.private import (
    OBSERVATION_SECONDS,
    SPARK_ERRORS,
    code_generation,
    dataframe_of,
    free_checkpoints,
    observed,
)
from pipeline.streaming.source import Backlog, Source
from pipeline.streaming.start import Start, in_use_message, require_same_contents
from pipeline.terminal.errors import PipelineError, first_line, root_cause
from pipeline.terminal.messages import warn

from delta.tables import DeltaTable
from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

# Rejected records kept in memory while a batch is written: their maximum number, on all cores together, and the maximum
# bytes of each. If there are more, the batch is read again for them.
MAX_KEPT_ROWS = 200_000
MAX_KEPT_BYTES = 500
CLEAN_UP_EVERY = 1000  # batches; half an hour with the default trigger


class BatchReport(NamedTuple):
    """The outcome of a batch.

    `rows`: row counts by reject_reason (None: accepted). `with_unknown`: accepted records with fields outside the contract;
    `unknown`: the names of those fields. `newest`: the latest of the records' times (microseconds since 1970), None if there
    is none. `last_records`: the source's observation of the last records.
    """

    rows: dict[str | None, int]
    with_unknown: int
    unknown: list[str]
    newest: int | None
    last_records: str | None = None


class Batch(NamedTuple):
    """A micro-batch of the query whose id is `stream`. `contents`: the source's description of its records. `end`: where it ends,
    in the source's format.
    """

    stream: str
    number: int
    contents: dict[str, Any]
    end: dict[str, Any]


class NoMetrics:
    """No-op metrics, used without `--metrics-port`. pipeline/streaming/metrics.py has the real ones, which need a library."""

    def working(self, works: bool) -> None:
        """Records whether the query is running; called twice a second while it answers."""

    def batch(self, report: BatchReport, progress: dict[str, Any], left: Backlog | None) -> None:
        """Records a batch for which Spark reports `progress`. `left`: the backlog after it."""


class TableWriter:
    """Writes the micro-batches of `source` to `tables`, as the contract decides: every record to one of the two, exactly once."""

    def __init__(self, tables: TablePair, contract: Contract, source: Source, start: Start):
        self.tables, self.contract, self.source, self.start = tables, contract, source, start
        # The tables that this process has written to, each with an identification of its log if it is on a local disk.
        self.appended_to: dict[str, tuple[int, int] | None] = {}
        self.synced: dict[str, int] = {}  # the version up to which "table" and "quarantine" are synced to the disk

    def write(self, batch: DataFrame, number: int, stream: str) -> BatchReport:
        """Writes the batch with this number of the query whose id is `stream`."""
        this = self._begin(batch, number, stream)

        def write(records: DataFrame) -> BatchReport:
            judged = self._judge(records, this)
            found = self._append_valid(judged, this)
            self._quarantine_rejected(judged, found, this)
            return self._report(judged, found)

        try:
            report = write(self.source.read_batch(batch))
        except SPARK_ERRORS as error:  # Spark reads a batch only while it is written
            report = write(self.source.read_again(batch, error))
        self._finish(batch, report, this)
        return report

    def _begin(self, batch: DataFrame, number: int, stream: str) -> Batch:
        """Creates the tables before the first batch. Raises PipelineError if another batch was written under this number."""
        spark, tables, checkpoint = batch.sparkSession, self.tables, self.start.checkpoint
        end = checkpoint.end_of(number)
        checkpoint.sync(number, end)
        if number == 0:
            properties = {WRITER: stream} | self.start.identity | history_of(tables.keep_history)
            create_table(spark, tables.quarantine, tables.quarantine_columns, properties)
            # Created last, so that nothing counts as written until this table names the stream.
            create_table(spark, tables.table, tables.columns, properties | self.start.read_by | self.source.notes)
            checkpoint.write_last_batch({"versions": self._synced_versions(spark, stream)})
        contents = self.source.contents(batch, end)
        version, last_batch = version_and_last_batch(spark, tables.table, stream)
        if number <= last_batch:
            require_same_contents(Commits(spark, tables.table, version), checkpoint, number, contents)
        return Batch(stream, number, contents, end)

    def _judge(self, records: DataFrame, this: Batch) -> DataFrame:
        cores = records.sparkSession.sparkContext.defaultParallelism
        judged = parse(records.coalesce(1 if self.source.is_small(records) else cores), self.contract)
        return self._mark_duplicates(judged, this) if self.contract.key else judged

    def _mark_duplicates(self, judged: DataFrame, this: Batch) -> DataFrame:
        spark, table = judged.sparkSession, self.tables.table
        newest_state(
            spark, table
        )  # Delta may take its view for up to date after the clock was set back, and miss a replay
        version, last_batch = version_and_last_batch(spark, table, this.stream)
        now = spark.read.format("delta").load(table)
        if this.number > last_batch:
            return mark_duplicates(judged, self.contract, now)
        # The batch is in the table already, and must not be compared with itself.
        written = Commits(spark, table, version).version_of(this.stream, this.number)
        with suppress(*SPARK_ERRORS):
            if written is not None:
                return mark_duplicates(judged, self.contract, rows_at(spark, table, written - 1))
        # That version is gone. Leave out the batch's own rows: all rows of a batch have the same ingest_time.
        own = judged.select("ingest_time").distinct()
        return mark_duplicates(judged, self.contract, now.join(own, "ingest_time", "left_anti"))

    def _synced_versions(self, spark: SparkSession, stream: str) -> dict[str, int]:
        """Returns the versions of both tables after syncing them to the disk."""
        for role, table in (("table", self.tables.table), ("quarantine", self.tables.quarantine)):
            version, _ = version_and_last_batch(spark, table, stream)
            # An earlier process may have been killed before it got here.
            first = self.synced.get(role, version - NEWEST_COMMITS) + 1
            sync_commits(spark, table, range(max(0, first), version + 1))
            if version < self.synced.get(role, -1):
                raise PipelineError(replaced_message(table))
            self.synced[role] = version
        return self.synced

    def _clean_up(self, spark: SparkSession) -> None:
        for table in (self.tables.quarantine, self.tables.table):
            try:
                clean_up(spark, table)
            except SPARK_ERRORS as error:
                # The records are written; the clean-up is tried again after the next thousand batches.
                warn(f"Old files of {table} can't be removed: {first_line(root_cause(error))}")

    def _append_valid(self, judged: DataFrame, this: Batch) -> dict[str, Any]:
        """Appends the valid records to the table, unless the batch is already there. Returns the figures of this read (see
        `_observed`), and, as `in_table`, the number of the batch's records in the table and their fingerprint.

        A single pass over the records does all of this: normally, few records are rejected, and those are kept in memory.
        """
        spark = judged.sparkSession
        cores = spark.sparkContext.defaultParallelism
        # A record with rejected elements becomes a row of the quarantine for each reason, which takes a second read.
        kept_by_task = 0 if self.tables.has_elements else min(100_000, MAX_KEPT_ROWS // cores)
        rows, seen = self._observed(judged, kept_by_task)
        # The batch was written before a crash.
        is_repeated = this.number <= version_and_last_batch(spark, self.tables.table, this.stream)[1]
        with code_generation(spark):
            if is_repeated:
                rows.where(_is_valid()).write.format("noop").mode("overwrite").save()
            else:
                self._append(rows.where(_is_valid()), self.tables.table, self.tables.columns, this)
        found = observed(spark, seen, OBSERVATION_SECONDS)
        if found is None:  # Delta skips a batch that another stream with this checkpoint has just written
            raise PipelineError(
                f"{in_use_message(self.start.checkpoint.path)} If there is none, Spark is too slow to report its figures: "
                f"start again."
            )
        if not found:  # Spark saw in the plan that nothing is accepted, and dropped the observation
            everything, seen = self._observed(judged)
            everything.write.format("noop").mode("overwrite").save()
            found = observed(spark, seen, OBSERVATION_SECONDS) or {}
        version, _ = version_and_last_batch(spark, self.tables.table, this.stream)
        # Rows that somebody has deleted or replayed since then must not look as if a second read had rejected them.
        is_rejected = version_and_last_batch(spark, self.tables.quarantine, this.stream)[1] >= this.number
        is_compared = is_repeated and not Commits(spark, self.tables.table, version).has_changed_rows_since(
            this.stream, this.number, by_replay=is_rejected
        )
        in_table: tuple[int, ...] = found["accepted"], found["fingerprint"]
        if is_compared:
            rows = self._written(spark, self.tables.table, found)
            [in_table] = rows.agg(F.count("*"), self._fingerprint(F.lit(True))).collect()
        return found | {"in_table": in_table}

    def _written(self, spark: SparkSession, table: str, found: dict[str, Any]) -> DataFrame:
        """The batch's rows in a table: their origin and, in the quarantine, their reject_reason."""
        rows = spark.read.format("delta").load(table)
        if self.tables.has_elements and table == self.tables.quarantine:
            rows = rows.withColumn("element", F.explode_outer("elements"))
        columns = [name for name in (*self.tables.origin, "reject_reason") if name in rows.columns]
        return rows.where(F.col("ingest_time") == F.timestamp_micros(F.lit(found["arrival"]))).select(*columns)

    def _quarantine_rejected(self, judged: DataFrame, found: dict[str, Any], this: Batch) -> None:
        """Appends the rejected records to the quarantine, unless the batch is already there."""
        again = f"{this.stream}{AGAIN}"
        if version_and_last_batch(judged.sparkSession, self.tables.quarantine, again)[1] == this.number:
            return  # an earlier read differed, and everything the table lacked was quarantined then
        rejected = self._rejected(judged, found)
        self.source.require_unchanged(judged.sparkSession, self.start.identity)
        if rejected is not None:
            has_changed, rows = rejected
            # The quarantine may already have the batch from an earlier read.
            this = this._replace(stream=again) if has_changed else this
            self._append(rows, self.tables.quarantine, self.tables.quarantine_columns, this)

    def _rejected(self, judged: DataFrame, found: dict[str, Any]) -> tuple[bool, DataFrame] | None:
        """Returns whether the rejected records differ from those of an earlier read, and the records with the quarantine's
        columns; None if there are none. `found`: the result of `_append_valid`.
        """
        is_same = (found["accepted"], found["fingerprint"]) == found["in_table"]
        if is_same and not found["rejected"]:
            return None
        if is_same and found["kept"] and len(found["kept"]) == found["rejected"]:
            return False, dataframe_of(judged.sparkSession, found["kept"], self._as_rejected(judged)).coalesce(1)
        # The records are judged again. This must not rely on reaching the same verdicts: otherwise, a record could end
        # up in both tables, or in none.
        again, seen = self._observed(judged)
        with code_generation(judged.sparkSession):
            # A cache would hold a batch of rows in memory.
            rejected = self._as_rejected(again).localCheckpoint(storageLevel=StorageLevel.DISK_ONLY)
        figures = observed(judged.sparkSession, seen, OBSERVATION_SECONDS) or {}
        if (figures.get("accepted"), figures.get("fingerprint")) == found["in_table"]:
            return False, rejected
        written = [
            self._written(judged.sparkSession, table, found) for table in (self.tables.table, self.tables.quarantine)
        ]
        rows = self.source.rejected_otherwise(judged, written[0].unionByName(written[1], allowMissingColumns=True))
        rows = self._as_rejected(rows)
        if self.tables.has_elements and self.source.knows_records:  # the first row of a record may have been left out
            raws = judged.where("raw IS NOT NULL").select("partition", "offset", "raw")
            rows = rows.drop("raw").join(raws, ["partition", "offset"], "left")
        return self.source.knows_records, rows.select(*self.tables.quarantine_columns)

    def _as_rejected(self, judged: DataFrame) -> DataFrame:
        """The rejected records, with the quarantine's columns."""
        columns = self.tables.quarantine_columns
        return by_record(judged, columns) if self.tables.has_elements else judged.where(~_is_valid()).select(*columns)

    def _observed(self, judged: DataFrame, kept_by_task: int = 0) -> tuple[DataFrame, Observation]:
        """Returns the judged records and the observation that collects their figures during one read (see `observed`).

        `kept_by_task`: the maximum number of rejected records kept per task, at most 100,000 (Spark's limit).
        """
        is_valid = _is_valid()
        has_unknown = is_valid & (F.size("_unknown_fields") > 0)
        names = F.transform(F.slice("_unknown_fields", 1, 20), lambda name: F.left(name, F.lit(50)))
        columns = self.tables.quarantine_columns
        is_record = F.expr("coalesce(element, 0) = 0" if self.tables.has_elements else "true")
        texts = [name for name, kind in columns.items() if kind in ("BINARY", "STRING")]
        sizes = [F.coalesce(F.octet_length(name), F.lit(0)) for name in texts]
        is_kept = ~is_valid & (sum(sizes, F.lit(0)) <= MAX_KEPT_BYTES)
        figures = {
            "accepted": F.count_if(is_valid),
            "rejected": F.count_if(~is_valid),
            "fingerprint": self._fingerprint(is_valid),
            "arrival": F.max(F.unix_micros("ingest_time")),
            # Takes less time than a count for each reason, and is exact for up to 700 reasons.
            "reasons": F.call_function("approx_top_k", F.col("reject_reason"), F.lit(700), F.lit(1000)),
            "unknown": F.call_function("approx_top_k", F.when(has_unknown, F.to_json(names)), F.lit(100), F.lit(1000)),
            "with_unknown": F.count_if(has_unknown),
            "kept": F.max_by(F.struct(*columns), F.when(is_kept, 1), kept_by_task) if kept_by_task else F.lit(None),
            # A time in the future does not count as newer than the record's arrival.
            "newest": F.max(F.when(is_valid, F.unix_micros(F.least(f"`{self.contract.time}`", "ingest_time")))),
            "last_records": F.lit(None) if (last := self.source.last_records(is_record)) is None else last,
        }
        seen = Observation()
        return judged.observe(seen, *(figure.alias(name) for name, figure in figures.items())), seen

    def _fingerprint(self, is_valid: Column) -> Column:
        """An aggregate whose value depends on which records are valid, by their origin."""
        return F.coalesce(F.sum(F.when(is_valid, F.xxhash64(*self.tables.origin))), F.lit(0))

    def _report(self, judged: DataFrame, found: dict[str, Any]) -> BatchReport:
        rows = {row.get(0): row.get(1) for row in found["reasons"]}
        if sum(rows.values()) != found["accepted"] + found["rejected"]:  # there are too many reasons for approx_top_k
            rows = dict(map(tuple, judged.groupBy("reject_reason").count().collect()))
        unknown = {name for row in found["unknown"] if row.get(0) for name in json.loads(row.get(0))}
        return BatchReport(rows, found["with_unknown"], sorted(unknown), found["newest"], found["last_records"])

    def _finish(self, batch: DataFrame, report: BatchReport, this: Batch) -> None:
        """Notes the batch in the checkpoint, and now and then removes old files."""
        spark = batch.sparkSession
        free_checkpoints(spark)
        self.source.after_batch(batch, {reason for reason in report.rows if reason}, self.tables.quarantine)
        # Delta would otherwise work the versions out when the next batch begins; here, the records of this batch are
        # already visible.
        self.start.checkpoint.write_last_batch(
            {
                "batch": this.number,
                "end": this.end,
                "contents": this.contents,
                "versions": self._synced_versions(spark, this.stream),
                "last_records": self.source.remember(spark, report.last_records),
            }
        )
        if this.number % CLEAN_UP_EVERY == CLEAN_UP_EVERY - 1:
            self._clean_up(spark)  # after the replacements of the old files are synced to the disk

    def _append(self, records: DataFrame, table: str, columns: dict[str, str], this: Batch) -> None:
        """Appends `records` to `table`, with the batch's contents in the commit. Does nothing if the table's log shows that
        this stream wrote the batch before a crash.

        Raises PipelineError if the table is gone; Delta would silently create it again.
        """
        if not DeltaTable.isDeltaTable(records.sparkSession, table):
            raise PipelineError(
                f"Somebody deleted the table {table} while the stream was running. Put it back and start again: the "
                "next start names any missing batches."
            )
        compact_own_files(records.sparkSession, is_first_commit=table not in self.appended_to)
        log = os.stat(f"{local}/_delta_log") if (local := local_path(table)) else None
        identification = log and (log.st_dev, log.st_ino)
        if self.appended_to.setdefault(table, identification) != identification:
            raise PipelineError(replaced_message(table))
        (
            records.select(*(f"`{column}`" for column in columns))
            .write.format("delta")
            .mode("append")
            .options(txnAppId=this.stream, txnVersion=this.number, userMetadata=contents_note(*this[:3]))
            .save(table)
        )


def replaced_message(table: str) -> str:
    return (
        f"While the stream was running, another table took the place of {table}; perhaps a disk was mounted or a backup "
        f"was restored. Start again to see whether table and checkpoint belong together."
    )


def _is_valid() -> Column:
    return F.col("reject_reason").isNull()
