"""The batches of a query: written on the query's thread, reported on the script's thread, one line each."""

import threading
import time
from typing import Any

from pipeline.delta.locks import with_retries
from pipeline.streaming.private import stream_of
from pipeline.streaming.source import Backlog
from pipeline.streaming.writer import BatchReport, NoMetrics, TableWriter
from pipeline.terminal.messages import say, without_controls
from pipeline.terminal.signals import StopFlag, Stopped

from pyspark.sql import DataFrame
from pyspark.sql.streaming.query import StreamingQuery

MAX_REASONS, MAX_FIELDS = 3, 10  # named in the line of a batch


class Batches:
    """The batches written by one query."""

    def __init__(self, writer: TableWriter, stopping: StopFlag, metrics: NoMetrics):
        self.writer, self.stopping, self.metrics = writer, stopping, metrics
        self.lock = threading.Lock()  # held while a batch is being written
        self.begun = float("inf")  # when the running batch began
        self.reports: dict[int, BatchReport] = {}  # those not printed yet
        self.written = 0
        self.error: Exception | None = None

    def write(self, batch: DataFrame, batch_id: int) -> None:
        with self.lock:
            try:
                if self.stopping.is_set():
                    raise Stopped  # before any of this batch is written; the next start repeats it
                with self.writer.tables.write_lock(self.stopping, create=batch_id == 0):
                    self.begun = time.monotonic()
                    # As after a crash, a second attempt skips whatever the first one has written.
                    self.reports[batch_id] = with_retries(lambda: self.writer.write(batch, batch_id, stream_of(batch)))
                self.written += 1
            except Exception as error:
                self.error = error
                raise
            finally:
                self.begun = float("inf")

    def running_for(self) -> float:
        """Seconds since the running batch began; negative if no batch is running."""
        return time.monotonic() - self.begun

    def report(self, query: StreamingQuery) -> None:
        """Prints a line for each batch that has finished since the last call."""
        for progress in done_in(query) if self.reports else ():
            if batch := self.reports.pop(progress["batchId"], None):
                left = self.writer.source.report(progress, sum(batch.rows.values()))
                if batch.rows:
                    say(batch_line(batch, progress, left))
                    self.metrics.batch(batch, progress, left)

    def wait_for_commit(self, query: StreamingQuery, seconds: float = 5) -> None:
        """Waits for the running batch to end, and for the query to mark it as done in the checkpoint."""
        with self.lock:
            deadline = time.monotonic() + seconds
        while self.reports and query.isActive and time.monotonic() < deadline:
            self.report(query)
            time.sleep(0.05)


def done_in(query: StreamingQuery) -> list[dict[str, Any]]:
    """Spark's progress reports of the latest batches. Reports of idle triggers are left out: they carry the next batch's number."""
    return [progress for progress in query.recentProgress if "addBatch" in progress["durationMs"]]


def batch_line(report: BatchReport, progress: dict[str, Any], left: Backlog | None) -> str:
    """The line printed for a batch. `left`: the backlog after it."""
    rejected = {reason: rows for reason, rows in report.rows.items() if reason}
    most_frequent = sorted(rejected, key=lambda reason: (-rejected[reason], reason))[:MAX_REASONS]
    reasons = ", ".join(f"{reason} {rejected[reason]:,}" for reason in most_frequent)
    if len(rejected) > MAX_REASONS:
        reasons += f" and {len(rejected) - MAX_REASONS} more"
    rows, seconds = sum(report.rows.values()), progress["batchDuration"] / 1000
    seconds_left = left.amount * seconds / max(1, left.of_batch) if left else 0
    unknown = ", ".join(map(without_controls, report.unknown[:MAX_FIELDS]))
    if len(report.unknown) > MAX_FIELDS:
        unknown += f" and {len(report.unknown) - MAX_FIELDS:,} more"
    return (
        f"batch {progress['batchId']}: {rows:,} rows in, {report.rows.get(None, 0):,} accepted, "
        f"{sum(rejected.values()):,} rejected{f' ({reasons})' if reasons else ''}, {seconds:.1f} s"
        + (f", {left.amount:,} {left.kind}" if left else "")
        + (f" ({seconds_left:,.0f} s at this rate)" if seconds_left > 3 else "")
        + (f", {report.with_unknown:,} with fields unknown to the contract: {unknown}" if report.unknown else "")
    )
