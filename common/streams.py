"""Running a stream: each micro-batch into a table and its quarantine exactly once, a clean stop, a line per batch."""

import argparse
import json
import re
import signal
import threading
import time
from collections.abc import Callable

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException, StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming import StreamingQuery
from pyspark.sql.types import StructType

from common.console import PipelineError, location, root_cause, say
from common.readings import with_reject_reason
from common.tables import create_table, quarantine_of, writer_of


def add_stream_options(parser: argparse.ArgumentParser, table: str, checkpoint: str, trigger: str) -> None:
    """The options that both streams have: --table, --checkpoint, --trigger, --once, --verbose."""
    parser.add_argument("--table", type=location, default=table,
                        help="Delta table to append to; rejected records go to TABLE_quarantine")
    parser.add_argument("--checkpoint", type=location, default=checkpoint,
                        help="where the stream remembers what it has read; belongs to the table")
    parser.add_argument("--trigger", type=_interval, default=trigger, metavar='"N seconds"',
                        help='how often a batch starts; "0 seconds": as soon as the last one is done')
    parser.add_argument("--once", action="store_true", help="process what is there now, then exit")
    parser.add_argument("--verbose", action="store_true", help="show Spark's own log and the traceback of an error")


def _interval(value: str) -> str:
    if not re.fullmatch(r"\d+ (millisecond|second|minute|hour)s?", value):
        raise argparse.ArgumentTypeError(f'{value!r} is not an interval such as "5 seconds" or "1 minute"')
    return value


class Stopped(Exception):
    """Ends a query between two batches."""


class TableWriter:
    """Writes each micro-batch of a stream to `table` and its quarantine: every record to one of them, exactly once.

    `columns`, `quarantine_columns`: DDL of the two tables; `raw_json` is the text of an accepted record.
    `read_records(batch, careful)`: makes of a micro-batch its records, the columns that `with_reject_reason` takes and
    the tables' own. A repeated batch gives the same records. `careful` is true where reading them has failed before.
    """

    def __init__(self, table: str, columns: str, quarantine_columns: str,
                 read_records: Callable[[DataFrame, bool], DataFrame]):
        self.table, self.columns = table, columns
        self.quarantine, self.quarantine_columns = quarantine_of(table), quarantine_columns
        self.read_records = read_records
        self.checkpoint_id: str | None = None  # known once the query has started
        self.lock = threading.Lock()  # held while a batch is written
        self.stopping = threading.Event()
        self.counts: dict[int, dict[str | None, int]] = {}  # rows by reject_reason (None: accepted) of a written batch
        self.error: Exception | None = None

    def __call__(self, batch: DataFrame, batch_id: int) -> None:
        with self.lock:
            try:
                if self.stopping.is_set():
                    raise Stopped  # before anything of this batch was written; the next start repeats it
                self._write(batch, batch_id)
            except Exception as error:
                self.error = error
                raise

    def _write(self, batch: DataFrame, batch_id: int) -> None:
        if batch_id == 0:
            create_table(batch.sparkSession, self.quarantine, self.quarantine_columns, self.checkpoint_id)
            create_table(batch.sparkSession, self.table, self.columns, self.checkpoint_id)
        records = with_reject_reason(self.read_records(batch, careful=False)).persist()
        try:
            try:
                counts = _count(records)
            except (PySparkException, Py4JJavaError):
                records.unpersist()
                records = with_reject_reason(self.read_records(batch, careful=True)).persist()
                counts = _count(records)
            if counts.keys() - {None}:
                self._append(records.where("reject_reason IS NOT NULL"), self.quarantine, self.quarantine_columns, batch_id)
            if None in counts:
                accepted = records.where("reject_reason IS NULL").withColumn("raw_json", F.col("raw").cast("string"))
                self._append(accepted, self.table, self.columns, batch_id)
        finally:
            records.unpersist()
        self.counts[batch_id] = counts

    def _append(self, records: DataFrame, table: str, columns: str, batch_id: int) -> None:
        """Appends to `table`, unless its log says that this stream's batch is there: a batch repeated after a crash."""
        (records.select(*StructType.fromDDL(columns).names).write.format("delta").mode("append")
         .options(txnAppId=self.checkpoint_id, txnVersion=batch_id).save(table))


def _count(records: DataFrame) -> dict[str | None, int]:
    return {row.reject_reason: row["count"] for row in records.groupBy("reject_reason").count().collect()}


def run_until_stopped(stream: DataFrame, writer: TableWriter, options: argparse.Namespace,
                      explain: Callable[[str], str | None] = lambda message: None) -> None:
    """Runs `stream` into `writer`: with --once to its end, else until Ctrl+C or SIGTERM; the running batch is finished.

    `explain`: makes of an error message of the source what a user can do about it, or None.
    Raises PipelineError where the stream can't start or can't go on.
    """
    _check_restart(stream.sparkSession, writer, options.checkpoint)
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, lambda *_: writer.stopping.set())
    trigger = {"availableNow": True} if options.once else {"processingTime": options.trigger}
    with writer.lock:
        query = (stream.writeStream.foreachBatch(writer).option("checkpointLocation", options.checkpoint)
                 .trigger(**trigger).start())
        writer.checkpoint_id = query.id
    say(f"Writing to {writer.table}, rejected records to {writer.quarantine}."
        + ("" if options.once else " Ctrl+C stops."))
    try:
        while not writer.stopping.is_set() and not query.awaitTermination(0.5):
            _report_batches(query, writer)
        with writer.lock:
            written = max(writer.counts, default=None)
        _wait_for_commit(query, written)
        query.stop()
    except StreamingQueryException as error:
        if not isinstance(writer.error, Stopped):
            cause = writer.error or error
            explanation = explain(root_cause(cause))
            raise PipelineError(explanation) if explanation else cause
    finally:
        _report_batches(query, writer)
        stream.sparkSession.stop()
    if not options.once:
        say("Stopped. The next start goes on from here.")


def _wait_for_commit(query: StreamingQuery, batch_id: int | None, seconds: float = 5) -> None:
    """Gives the query time to note in the checkpoint that `batch_id`, which is in the tables, is done."""
    deadline = time.monotonic() + seconds
    while (batch_id is not None and query.isActive and time.monotonic() < deadline
           and (query.lastProgress is None or query.lastProgress["batchId"] < batch_id)):
        time.sleep(0.05)


def _report_batches(query: StreamingQuery, writer: TableWriter) -> None:
    """Prints a line for each batch that took in records and has not been reported."""
    for progress in query.recentProgress:
        counts = writer.counts.pop(progress["batchId"], None)
        if not counts:
            continue
        rejected = {reason: rows for reason, rows in counts.items() if reason}
        reasons = ", ".join(f"{reason} {rows:,}" for reason, rows in sorted(rejected.items()))
        line = (f"batch {progress['batchId']}: {sum(counts.values()):,} rows in, {counts.get(None, 0):,} accepted, "
                f"{sum(rejected.values()):,} rejected{f' ({reasons})' if reasons else ''}, "
                f"{progress['durationMs']['triggerExecution'] / 1000:.1f} s")
        latest = progress["sources"][0]["latestOffset"]
        if latest and "{" in latest:  # Kafka's offsets: {"topic": {"partition": offset}}
            behind = _total_offset(latest) - _total_offset(progress["sources"][0]["endOffset"])
            line += f", {max(0, behind):,} behind"
        say(line)


def _total_offset(offsets: str) -> int:
    return sum(offset for partitions in json.loads(offsets).values() for offset in partitions.values())


def _check_restart(spark: SparkSession, writer: TableWriter, checkpoint: str) -> None:
    """Raises PipelineError where the checkpoint and the tables do not belong together.

    Going on would then lose records (a checkpoint that has read them, tables that don't have them) or write them twice.
    """
    java = spark._jvm  # which reaches any file system that Spark does
    metadata, commits = (java.org.apache.hadoop.fs.Path(checkpoint, name) for name in ("metadata", "commits"))
    file_system = metadata.getFileSystem(spark._jsc.hadoopConfiguration())
    checkpoint_id = None
    if file_system.exists(metadata):
        content = file_system.open(metadata)
        checkpoint_id = json.loads(java.org.apache.commons.io.IOUtils.toString(content, "UTF-8"))["id"]
        content.close()
    has_committed = file_system.exists(commits) and len(file_system.listStatus(commits)) > 0
    for table in (writer.table, writer.quarantine):
        table_writer = writer_of(spark, table)
        if table_writer is None and has_committed:
            raise PipelineError(f"The checkpoint {checkpoint} has batches that were written to {table}, but there is no "
                                f"such table. Put the table back, or read all again: delete the checkpoint and {writer.table}*.")
        if table_writer is not None and table_writer != checkpoint_id:
            raise PipelineError(f"The table {table} was not written with the checkpoint {checkpoint}, and going on could "
                                f"write rows twice. Give the checkpoint that belongs to it (--checkpoint), or read all "
                                f"again: delete the checkpoint and {writer.table}*.")
