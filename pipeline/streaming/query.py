"""Running a stream: a clean stop, a line per batch, and a clear message for every error that ends it."""

import argparse
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pipeline.contract.contract import OTHER_REASONS, Contract, add_readings_option, in_file
from pipeline.delta.tables import TablePair
from pipeline.paths import checkpoint_of
from pipeline.spark.private import SPARK_ERRORS, jvm_of, protect_callbacks
from pipeline.streaming.batches import Batches
from pipeline.streaming.errors import NEXT_START, explain
from pipeline.streaming.source import Source, SourceAwayError
from pipeline.streaming.start import (
    Start,
    check_start,
    lock_checkpoint,
    require_separate_places,
)
from pipeline.streaming.writer import NoMetrics, TableWriter
from pipeline.terminal.arguments import location, port_number, table_location
from pipeline.terminal.errors import PipelineError, first_line, root_cause
from pipeline.terminal.messages import say
from pipeline.terminal.progress import in_progress
from pipeline.terminal.script import has_no_end
from pipeline.terminal.signals import SAME_PRESS_SECONDS, StopFlag, Stopped, on_stop_signal

from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession

AVAILABLE_NOW = {"availableNow": True}  # the trigger that ends when everything available has been read
MAX_FAILURES = 3  # in a row, each after waiting for the source
# If a query has run this long without records, its next failure is counted as the first in a row.
RECOVERED_SECONDS = 600
MAX_SET_BACK_SECONDS = 10  # tolerated backward step of the clock in seconds; Spark idles until it has caught up


class ClockSetBackError(Exception):
    """The clock was set back. Spark would start no batch until it has caught up."""


def add_stream_options(parser: argparse.ArgumentParser, table: str, trigger: str) -> None:
    """Adds the options of both streams; `parse_stream_options` completes --checkpoint."""
    add_readings_option(parser)
    parser.add_argument(
        "--table",
        type=table_location,
        default=table,
        help="Delta table to append to; rejected records go to TABLE_quarantine",
    )
    parser.add_argument(
        "--checkpoint",
        type=location,
        help="folder for the stream's progress; belongs to the table (default: in checkpoints/ for a table of "
        "lake/, otherwise TABLE_checkpoint)",
    )
    parser.add_argument(
        "--trigger",
        type=_interval,
        default=trigger,
        metavar='"N seconds"',
        help='how often a batch starts; "0 seconds": as soon as the previous one is done',
    )
    parser.add_argument(
        "--once", "--available-now", action="store_true", help="process everything available, then exit"
    )
    parser.add_argument(
        "--keep-history",
        type=_history,
        metavar='"N days"',
        help="how long old versions of both tables, and deleted rows, can still be read (default: an existing table is left as it is; "
        "a new one keeps 2 hours on a local disk, where each commit lists the whole log, and 7 days in other stores)",
    )
    parser.add_argument(
        "--metrics-port",
        type=port_number,
        metavar="N",
        help="serve Prometheus metrics at http://HOST:N/metrics, and /healthz",
    )
    parser.add_argument("--metrics-host", metavar="HOST", default="127.0.0.1", help="address to serve the metrics on")


def parse_stream_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options on the command line of a stream."""
    options = parser.parse_args()
    options.checkpoint = options.checkpoint or checkpoint_of(options.table)
    if not options.once:
        has_no_end()
    return options


def _interval(value: str) -> str:
    if not re.fullmatch(r"\d{1,9} (millisecond|second|minute|hour)s?", value):
        raise argparse.ArgumentTypeError(f'{value!r} is not an interval such as "5 seconds" or "1 minute"')
    return value


def _history(value: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,4} (hour|day|week)s?", value):
        raise argparse.ArgumentTypeError(f'{value!r} is not a duration such as "12 hours" or "7 days"')
    return value


def trigger_of(options: argparse.Namespace) -> dict[str, Any]:
    """The trigger for the options added by `add_stream_options`."""
    return AVAILABLE_NOW if options.once else {"processingTime": options.trigger}


def run_until_stopped(
    spark: SparkSession,
    streams: Iterable[tuple[DataFrame, dict[str, Any]]],
    source: Source,
    tables: TablePair,
    contract: Contract,
    options: argparse.Namespace,
) -> None:
    """Runs the `streams` of `source`, each with its trigger, one after the other, into `tables`.

    Returns when the last stream ends, or after the running batch when a signal arrives. If the source stops answering, waits
    and continues. Raises PipelineError if the stream can't start or continue.
    """
    stopping = StopFlag()

    def stop() -> None:
        if stopping.is_set() and stopping.seconds() > SAME_PRESS_SECONDS:  # the second time: like kill -9
            if jvm := jvm_of(spark):
                jvm.kill()
            os._exit(128 + signal.SIGINT)
        stopping.set()

    on_stop_signal(stop)
    require_separate_places(options)

    def check() -> Start:
        with tables.write_lock(stopping):
            return check_start(spark, source, tables, contract, options.checkpoint)

    # Whatever happens here, the session ends, and the query with it, before the lock is released.
    with lock_checkpoint(options.checkpoint), spark, suppress(Stopped):
        protect_callbacks(spark)
        with in_file(options.readings):
            contract.check(spark, source.has_keys, source.has_arrays)
        start = check()
        metrics = NoMetrics()
        if options.metrics_port:
            from pipeline.streaming.metrics import Metrics

            reasons = (*contract.reasons, *OTHER_REASONS)
            metrics = Metrics(options.metrics_host, options.metrics_port, reasons)
        say(
            f"Writing to {tables.table}, rejected records to {tables.quarantine}."
            + ("" if options.once else " Press Ctrl+C to stop.")
        )
        for stream, trigger in streams:
            error: Exception | None = None
            failures = 0
            while not stopping.is_set():
                batches, began = 0, time.monotonic()
                try:
                    if error:
                        start = check()
                        say("Resuming from the last committed offsets.")
                    writer = TableWriter(tables, contract, source, start)
                    batches, error = run_query(stream, trigger, writer, options.checkpoint, stopping, metrics)
                except (SourceAwayError, *SPARK_ERRORS) as failed:  # the source is unavailable again
                    error = failed
                if not error:
                    break
                if isinstance(error, ClockSetBackError):
                    say(str(error))
                    continue
                if explanation := source.explain(error) or explain(error, tables.table, options.checkpoint):
                    raise PipelineError(explanation) from error
                failures = 1 if batches or time.monotonic() - began > RECOVERED_SECONDS else failures + 1
                if failures > MAX_FAILURES:
                    raise PipelineError(
                        f"{source} failed {failures} times in a row, though it answered in between: "
                        f"{first_line(root_cause(error))}. {NEXT_START}".replace("the", "The", 1)
                    ) from error
                source.wait_until_available(error, stopping)
    if not options.once:
        say("Stopped. The next start resumes from here.")


def run_query(
    stream: DataFrame,
    trigger: dict[str, Any],
    writer: TableWriter,
    checkpoint: str,
    stopping: StopFlag,
    metrics: NoMetrics,
) -> tuple[int, Exception | None]:
    """Runs the query until it ends or `stopping` is set. Returns the number of batches, and the error that ended the query early.

    Prints a line for each batch with records.
    """
    batches = Batches(writer, stopping, metrics)
    try:
        query = (
            stream.writeStream.foreachBatch(batches.write)
            .option("checkpointLocation", checkpoint)
            .trigger(**trigger)
            .start()
        )
    except SPARK_ERRORS as error:
        return 0, error
    clock, set_back = time.time() - time.monotonic(), None
    try:
        with in_progress(only_on_terminal=True) as note:
            while not stopping.is_set() and not query.awaitTermination(0.5):  # type: ignore[arg-type]  # its hint says int
                metrics.working(True)
                batches.report(query)
                writer.source.watch()
                note("A batch is being written …" if batches.running_for() > 3 else "")
                now = time.time() - time.monotonic()
                if now < clock - MAX_SET_BACK_SECONDS:
                    set_back = ClockSetBackError(f"The clock was set back by {clock - now:,.0f} s.")
                    break
                clock = max(clock, now)
        if stopping.is_set() and batches.running_for() > 0:
            say("Finishing the running batch. Ctrl+C again aborts it, which is safe: the next start repeats it.")
        batches.wait_for_commit(query)
        query.stop()
        failure = set_back or batches.error  # which may come from stopping the query
    except StreamingQueryException as error:
        failure = batches.error or error
    finally:
        metrics.working(False)
        batches.report(query)
    return batches.written, None if isinstance(failure, Stopped) else failure
