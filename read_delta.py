"""Inspects any Delta table: its current rows, earlier versions, and history. Without TABLE, lists the tables of the lake.

Only --optimize and --vacuum change a table.

    python3 read_delta.py
    python3 read_delta.py lake/silver/sensor_data --sort-by value --limit 5
    python3 read_delta.py lake/silver/sensor_data --version 0
    python3 read_delta.py lake/silver/sensor_data --timestamp "2026-11-20 08:00:00"
    python3 read_delta.py lake/silver/sensor_data --history
    python3 read_delta.py --sql "SELECT type, avg(value) FROM silver.sensor_data GROUP BY type"
    python3 read_delta.py lake/silver/sensor_data --optimize --vacuum
"""

import argparse
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce

from pipeline.delta.commits import sync_commits
from pipeline.delta.locks import with_retries, write_lock
from pipeline.delta.private import newest_state
from pipeline.delta.tables import clean_up, time_travel
from pipeline.paths import LAKE, local_path, tables_in
from pipeline.readers.printing import FEW, add_reader_options, read_table, show
from pipeline.spark.file_system import FileSystem
from pipeline.spark.private import SPARK_ERRORS
from pipeline.spark.session import READER_JVM, build_spark
from pipeline.terminal.arguments import argument_parser, at_least, location, table_location
from pipeline.terminal.errors import PipelineError, first_line, root_cause
from pipeline.terminal.messages import say, warn
from pipeline.terminal.script import run

from delta.tables import DeltaTable
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

STREAMS = "python3 spark_kafka_consumer.py or python3 streaming_files_to_delta_bronze.py"


def main() -> None:
    options = parse_options()
    spark = build_spark("read-delta", READER_JVM, options.verbose)
    if options.sql:
        show(query(spark, options), options.limit, options.format)
    elif options.table is None:
        show_overview(spark, options)
    elif options.optimize or options.vacuum:
        tidy(spark, options)
    elif options.history:
        show_history(spark, options)
    else:
        show_rows(spark, options)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("table", type=table_location, nargs="?", metavar="TABLE", help="path of a Delta table")
    parser.add_argument(
        "--sql",
        metavar="QUERY",
        help='a query over all tables of the lake, named FOLDER.TABLE, with "_" for "-" and the like; it can read any '
        "file that you can read, and call Java, so run only queries that you trust",
    )
    parser.add_argument("--sort-by", metavar="COLUMN", help="largest value first")
    parser.add_argument("--history", action="store_true", help="the table's commits, newest first")
    parser.add_argument("--optimize", action="store_true", help="merge the table's small files now")
    parser.add_argument(
        "--vacuum",
        action="store_true",
        help="remove files and log entries that time travel no longer needs",
    )
    moment = parser.add_mutually_exclusive_group()
    moment.add_argument("--version", type=at_least(0), metavar="N", help="the table as of this version")
    moment.add_argument("--timestamp", metavar="T", help='the table as of this time, UTC: "2026-11-20 08:00:00"')
    parser.add_argument("--lake", type=location, default=str(LAKE), help="folder with the tables, if no TABLE is given")
    add_reader_options(parser, limit=None)
    options = parser.parse_args()
    if options.table is None and (
        options.history
        or options.optimize
        or options.vacuum
        or options.sort_by
        or options.timestamp
        or options.version is not None
    ):
        parser.error("--history, --optimize, --vacuum, --sort-by, --version and --timestamp need a TABLE")
    if options.table and options.sql:
        parser.error("--sql takes no TABLE: the query names its tables, in the folder of --lake")
    return options


def query(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """The rows of --sql, in which each table of the lake is named after its path: `folder.table`."""
    with tempfile.TemporaryDirectory() as folder:  # a database needs a location, although nothing is written there
        place = re.sub(r"(['\\])", r"\\\1", folder)
        tables = lake_tables(spark, options.lake)
        # Names in Spark may contain only letters, digits and "_". Tables that have such a name keep it.
        paths = sorted(tables, key=lambda path: (bool(re.search(r"[^\w/]", path, re.ASCII)), path))
        split = [[re.sub(r"\W", "_", part, flags=re.ASCII) for part in os.path.split(path)] for path in paths]
        names = [f"`{database or 'default'}`.{table}" for database, table in split]
        for path, name, given in zip(paths, names, unique(names)):
            database, _, table = given.partition(".")
            spark.sql(f"CREATE DATABASE IF NOT EXISTS {database} LOCATION '{place}'")
            with in_the_lake(tables[path]):
                spark.catalog.createTable(f"{database}.`{table}`", tables[path], source="delta")
            if given != name:
                warn(
                    f"In --sql, {tables[path]} is named {given.replace('`', '')}, because another table is already named "
                    f"{name.replace('`', '')}."
                )
    try:
        rows = spark.sql(f"SELECT * FROM (\n{options.sql.strip().rstrip(';')}\n)")
    except PySparkException as error:
        problem = re.sub(r"^\[\w+\.?\w*\] |\.? SQLSTATE.*", "", first_line(str(error).strip()))
        raise PipelineError(f"--sql takes one query, and Spark can't run this one: {problem}.") from error
    return rows.toDF(*unique(rows.columns))  # a join may have two columns with the same name


def unique(names: list[str]) -> list[str]:
    """The names; those that repeat an earlier one, ignoring case, get a number."""
    given: dict[str, str] = {}
    for name in names:
        new = next(
            each
            for each in (name, *(f"{name}_{number}" for number in range(2, len(names) + 2)))
            if each.lower() not in given
        )
        given[new.lower()] = new
    return list(given.values())


@contextmanager
def in_the_lake(path: str) -> Iterator[None]:
    """Warns of a table that can't be read, so that the others are still shown."""
    try:
        yield
    except SPARK_ERRORS as error:
        warn(f"{path} can't be read: {first_line(root_cause(error))}")


def lake_tables(spark: SparkSession, lake: str) -> dict[str, str]:
    """The paths of the Delta tables under the folder `lake`, on any file system that Spark can reach, by their names there. Raises
    PipelineError if there is none.
    """
    if (local := local_path(lake)) is not None:
        tables = tables_in(local)
    else:
        # The slash is needed for a whole bucket: s3a://bucket alone would be the user's home folder in it.
        files = FileSystem(spark, f"{lake}/")
        top = files.qualified(f"{lake}/")
        tables = {path.removeprefix(top).strip("/") or ".": path for path in tables_under(files, top)}
    if not tables:
        raise PipelineError(f"No Delta table under {lake} yet. Tables appear with the first records; start {STREAMS}.")
    return dict(sorted(tables.items()))


def tables_under(files: FileSystem, folder: str) -> list[str]:
    """The paths of the Delta tables in a folder of this file system."""
    subfolders = files.folders_in(folder)
    if any(subfolder.endswith("/_delta_log") for subfolder in subfolders):
        return [folder]
    return [table for subfolder in subfolders for table in tables_under(files, subfolder)]


def show_overview(spark: SparkSession, options: argparse.Namespace) -> None:
    """Prints a line for each table under the folder --lake: rows, live files, size, last commit."""
    overview = []
    for name, path in lake_tables(spark, options.lake).items():
        with in_the_lake(path):
            table = DeltaTable.forPath(spark, path)
            [detail] = table.detail().collect()
            [commit] = table.history(1).select("version", "operation", F.col("timestamp").cast("string")).collect()
            line = {
                "table": name,
                "rows": table.toDF().count(),
                "live_files": detail["numFiles"],
                "size_mb": round(detail["sizeInBytes"] / 1e6, 2),
                "version": commit["version"],
                "last_commit": commit["operation"],
                "last_commit_time": commit["timestamp"],
            }
            overview.append(spark.range(1).select(*[F.lit(value).alias(name) for name, value in line.items()]))
    if overview:
        show(reduce(DataFrame.union, overview), len(overview), options.format)


def tidy(spark: SparkSession, options: argparse.Namespace) -> None:
    """Merges small files and removes old ones, as requested; a stream that writes to the table waits until that is done."""
    read_table(spark, options.table, STREAMS)
    if local_path(options.table) is None:
        warn(
            f"{options.table} can't be locked. Make sure that no stream is writing to it: otherwise, on S3, commits could be lost."
        )
    if options.optimize:
        with write_lock(options.table):
            table = DeltaTable.forPath(spark, options.table)
            [done] = with_retries(lambda: table.optimize().executeCompaction().collect())
            # Must happen before the merged files are removed.
            sync_commits(spark, options.table, [newest_state(spark, options.table)[1]])
        say(f"Merged {done.metrics['numFilesRemoved']:,} files into {done.metrics['numFilesAdded']:,}.")
    if options.vacuum:
        with write_lock(options.table):
            clean_up(spark, options.table)
        say(
            f"Removed the files and log entries that no version from the last {time_travel(spark, options.table)} needs."
        )


def show_history(spark: SparkSession, options: argparse.Namespace) -> None:
    read_table(spark, options.table, STREAMS)
    limit = options.limit or (FEW if options.format == "table" else None)
    history = DeltaTable.forPath(spark, options.table).history(limit and limit + 1)
    # To the millisecond, as --timestamp accepts it.
    show(
        history.select(
            "version",
            F.col("timestamp").cast("string"),
            "operation",
            F.expr("operationMetrics['numOutputRows']").alias("rows"),
            F.expr("operationMetrics['numFiles']").alias("files"),
        ),
        limit,
        options.format,
    )


def show_rows(spark: SparkSession, options: argparse.Namespace) -> None:
    moment = {"versionAsOf": options.version, "timestampAsOf": options.timestamp}
    given = {name: value for name, value in moment.items() if value is not None}
    rows = read_table(spark, options.table, STREAMS, **given)
    if options.sort_by is not None:
        if options.sort_by not in rows.columns:
            raise PipelineError(f"{options.table} has no column {options.sort_by}; it has {', '.join(rows.columns)}.")
        rows = rows.orderBy(F.desc(f"`{options.sort_by}`"))
    show(rows, options.limit, options.format)
    if options.format == "table":
        say(f"{rows.count():,} rows in {options.table}")


if __name__ == "__main__":
    run(main)
