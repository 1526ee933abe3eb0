"""--follow: the newest rows of a table as they arrive, based on the table's versions, so that no clock is involved."""

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator

from pipeline.delta.commits import Commits
from pipeline.delta.private import commits_of, newest_state
from pipeline.paths import quarantine_of
from pipeline.readers.printing import as_table, csv_line, in_order, newest_rows, say_rows, table_of
from pipeline.spark.private import in_memory
from pipeline.terminal.messages import is_screen, say, warn

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

REFRESH_SECONDS = 2  # seconds
LINES_AROUND = 7  # lines of the screen that are not rows
RATE_SECONDS = 10  # seconds over which the rows per second are measured


class Follower:
    """The commits to the table at `path` from now on. `version`: the newest one returned so far."""

    def __init__(self, spark: SparkSession, path: str):
        self.spark, self.path = spark, path
        self.id, self.version = newest_state(spark, path)

    def new(self) -> Iterator[DataFrame | str]:
        """Yields the rows added by each commit since the last call, in order, or a sentence about rows that can't be shown."""
        table_id, newest = newest_state(self.spark, self.path)
        if table_id != self.id:
            yield f"{self.path} is a new table. All of its rows follow."
            self.id, self.version = table_id, -1
        elif newest < self.version:
            yield f"{self.path} was replaced by an older copy. The rows that are added to that copy follow."
            self.version = newest
        if newest == self.version:
            return
        log = Commits(self.spark, self.path, newest)
        for commit in commits_of(self.spark, self.path, self.version + 1, newest):
            yield from self._pass_over(commit.version - 1)
            self.version = commit.version
            if commit.has_changed_rows:
                yield f"Version {commit.version} of {self.path} ({commit.operation}) has changed or removed rows that were shown."
            elif any(log.files.size(log.path(file)) is None for file in commit.files):
                yield (
                    f"The rows added by version {commit.version} of {self.path} are not shown: its files were removed before "
                    f"they were read here."
                )
            elif commit.files:
                yield commit.rows
        yield from self._pass_over(newest)

    def _pass_over(self, version: int) -> Iterator[str]:
        """Names the versions up to this one that the table's log no longer has."""
        if version > self.version:
            yield (
                f"The rows added by versions {self.version + 1} to {version} of {self.path} are not shown: the table's "
                f"log lost these versions before they were read here."
            )
            self.version = version


def follow(spark: SparkSession, options: argparse.Namespace) -> None:
    """Shows the newest rows until Ctrl+C: updated in place on a terminal, elsewhere one line per new row."""
    wait_for_tables(spark, options.table)
    if options.format == "table" and is_screen(sys.stdout):
        _in_place(spark, options)
    else:
        _in_lines(spark, options)


def wait_for_tables(spark: SparkSession, table: str) -> None:
    """Returns when the Delta table `table` and its quarantine exist."""
    has_said = False
    while not all(DeltaTable.isDeltaTable(spark, path) for path in (table, quarantine_of(table))):
        if not has_said:
            warn(f"No Delta table at {table} yet. Waiting for it …")
            has_said = True
        time.sleep(REFRESH_SECONDS)


def _in_place(spark: SparkSession, options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    quarantine, shown_is = quarantine_of(options.table), table_of(options)
    followers = [Follower(spark, path) for path in (options.table, quarantine)]
    counts: deque[tuple[float, int, int]] = deque(maxlen=RATE_SECONDS // REFRESH_SECONDS + 1)
    reasons: Counter[str] = Counter()  # of the records rejected since the start
    most_rows = max(1, min(options.limit, console.height - LINES_AROUND))

    def newest() -> DataFrame:
        return in_memory(newest_rows(spark, options).limit(most_rows))

    rows = newest()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as view:
        while True:
            for follower in followers:
                for new in follower.new():
                    if isinstance(new, DataFrame) and follower.path == quarantine:
                        reasons.update(dict(map(tuple, new.groupBy("reject_reason").count().collect())))
                    # The newest commit comes first, whatever its time.
                    if follower.path == shown_is and isinstance(new, DataFrame):
                        newer = in_order(new, options, newest_first=True).limit(most_rows)
                        rows = in_memory(newer.unionByName(rows, allowMissingColumns=True).limit(most_rows))
                    elif follower.path == shown_is:
                        rows = newest()
            accepted, rejected = (spark.read.format("delta").load(follower.path).count() for follower in followers)
            counts.append((time.monotonic(), accepted, rejected))
            (then, *before), (now, *after) = counts[0], counts[-1]
            rates = [(count - earlier) / max(now - then, 1) for count, earlier in zip(after, before)]
            first = rows.select(F.unix_micros("ingest_time")).first()
            age = f"; the newest row is {max(0, time.time() - first[0] / 1e6):,.0f} s old" if first else ""
            most_frequent = sorted(reasons, key=lambda reason: (-reasons[reason], reason))[:5]
            named = (
                "; since the start " + ", ".join(f"{reason} {reasons[reason]:,}" for reason in most_frequent)
                if reasons
                else ""
            )
            table, _, _ = as_table(rows, console.width, options.raw, most_rows)
            view.update(
                Group(
                    Text(f"{after[0]:,} accepted, {rates[0]:,.1f} a second{age}"),
                    Text(f"{after[1]:,} rejected, {rates[1]:,.1f} a second{named}"),
                    Text(),
                    table,
                ),
                refresh=True,
            )
            time.sleep(REFRESH_SECONDS)
            wait_for_tables(spark, options.table)


def _in_lines(spark: SparkSession, options: argparse.Namespace) -> None:
    follower = Follower(spark, table_of(options))
    rows = in_order(newest_rows(spark, options, versionAsOf=follower.version), options)
    columns, left_out = rows.columns, set[str]()
    if options.format != "json":
        say(csv_line(columns) if options.format == "csv" else "  ".join(columns))
    say_rows(rows, options.format, options.raw)
    while True:
        time.sleep(REFRESH_SECONDS)
        wait_for_tables(spark, options.table)
        for new in follower.new():
            if isinstance(new, str):
                warn(new)
                continue
            rows = in_order(new, options)
            if options.format != "json":  # the header is printed only once, so all lines have its columns
                if added := sorted({*rows.columns} - {*columns} - left_out):
                    warn(f"New columns of {follower.path} are not shown: {', '.join(added)}. Start again to see them.")
                    left_out.update(added)
                rows = rows.select(
                    *(f"`{name}`" if name in rows.columns else F.lit(None).alias(name) for name in columns)
                )
            say_rows(rows, options.format, options.raw)
