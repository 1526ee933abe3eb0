"""A stream's metrics for Prometheus and its health check, served over HTTP (`--metrics-port`)."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.streaming.source import Backlog
from pipeline.streaming.writer import BatchReport, NoMetrics
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

CLIENT_SECONDS = 10  # a client that connects and sends no request must not occupy a thread for longer
SILENT_SECONDS = 60  # a query that has not answered for this long counts as not running


class Metrics(NoMetrics):
    """Serves http://HOST:PORT/metrics, and /healthz, which returns 200 while the query is running and answers, and 503 otherwise.
    `reasons`: those for which a record can be rejected.
    """

    def __init__(self, host: str, port: int, reasons: Iterable[str]):
        self.heard_at, self.newest_at = (
            float("-inf"),
            0.0,
        )  # when the query last answered, and the newest record's time
        disable_created_metrics()  # the creation time of each series, which nothing here needs
        registry = CollectorRegistry()
        self.accepted = Counter("pipeline_accepted_records", "Records written to the table", registry=registry)
        self.rejected = Counter(
            "pipeline_rejected_records", "Records written to the quarantine", ["reason"], registry=registry
        )
        for reason in reasons:  # otherwise rate() would not see the first burst
            self.rejected.labels(reason)
        self.seconds = Histogram(
            "pipeline_batch_seconds",
            "Duration of a batch",
            registry=registry,
            buckets=(0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
        )
        self.lag = Gauge("pipeline_lag_records", "Unread records of the partition", ["partition"], registry=registry)
        self.newest = Gauge(
            "pipeline_newest_record_timestamp_seconds", "Time of the newest record since the start", registry=registry
        )
        self.heard = Gauge(
            "pipeline_query_heard_timestamp_seconds", "When the running query last answered", registry=registry
        )
        self.commit = Gauge("pipeline_last_commit_timestamp_seconds", "End of the last batch", registry=registry)
        try:
            server, _ = start_http_server(port, host, registry)
        except OSError as error:
            raise PipelineError(
                f"The metrics can't be served on {host}:{port}: {error.strerror}. Choose another --metrics-port."
            ) from error
        server.RequestHandlerClass.timeout = CLIENT_SECONDS  # type: ignore[attr-defined]
        self.figures: Any = server.get_app()
        server.set_app(self._answer)
        say(f"Metrics: http://{host}:{port}/metrics")

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/healthz":
            return self.figures(environ, start_response)
        is_well = time.monotonic() - self.heard_at < SILENT_SECONDS
        start_response("200 OK" if is_well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ok\n" if is_well else b"stream not running\n"]

    def working(self, works: bool) -> None:
        self.heard_at = time.monotonic() if works else float("-inf")
        if works:
            self.heard.set_to_current_time()

    def batch(self, report: BatchReport, progress: dict[str, Any], left: Backlog | None) -> None:
        self.accepted.inc(report.rows.get(None, 0))
        for reason, rows in report.rows.items():
            if reason:
                self.rejected.labels(reason).inc(rows)
        self.seconds.observe(progress["batchDuration"] / 1000)
        for partition, records in (left.by_partition if left else {}).items():
            self.lag.labels(partition).set(records)
        if report.newest is not None:
            self.newest_at = max(self.newest_at, report.newest / 1e6)
            self.newest.set(self.newest_at)
        self.commit.set(time.time())
