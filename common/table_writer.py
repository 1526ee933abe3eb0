"""Writing a micro-batch of a stream: each record into a table or its quarantine, exactly once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from delta.tables import DeltaTable
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, first_line, root_cause, warn
from common.contract import Contract
from common.internals import from_java_rows, number_of_tasks, observed, state_of
from common.parsing import parse
from common.source import Source
from common.tables import WRITER, TablePair, as_identifier, clean_up, create_table

SMALL_BATCH = 10  # tasks to read it, up to which a batch becomes one file; above that, one file per core
# Rejected records that are kept in memory while a batch is written, by all cores together: so many, of so many bytes at
# most. Where there are more, the batch is read again for them.
MOST_KEPT = 200_000
LONGEST_KEPT = 500
CLEAN_UP_AFTER = 1000  # batches, which are half an hour of the default trigger
SEEN_WITHIN = 60  # seconds after a batch was written


@dataclass(frozen=True)
class Start:
    """What was found at the start of a stream, as properties of its tables: the `identity` of its source, and by what it is
    `read_by`."""
    identity: dict[str, str]
    read_by: dict[str, str]


class BatchReport(NamedTuple):
    """What became of a batch: rows by reject_reason (None: accepted), how many of those accepted had fields that the contract
    does not name, and which, and the newest of their times (microseconds since 1970; None without one)."""
    rows: dict[str | None, int]
    with_unknown: int
    unknown: list[str]
    newest: int | None


class Unwatched:
    """Metrics that nobody asks for; common/metrics.py has the others, and needs a library for them."""

    def working(self, works: bool) -> None:
        """Whether the query runs."""

    def batch(self, report: BatchReport, progress: dict[str, Any], lag: dict[int, int]) -> None:
        """A batch with records, of which Spark reports `progress`; `lag`: records left to read, by partition."""


class TableWriter:
    """Writes each micro-batch of `source` to `tables`, by the contract: every record to one of the two, exactly once."""

    def __init__(self, tables: TablePair, contract: Contract, source: Source, start: Start):
        self.tables, self.contract, self.source, self.start = tables, contract, source, start
        self.appended_to: set[str] = set()  # those of the two tables that this process has written to

    def write(self, batch: DataFrame, batch_id: int, stream: str) -> BatchReport:
        """Writes one batch of the query with the id `stream`."""
        spark, tables = batch.sparkSession, self.tables
        if batch_id == 0:
            owner = {WRITER: stream} | self.start.identity
            create_table(spark, tables.quarantine, tables.quarantine_columns, owner)
            # Last: as long as it is not this stream's, nothing was written.
            create_table(spark, tables.table, tables.columns, owner | self.start.read_by)
        version, _ = state_of(spark, tables.table, stream)
        try:
            report, rejected = self._write_accepted(self.source.read_batch(batch), batch_id, stream)
        except (PySparkException, Py4JJavaError) as error:
            report, rejected = self._write_accepted(self.source.read_again(batch, error), batch_id, stream)
        # If the source is still the same, all of these records are from it. No identity (deleted, or no right to ask) is no other one.
        if (identity := self.source.identity()) and self.start.identity and identity != self.start.identity:
            spark.sql(f"RESTORE TABLE {as_identifier(tables.table)} TO VERSION AS OF {version}")
            raise PipelineError(f"While it was read, somebody deleted and recreated {self.source}. What this batch had read was "
                                f"taken back. Start again: the start says what is lost.")
        if reasons := {reason for reason in report.rows if reason}:
            self._append(rejected, tables.quarantine, tables.quarantine_columns, batch_id, stream)
        self.source.after_batch(batch, reasons, tables.quarantine)
        if batch_id % CLEAN_UP_AFTER == CLEAN_UP_AFTER - 1:
            for table in (tables.quarantine, tables.table):
                try:
                    clean_up(spark, table)
                except (PySparkException, Py4JJavaError) as error:  # the records are there; the next thousand batches try again
                    warn(f"Old files of {table} can't be removed: {first_line(root_cause(error))}")
        # Delta would work this out as the next batch begins; now the records of this one are already visible.
        for table in (tables.table, tables.quarantine):
            state_of(spark, table, stream)
        return report

    def _write_accepted(self, records: DataFrame, batch_id: int, stream: str) -> tuple[BatchReport, DataFrame]:
        """Appends the valid ones of `records` to the table, unless the batch is there already.

        Returns the report, and the rejected ones as the quarantine takes them. One pass over the records finds all of that:
        what is rejected is little as a rule, and kept in memory.
        """
        spark = records.sparkSession
        cores = spark.sparkContext.defaultParallelism
        parsed = parse(records.coalesce(1 if number_of_tasks(records) <= SMALL_BATCH else cores), self.contract)
        is_rejected = F.col("reject_reason").isNotNull()
        rejected = parsed.where(is_rejected).select(*self.tables.quarantine_columns)
        seen = Observation()
        accepted = parsed.observe(seen, *self._figures(is_rejected, most_kept=min(100_000, MOST_KEPT // cores))).where(~is_rejected)
        with _code_generation(spark):
            if batch_id <= state_of(spark, self.tables.table, stream)[1]:  # it was written before a crash
                accepted.write.format("noop").mode("overwrite").save()
            else:
                self._append(accepted, self.tables.table, self.tables.columns, batch_id, stream)
        found = observed(spark, seen, SEEN_WITHIN)
        if found is None:  # Delta skips a batch that another stream with this checkpoint has just written
            raise PipelineError("A concurrent stream has written the batch.")
        if found.length() == 0:  # Spark has seen in the plan that it accepts nothing, and left out what observes it
            return BatchReport(dict(map(tuple, parsed.groupBy("reject_reason").count().collect())), 0, [], None), rejected
        rows, unknown = ({row.get(0): row.get(1) for row in found.getList(number)} for number in (0, 1))
        kept = found.getList(3)  # None for none
        if kept and len(kept) == sum(count for reason, count in rows.items() if reason):
            rejected = from_java_rows(spark, kept, rejected).coalesce(1)
        names = sorted({name for several in unknown if several for name in json.loads(several)})
        return BatchReport(rows, found.get(2), names, found.get(4)), rejected

    def _figures(self, is_rejected: Column, most_kept: int) -> Iterator[Column]:
        """What is observed of a batch: the values of a BatchReport, and as `kept` the rejected records as the quarantine takes them,
        if they are not too many or too long. `most_kept`: of each task, at most 100,000, which is Spark's limit."""
        has_unknown = ~is_rejected & (F.size("_unknown_fields") > 0)
        names = F.transform(F.slice("_unknown_fields", 1, 20), lambda name: F.left(name, F.lit(50)))
        columns = self.tables.quarantine_columns
        binary = [F.coalesce(F.octet_length(name), F.lit(0)) for name, kind in columns.items() if kind == "BINARY"]
        is_kept = is_rejected & (sum(binary, F.lit(0)) <= LONGEST_KEPT)
        # Exact for so few reasons; it counts null too, and takes less time than a count for each.
        yield F.call_function("approx_top_k", F.col("reject_reason"), F.lit(700), F.lit(1000)).alias("rows")
        yield F.call_function("approx_top_k", F.when(has_unknown, F.to_json(names)), F.lit(100), F.lit(1000)).alias("unknown")
        yield F.count_if(has_unknown).alias("with_unknown")
        yield F.max_by(F.struct(*columns), F.when(is_kept, 1), most_kept).alias("kept")
        # One whose clock is ahead is no newer than its arrival.
        yield F.max(F.when(~is_rejected, F.unix_micros(F.least(f"`{self.contract.time}`", "ingest_time")))).alias("newest")

    def _append(self, records: DataFrame, table: str, columns: dict[str, str], batch_id: int, stream: str) -> None:
        """Appends `records` to `table`, unless its log says that this stream's batch is there: a batch repeated after a
        crash. Raises PipelineError if the table is gone, which Delta would make anew without a word."""
        if not DeltaTable.isDeltaTable(records.sparkSession, table):
            raise PipelineError(f"Somebody has deleted the table {table} while the stream ran. Put it back and start again: the start "
                                f"says what is missing.")
        # Delta counts the small files that this process writes. It merges those of earlier ones at the first commit, which
        # takes the count below zero: by default it then merges at each commit, until the files are a large one.
        records.sparkSession.conf.set("spark.databricks.delta.autoCompact.modifiedPartitionsOnly.enabled",
                                      table not in self.appended_to)
        self.appended_to.add(table)
        (records.select(*(f"`{column}`" for column in columns)).write.format("delta").mode("append")
         .options(txnAppId=stream, txnVersion=batch_id).save(table))


@contextmanager
def _code_generation(spark: SparkSession) -> Iterator[None]:
    """Generates code for all that is run meanwhile, as is Spark's default."""
    setting = "spark.sql.codegen.factoryMode"
    usual = spark.conf.get(setting) or "FALLBACK"
    spark.conf.set(setting, "FALLBACK")
    try:
        yield
    finally:
        spark.conf.set(setting, usual)
