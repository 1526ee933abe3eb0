"""Printing Delta tables: for people as a table that fits the terminal, for programs as JSON or CSV."""

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.delta.private import files_of
from pipeline.paths import quarantine_of
from pipeline.terminal.arguments import at_least
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

FEW = 20  # rows, unless --limit says otherwise
CUT_AT = 120  # characters of a value, unless the whole value is requested
FOLD_AT = 30  # terminal columns for a long value if not all values fit on one line
# Columns that a narrow terminal omits, in this order: the tables' own columns before the contract's.
LEAST_NEEDED = (
    "raw_json",
    "_rescued_data",
    "kafka_key",
    "topic",
    "kafka_timestamp",
    "source_file",
    "partition",
    "offset",
    "ingest_time",
)
JOINERS = "\u200c\u200d"  # the format characters that Persian, Indic scripts and joined emoji need
RAW = {"raw_json", "raw"}  # the columns that hold the original record
ISO_8601 = "yyyy-MM-dd'T'HH:mm:ss.SSSSSSZZZZZ"  # with "Z" for UTC


def table_of(options: argparse.Namespace) -> str:
    """The path of the table selected by a reader's options."""
    return quarantine_of(options.table) if options.rejected else options.table


def in_order(rows: DataFrame, options: argparse.Namespace, newest_first: bool = False) -> DataFrame:
    """The rows of that table that the options do not exclude, ordered by time, with the columns selected by the options."""
    if options.without:
        rows = rows.where(~F.col("reject_reason").isin(options.without))
    if options.format == "table" and not options.raw:
        rows = rows.drop("raw_json")
    times = [column for column, kind in rows.dtypes if kind == "timestamp" and column != "ingest_time"]
    return rows.orderBy(*((F.desc if newest_first else F.asc)(f"`{time}`") for time in ("ingest_time", *times[:1])))


def newest_rows(spark: SparkSession, options: argparse.Namespace, **time_travel: Any) -> DataFrame:
    """The newest rows, newest first, as selected by a reader's options; of the newest version or of another (`versionAsOf`)."""
    path = table_of(options)
    rows = spark.read.format("delta").options(**time_travel).load(path)
    if not options.without and (since := newest_since(spark, path, options.limit)):
        rows = rows.where(F.col("ingest_time") >= F.timestamp_micros(F.lit(since)))
    return in_order(rows, options, newest_first=True).limit(options.limit)


def add_reader_options(parser: argparse.ArgumentParser, limit: int | None = FEW) -> None:
    """Adds the options of all readers: --limit, whose default is `limit`, and --format."""
    usual = "" if limit else f" (default: {FEW} as a table, all as json or csv)"
    parser.add_argument("--limit", type=at_least(1), default=limit, metavar="N", help="number of rows" + usual)
    parser.add_argument(
        "--format",
        choices=("table", "json", "csv"),
        default="table",
        help="table for people; for programs, with all columns, json (an object per line) or csv",
    )


def read_table(spark: SparkSession, path: str, written_by: str, **time_travel: Any) -> DataFrame:
    """The Delta table at `path`, optionally at a version or time (`versionAsOf`, `timestampAsOf`).

    Raises PipelineError if there is none. `written_by`: the command that creates it.
    """
    if not DeltaTable.isDeltaTable(spark, path):
        raise PipelineError(f"No Delta table at {path} yet. It appears with the first records; start {written_by}.")
    return spark.read.format("delta").options(**time_travel).load(path)


def newest_since(spark: SparkSession, path: str, limit: int) -> int | None:
    """A time (microseconds since 1970) since which at least `limit` rows of the table have arrived, according to their
    ingest_time; None if no file may be skipped.

    It comes from the file statistics in the table's log. Delta skips all files whose rows are older, so the newest rows are
    found without reading the whole table.
    """
    files = (
        files_of(spark, path)
        .select(F.from_json("stats", "numRecords BIGINT, minValues STRUCT<ingest_time: TIMESTAMP>").alias("file"))
        .select("file.numRecords", F.unix_micros("file.minValues.ingest_time").alias("since"))
    )
    rows = 0
    for file in files.orderBy(F.desc("since")).limit(limit).collect():  # enough, as a file has at least one row
        rows += file.numRecords or 0
        if rows >= limit:
            return file.since
    return None


def show(rows: DataFrame, limit: int | None, form: str = "table", whole: bool = False) -> None:
    """Prints the first `limit` rows in the `form` of --format; without a limit, a few as a table, or all rows. `whole`: no value is
    shortened and no column omitted.
    """
    if form == "table":
        limit = limit or FEW
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 100_000)
        table, left_out, has_more = as_table(rows, console.width, whole, limit)
        with console.capture() as printed:  # leaves a closed pipe to `run`
            console.print(table)
        say("\n".join(map(str.rstrip, printed.get().splitlines())))
        if left_out:
            say(f"No room for {', '.join(left_out)}; --format json shows all columns.")
        if has_more:
            say(f"These are the first {limit:,} rows; --limit N shows more.")
    else:
        rows = rows.limit(limit) if limit else rows
        if form == "csv":
            say(csv_line(rows.columns))
        say_rows(rows, form)


def show_lines(spark: SparkSession, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Prints a table of these values."""
    # createDataFrame opens a connection to Python, whose end at the exit prints a traceback.
    rows = [F.struct(*(F.lit(value).alias(name) for name, value in zip(columns, line))) for line in lines]
    show(spark.range(1).select(F.inline(F.array(*rows))), len(lines))


def say_rows(rows: DataFrame, form: str, whole: bool = False) -> None:
    for line in lines(rows, form, whole):
        say(line)


def lines(rows: DataFrame, form: str, whole: bool = False) -> Iterator[str]:
    """The rows as lines, in the `form` of --format. Control characters are escaped as in JSON if they would reach a terminal."""
    if form == "json":
        options = {"ignoreNullFields": "false", "timestampFormat": ISO_8601}
        values = [_text(name, kind) if kind == "binary" else F.col(f"`{name}`") for name, kind in rows.dtypes]
        columns = [F.to_json(F.struct(*values), options)]
    elif form == "table":
        cells = [F.coalesce(_cell(name, kind, whole), F.lit("null")) for name, kind in rows.dtypes]
        columns = [F.concat_ws("  ", *cells)]
    else:
        columns = [
            F.date_format(f"`{name}`", ISO_8601).alias(name) if kind == "timestamp" else _text(name, kind)
            for name, kind in rows.dtypes
        ]
    for row in rows.select(*columns).toLocalIterator():
        line = csv_line(row) if form == "csv" else row[0]
        yield re.sub(r"[^\n -~]", _escaped, line) if sys.stdout.isatty() else line


def _escaped(character: re.Match[str]) -> str:
    # As in `_cell`. A character that Python or Java doesn't know yet, such as a new emoji, is harmless.
    is_harmful = unicodedata.category(character[0]) in ("Cc", "Cf", "Zl", "Zp") and character[0] not in JOINERS
    return json.dumps(character[0])[1:-1] if is_harmful else character[0]


def csv_line(values: Sequence[str | None]) -> str:
    """A line of CSV (RFC 4180), in which an empty string is quoted, to tell it from null. Python's writer can do so from 3.12
    on.
    """
    cells = ["" if value is None else _quoted(value) for value in values]
    return ",".join(cells) or '""'  # programs skip an empty line


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"' if not value or set(value) & set('",\r\n') else value


def _text(name: str, kind: str) -> Column:
    """The column as text. In bytes that are not UTF-8, "�" stands for each error."""
    value = F.col(f"`{name}`").cast("string")
    return (F.make_valid_utf8(value) if kind == "binary" else value).alias(name)


def _cell(name: str, kind: str, whole: bool) -> Column:
    """The column in human-readable form. Control characters in a record are shown as "�", so that they can't control the terminal."""
    value = F.regexp_replace(_text(name, kind), rf"[\p{{Cc}}\p{{Zl}}\p{{Zp}}[\p{{Cf}}&&[^{JOINERS}]]]", "\ufffd")
    if kind == "timestamp":
        value = F.date_format(f"`{name}`", "yyyy-MM-dd HH:mm:ss")
    elif not whole:
        value = F.when(F.length(value) > CUT_AT, F.concat(F.left(value, F.lit(CUT_AT)), F.lit("…"))).otherwise(value)
    return value.alias(name)


def as_table(rows: DataFrame, width: int, whole: bool = False, limit: int = FEW) -> tuple[Table, list[str], bool]:
    """The first `limit` rows as a table of at most `width` terminal columns, the names of the columns that do not fit, and whether
    there are more rows.

    `whole`: for rows with the original record, only that record and its origin.
    """
    columns = {name: _cell(name, kind, whole) for name, kind in rows.dtypes}
    if whole and (raw := RAW & columns.keys()):
        lines = [("ingest_time",), ("topic", "partition", "offset", "source_file"), ("reject_reason",)]
        origin = [
            F.concat_ws(" ", *there) for line in lines if (there := [columns[name] for name in line if name in columns])
        ]
        columns = {"from": F.concat_ws("\n", *origin)} | {name: columns[name] for name in raw}
    kinds = dict.fromkeys(columns, "string") | {name: kind for name, kind in rows.dtypes if name in columns}
    found = rows.select(*(value.alias(name) for name, value in columns.items())).limit(limit + 1).collect()
    cells = found[:limit]
    widths = {name: max(map(cell_len, (name, *(row[name] or "null" for row in cells)))) for name in kinds}
    shown = list(kinds)
    for name in () if whole else (*filter(kinds.__contains__, LEAST_NEEDED), *reversed(kinds)):
        if name in shown[1:] and sum(min(widths[each], FOLD_AT) + 2 for each in shown) > width:
            shown.remove(name)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in shown:
        is_number = kinds[name] in ("tinyint", "smallint", "int", "bigint", "float", "double") or kinds[
            name
        ].startswith("decimal")
        table.add_column(
            name, justify="right" if is_number else "left", overflow="fold", no_wrap=widths[name] <= FOLD_AT
        )
    for row in cells:
        table.add_row(*(Text("null", style="dim") if row[name] is None else Text(row[name]) for name in shown))
    return table, [name for name in kinds if name not in shown], len(found) > limit
