"""Running a stream: each micro-batch into a table and its quarantine exactly once, a clean stop, a line per batch."""

import argparse
import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable

from kafka.errors import KafkaError
from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException, StreamingQueryException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.streaming import StreamingQuery
from pyspark.sql.types import StructType

from common.checkpoints import check_restart, exclusive, taken
from common.console import PipelineError, first_line, location, root_cause, say
from common.readings import with_reject_reason
from common.tables import TOPIC_ID, WRITER, create_table, quarantine_of
from common.topics import Topic

MOST_FAILURES = 3  # in a row, each after a wait for Kafka, without a batch between them


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
    the tables' own; without it the batch is the records. A repeated batch gives the same records. `careful` is true
    where reading them has failed before. `topic`: the one that the records come from, if any.
    """

    def __init__(self, table: str, columns: str, quarantine_columns: str,
                 read_records: Callable[[DataFrame, bool], DataFrame] | None = None, topic: Topic | None = None):
        self.table, self.columns = table, columns
        self.quarantine, self.quarantine_columns = quarantine_of(table), quarantine_columns
        self.read_records, self.topic = read_records, topic
        self.checkpoint_id: str | None = None  # known once the query has started
        self.topic_id = ""
        self.adopts = False  # whether the tables were another stream's before
        self.lock = threading.Lock()  # held while a batch is written
        self.stopping = threading.Event()
        self.counts: dict[int, dict[str | None, int]] = {}  # rows by reject_reason (None: accepted) of a written batch
        self.batches = 0
        self.error: Exception | None = None

    def __call__(self, batch: DataFrame, batch_id: int) -> None:
        with self.lock:
            try:
                if self.stopping.is_set():
                    raise Stopped  # before anything of this batch was written; the next start repeats it
                self.write(batch, batch_id)
            except Exception as error:
                self.error = error
                raise

    def write(self, batch: DataFrame, batch_id: int) -> None:
        """Writes one batch; called with the lock held."""
        if batch_id == 0:
            owner = {WRITER: self.checkpoint_id} | ({TOPIC_ID: self.topic_id} if self.topic_id else {})
            # The table last: as long as it is not this stream's, nothing was written.
            for table, columns in ((self.quarantine, self.quarantine_columns), (self.table, self.columns)):
                create_table(batch.sparkSession, table, columns, owner, self.adopts)
        records, counts = self._read(batch)
        try:
            # An id never comes back: if it is the same now, all of these records are of the same topic.
            if self.topic and self.topic.id() != self.topic_id:
                raise PipelineError(f"{self.topic} was deleted while it was read.")
            if counts.keys() - {None}:
                self._append(records.where("reject_reason IS NOT NULL"), self.quarantine, self.quarantine_columns, batch_id)
            if None in counts:
                accepted = records.where("reject_reason IS NULL").withColumn("raw_json", F.col("raw").cast("string"))
                self._append(accepted, self.table, self.columns, batch_id)
        finally:
            records.unpersist()
        self.counts[batch_id] = counts
        self.batches += 1

    def _read(self, batch: DataFrame) -> tuple[DataFrame, dict[str | None, int]]:
        """The batch's records with their reject_reason, kept on disk, and their number by it."""
        for careful in (False, True) if self.read_records else (True,):
            records = None
            try:
                records = with_reject_reason(self.read_records(batch, careful) if self.read_records else batch)
                return records.persist(StorageLevel.DISK_ONLY), _count(records)
            except (PySparkException, Py4JJavaError):
                if records:
                    records.unpersist()
                if careful:
                    raise

    def _append(self, records: DataFrame, table: str, columns: str, batch_id: int) -> None:
        """Appends to `table`, unless its log says that this stream's batch is there: a batch repeated after a crash."""
        (records.select(*StructType.fromDDL(columns).names).write.format("delta").mode("append")
         .options(txnAppId=self.checkpoint_id, txnVersion=batch_id).save(table))


def _count(records: DataFrame) -> dict[str | None, int]:
    return {row.reject_reason: row["count"] for row in records.groupBy("reject_reason").count().collect()}


def run_until_stopped(stream: DataFrame, writer: TableWriter, options: argparse.Namespace) -> None:
    """Runs `stream` into `writer`: with --once to its end, else until Ctrl+C or SIGTERM; the running batch is finished.

    Where Kafka stops answering, it waits for it and goes on. Raises PipelineError where it can't start or can't go on.
    """
    spark, topic, failures = stream.sparkSession, writer.topic, 0
    for stop_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop_signal, lambda *_: writer.stopping.set())
    try:
        with exclusive(options.checkpoint):
            check_restart(spark, writer, options)
            say(f"Writing to {writer.table}, rejected records to {writer.quarantine}."
                + ("" if options.once else " Ctrl+C stops."))
            while error := run_query(stream, writer, options):
                if problem := _problem(error, writer, options):
                    raise PipelineError(problem) from error
                failures = 1 if writer.batches else failures + 1
                if topic is None or failures > MOST_FAILURES:
                    raise error
                topic.wait_out(error, writer.stopping)
                if writer.stopping.is_set():
                    break
                check_restart(spark, writer, options)
                say("Going on from the last committed offsets.")
    except KafkaError as error:
        raise PipelineError(f"Kafka on {topic.servers} does not answer any more ({first_line(str(error))}). Start it, then this "
                            f"script: it goes on from the last committed offsets.") from error
    finally:
        spark.stop()
    if not options.once:
        say("Stopped. The next start goes on from here.")


def run_query(stream: DataFrame, writer: TableWriter, options: argparse.Namespace) -> Exception | None:
    """Runs the query until it is done or `writer.stopping` is set; returns the error that ended it before."""
    trigger = {"availableNow": True} if options.once else {"processingTime": options.trigger}
    writer.error, writer.batches = None, 0
    try:
        with writer.lock:
            query = (stream.writeStream.foreachBatch(writer).option("checkpointLocation", options.checkpoint)
                     .trigger(**trigger).start())
            writer.checkpoint_id = query.id
    except (PySparkException, Py4JJavaError) as error:
        return error
    try:
        while not writer.stopping.is_set() and not query.awaitTermination(0.5):
            _report_batches(query, writer)
        with writer.lock:
            written = max(writer.counts, default=None)
        _wait_for_commit(query, written)
        query.stop()
    except StreamingQueryException as error:
        if not isinstance(writer.error, Stopped):
            return writer.error or error
    finally:
        _report_batches(query, writer)
    return None


def _problem(error: Exception, writer: TableWriter, options: argparse.Namespace) -> str | None:
    """What to do about an error of the checkpoint, of the tables or of their file systems; None for another error."""
    message = first_line(root_cause(error))
    if re.search(r"/(metadata|(offsets|commits)/\d+) already exists|[Cc]oncurrent", message):
        return taken(options.checkpoint)
    places = [place for place in (writer.table, options.checkpoint, tempfile.gettempdir()) if "://" not in place]
    next_start = "Nothing is lost: the next start goes on from the last committed offsets."
    if re.search(r"No space left|[Qq]uota exceeded|Not enough space", message):
        free = {place: shutil.disk_usage(_existing(place)).free for place in places}
        fullest = min(free, key=free.get, default=writer.table)
        return f"There is no space left for {fullest} ({message}). Make some and start again. {next_start}"
    if re.search(r"Permission denied|Read-only file system|not permitted|Mkdirs failed|AccessControl|CANNOT_CREATE_LOG_PATH", message):
        closed = next((place for place in places if not os.access(_existing(place), os.W_OK)), writer.table)
        return f"This user may not write to {closed} ({message}). Give it the right and start again. {next_start}"
    return None


def _existing(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _wait_for_commit(query: StreamingQuery, batch_id: int | None, seconds: float = 5) -> None:
    """Gives the query time to note in the checkpoint that `batch_id`, which is in the tables, is done."""
    deadline = time.monotonic() + seconds
    while (batch_id is not None and query.isActive and time.monotonic() < deadline
           and not any(progress["batchId"] == batch_id and "addBatch" in progress["durationMs"]
                       for progress in query.recentProgress)):
        time.sleep(0.05)


def _report_batches(query: StreamingQuery, writer: TableWriter) -> None:
    """Prints a line for each batch that took in records and has not been reported."""
    for progress in query.recentProgress:
        if "addBatch" not in progress["durationMs"]:  # a look that found nothing, under the number of the next batch
            continue
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
