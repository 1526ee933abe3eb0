"""Printing Delta tables for people."""

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, argument_parser, at_least, say, table_location
from common.internals import files_of
from common.session import READER_JVM, build_spark
from common.tables import quarantine_of

CUT_AT = 120  # characters of a value, unless all of it is asked for


def show_latest(manual: str, default_table: str, written_by: str) -> None:
    """The whole of a reader script: options, session, the newest rows, the number of rows.

    `written_by`: the command that makes the table, for whoever has none yet.
    """
    parser = argument_parser(manual)
    parser.add_argument("--table", type=table_location, default=default_table, help="Delta table")
    parser.add_argument("--limit", type=at_least(1), default=20, metavar="N", help="number of rows")
    parser.add_argument("--rejected", action="store_true", help="show the table's quarantine instead")
    parser.add_argument("--raw", action="store_true", help="show the records as they came, whole")
    parser.add_argument("--verbose", action="store_true", help="show Spark's own log and the traceback of an error")
    options = parser.parse_args()

    spark = build_spark("reader", READER_JVM, options.verbose)
    accepted = read_table(spark, options.table, written_by)
    rejected = read_table(spark, quarantine_of(options.table), written_by)
    rows = rejected if options.rejected else accepted
    if (since := newest_since(spark, quarantine_of(options.table) if options.rejected else options.table, options.limit)):
        rows = rows.where(F.col("ingest_time") >= F.timestamp_micros(F.lit(since)))
    times = [column for column, kind in rows.dtypes if kind == "timestamp" and column != "ingest_time"]
    newest_first = [F.desc(f"`{column}`") for column in ("ingest_time", *times[:1])]
    if not options.raw:
        rows = rows.drop("raw_json")
    show(rows.orderBy(*newest_first), options.limit, whole=options.raw)
    say(f"{accepted.count():,} rows in {options.table}")
    say(f"{rejected.count():,} rows in {quarantine_of(options.table)}")


def read_table(spark: SparkSession, path: str, written_by: str, **time_travel) -> DataFrame:
    """The Delta table at `path`, at a version or time if told (`versionAsOf`, `timestampAsOf`).

    Raises PipelineError where there is none; `written_by` is the command that makes it.
    """
    if not DeltaTable.isDeltaTable(spark, path):
        raise PipelineError(f"No Delta table at {path} yet. It appears with the first records; start {written_by}.")
    return spark.read.format("delta").options(**time_travel).load(path)


def newest_since(spark: SparkSession, path: str, limit: int) -> int | None:
    """A time (microseconds since 1970) such that at least `limit` rows of the table have an ingest_time from it on.

    It comes from the statistics of the files in the table's log. So the newest rows are found without a look at all of
    them: Delta skips each file whose rows are all older. None where no file may be skipped.
    """
    statistics = F.from_json("stats", "numRecords BIGINT, minValues STRUCT<ingest_time: TIMESTAMP>")
    files = (files_of(spark, path).select(statistics.alias("file"))
             .select("file.numRecords", F.unix_micros("file.minValues.ingest_time").alias("since")))
    rows = 0
    for file in files.orderBy(F.desc("since")).limit(limit).collect():  # enough: a file has at least one row
        rows += file.numRecords or 0
        if rows >= limit:
            return file.since
    return None


def show(rows: DataFrame, limit: int, whole: bool = False) -> None:
    """Prints the first `limit` rows. Binary is shown as text; control and format characters as "�".

    A record may hold anything, and what it holds must not steer the terminal.
    """
    def printable(name: str, kind: str):
        text = F.col(f"`{name}`").cast("string") if kind in ("string", "binary") else F.col(f"`{name}`")
        return (F.regexp_replace(text, r"\p{C}", "\ufffd") if kind in ("string", "binary") else text).alias(name)

    rows.select(*[printable(name, kind) for name, kind in rows.dtypes]).show(limit, truncate=0 if whole else CUT_AT)
