"""Running a stream: a clean stop, a line per batch, a sentence for what ends it."""

import argparse
import json
import os
import re
import shutil
import tempfile
import time

from kafka.errors import KafkaError
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException, StreamingQueryException
from pyspark.sql import DataFrame
from pyspark.sql.streaming import StreamingQuery

from common.checkpoints import check_places, check_restart, exclusive, taken
from common.console import PipelineError, first_line, location, root_cause, say, table_location
from common.process import on_stop_signal
from common.table_writer import Stopped, TableWriter

MOST_FAILURES = 3  # in a row, each after a wait for Kafka, without a batch between them


def add_stream_options(parser: argparse.ArgumentParser, table: str, checkpoint: str, trigger: str) -> None:
    """The options that both streams have: --table, --checkpoint, --trigger, --once, --verbose."""
    parser.add_argument("--table", type=table_location, default=table,
                        help="Delta table to append to; rejected records go to TABLE_quarantine")
    parser.add_argument("--checkpoint", type=location, default=checkpoint,
                        help="where the stream remembers what it has read; belongs to the table")
    parser.add_argument("--trigger", type=_interval, default=trigger, metavar='"N seconds"',
                        help='how often a batch starts; "0 seconds": as soon as the last one is done')
    parser.add_argument("--once", action="store_true", help="process what is there now, then exit")
    parser.add_argument("--verbose", action="store_true", help="show Spark's own log and the traceback of an error")


def _interval(value: str) -> str:
    if not re.fullmatch(r"\d{1,9} (millisecond|second|minute|hour)s?", value):
        raise argparse.ArgumentTypeError(f'{value!r} is not an interval such as "5 seconds" or "1 minute"')
    return value


def run_until_stopped(stream: DataFrame, writer: TableWriter, options: argparse.Namespace) -> None:
    """Runs `stream` into `writer`: with --once to its end, else until Ctrl+C or SIGTERM; the running batch is finished.

    Where Kafka stops answering, it waits for it and goes on. Raises PipelineError where it can't start or can't go on.
    """
    spark, topic, failures = stream.sparkSession, writer.topic, 0
    on_stop_signal(writer.stopping.set)
    check_places(options)
    try:
        with exclusive(options.checkpoint):
            check_restart(spark, writer, options)
            say(f"Writing to {writer.table}, rejected records to {writer.quarantine}."
                + ("" if options.once else " Ctrl+C stops."))
            while error := run_query(stream, writer, options):
                if explanation := _explain(error, writer, options):
                    raise PipelineError(explanation) from error
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
    if writer.stopping.is_set():
        return None
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


def _explain(error: Exception, writer: TableWriter, options: argparse.Namespace) -> str | None:
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
    if re.search(r"Permission denied|Read-only file system|not permitted|Mkdirs failed|AccessControl|CANNOT_CREATE_LOG_PATH",
                 message):
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
                f"{progress['batchDuration'] / 1000:.1f} s")
        latest = progress["sources"][0]["latestOffset"]
        if latest and "{" in latest:  # Kafka's offsets: {"topic": {"partition": offset}}
            behind = _total_offset(latest) - _total_offset(progress["sources"][0]["endOffset"])
            line += f", {max(0, behind):,} behind"
        say(line)


def _total_offset(offsets: str) -> int:
    return sum(offset for partitions in json.loads(offsets).values() for offset in partitions.values())
