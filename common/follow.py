"""--follow of a reader: the newest rows of a table as they come."""

import argparse
import sys
import time
from collections import deque

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from common.console import is_screen, say
from common.tables import quarantine_of
from common.viewer import as_table, csv_line, lines, newest_rows, rows_of

REFRESH = 2  # seconds
LINES_AROUND = 7  # of the rows
RATE_OVER = 10  # seconds over which the rows a second are counted


def follow(spark: SparkSession, options: argparse.Namespace) -> None:
    """Shows the newest rows until Ctrl+C: on a terminal in place, else each new row as a line."""
    paths = (options.table, quarantine_of(options.table))
    if not all(DeltaTable.isDeltaTable(spark, path) for path in paths):
        print(f"No Delta table at {options.table} yet. Waiting for it …", file=sys.stderr)
    while not all(DeltaTable.isDeltaTable(spark, path) for path in paths):
        time.sleep(REFRESH)
    if options.format == "table" and is_screen(sys.stdout):
        _in_place(spark, options)
    else:
        _in_lines(spark, options)


def _in_place(spark: SparkSession, options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    begun = time.time_ns() // 1000
    counts: deque[tuple[float, int, int]] = deque(maxlen=RATE_OVER // REFRESH + 1)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as view:
        while True:
            accepted, rejected = (spark.read.format("delta").load(path) for path in (options.table, quarantine_of(options.table)))
            counts.append((time.monotonic(), accepted.count(), rejected.count()))
            (then, *before), (now, *after) = counts[0], counts[-1]
            rates = [(count - earlier) / max(now - then, 1) for count, earlier in zip(after, before)]
            rows = newest_rows(spark, options).limit(max(1, console.height - LINES_AROUND))
            [[newest]] = rows.agg(F.max(F.unix_micros("ingest_time"))).collect()
            age = "" if newest is None else f"; the newest row is {max(0, time.time() - newest / 1e6):,.0f} s old"
            reasons = (rejected.where(F.col("ingest_time") >= F.timestamp_micros(F.lit(begun))).groupBy("reject_reason").count()
                       .orderBy(F.desc("count"), "reject_reason").collect())
            named = "; since the start " + ", ".join(f"{reason} {count:,}" for reason, count in reasons[:5]) if reasons else ""
            table, _ = as_table(rows, console.width, options.raw)
            view.update(Group(Text(f"{after[0]:,} accepted, {rates[0]:,.1f} a second{age}"),
                              Text(f"{after[1]:,} rejected, {rates[1]:,.1f} a second{named}"), Text(), table), refresh=True)
            time.sleep(REFRESH)


def _in_lines(spark: SparkSession, options: argparse.Namespace) -> None:
    new, times = newest_rows(spark, options), rows_of(spark, options)[1]
    if options.format != "json":
        say(csv_line(new.columns) if options.format == "csv" else "  ".join(new.columns))
    newest = 0  # ingest_time in microseconds: the rows of a batch have the same, and come at once
    while True:
        # Each of the two queries sees the table as it is then: what comes between them is for the next round.
        [[last]] = new.agg(F.max(F.unix_micros("ingest_time"))).collect()
        if last is not None:
            for line in lines(new.where(F.unix_micros("ingest_time") <= last).orderBy(*times), options.format, options.raw):
                say(line)
            newest = last
        time.sleep(REFRESH)
        new = rows_of(spark, options)[0].where(F.col("ingest_time") > F.timestamp_micros(F.lit(newest)))
