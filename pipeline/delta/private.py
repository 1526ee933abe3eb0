"""Private APIs of Delta: its view of a table's log.

Without them, a writer would have to list the whole log for every batch, and `--follow` could not read a single commit.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.spark.private import _java, _scala_seq

from pyspark.sql import DataFrame, SparkSession


def _delta_log(spark: SparkSession, table: str) -> Any:
    """Delta's internal view of a table. The public API does not expose the last batch written by a stream."""
    return _java(spark).org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, table)


def version_and_last_batch(spark: SparkSession, table: str, stream: str | None) -> tuple[int, int]:
    """The version of a table, and the last batch that `stream` has written to it (-1 for none), as far as this session knows. The
    session is the only writer, so the log is not listed again.
    """
    snapshot = _delta_log(spark, table).unsafeVolatileSnapshot()
    last_batch = snapshot.transactions().get(stream)
    return snapshot.version(), last_batch.get() if last_batch.isDefined() else -1


def configuration(spark: SparkSession, table: str) -> dict[str, str]:
    """The properties of a table. Spark's SHOW TBLPROPERTIES hides a value that contains "url", "token" or "password", even in a
    topic's name ("hourly").
    """
    java, none = _java(spark), _java(spark).scala.Option.empty()
    properties = _delta_log(spark, table).update(False, none, none).metadata().configuration()
    return dict(java.scala.jdk.javaapi.CollectionConverters.asJava(properties))


class Commit(NamedTuple):
    """A version of a table: Delta's name for the `operation`, whether it has deleted or restored rows, and the `rows` it has added
    in these `files`. Files that were merely merged count as neither.
    """

    version: int
    operation: str
    has_changed_rows: bool
    files: list[str]
    rows: DataFrame


def newest_state(spark: SparkSession, table: str) -> tuple[str, int]:
    """The current id of a table (which changes when it is recreated) and its current version."""
    none = _java(spark).scala.Option.empty()
    snapshot = _delta_log(spark, table).update(False, none, none)
    return snapshot.metadata().id(), snapshot.version()


def commits_of(spark: SparkSession, table: str, first: int, last: int) -> Iterator[Commit]:
    """Yields the versions from `first` to `last` that the table's log still has, in order. Call `newest_state` first.

    Delta has two public ways to read the rows of a commit: the change data feed, which the table would have to write, and a
    streaming read, which can't begin right after a given version and ends when somebody changes rows.
    """
    java, log = _java(spark), _delta_log(spark, table)
    changes = log.getChanges(first, last, java.scala.Option.empty(), False)
    while changes.hasNext():
        change = changes.next()
        actions = list(java.scala.jdk.javaapi.CollectionConverters.asJava(change._2()))
        by_kind: dict[str, list[Any]] = {
            kind: [action for action in actions if action.getClass().getSimpleName() == kind]
            for kind in ("AddFile", "RemoveFile", "CommitInfo")
        }
        operation = by_kind["CommitInfo"][0].operation() if by_kind["CommitInfo"] else ""
        added = [file for file in by_kind["AddFile"] if file.dataChange()]
        has_removed = any(file.dataChange() for file in by_kind["RemoveFile"])
        rows = log.createDataFrame(
            log.unsafeVolatileSnapshot(), _scala_seq(spark, added), False, java.scala.Option.empty()
        )
        yield Commit(
            change._1(),
            operation,
            has_removed or operation == "RESTORE",
            [file.path() for file in added],
            DataFrame(rows, spark),
        )


def files_of(spark: SparkSession, table: str) -> DataFrame:
    """The files of a table with their statistics, from its log. DeltaTable.detail() only counts them."""
    return DataFrame(_delta_log(spark, table).unsafeVolatileSnapshot().allFiles().toDF(), spark)


def remove_old_log_entries(spark: SparkSession, table: str) -> None:
    """Removes log entries that have expired. Delta's own clean-up works in whole days, which is too coarse for a batch every two
    seconds (43,200 commits).
    """
    log, none = _delta_log(spark, table), _java(spark).scala.Option.empty()
    by_the_minute = _java(spark).org.apache.spark.sql.delta.TruncationGranularity.MINUTE()
    log.cleanUpExpiredLogs(log.unsafeVolatileSnapshot(), none, none, by_the_minute)


def compact_own_files(spark: SparkSession, is_first_commit: bool) -> None:
    """Prepares auto compaction for a commit to a table. `is_first_commit`: of this process to this table.

    Delta counts the small files that this process writes. At the first commit, it also merges those of earlier processes,
    which takes the count below zero. By default, it would then merge at every commit, until the files have become one large
    file.
    """
    spark.conf.set("spark.databricks.delta.autoCompact.modifiedPartitionsOnly.enabled", is_first_commit)
