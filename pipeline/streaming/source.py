"""The interface between a stream and its source."""

from typing import Any, NamedTuple

from pipeline.delta.tables import TablePair
from pipeline.spark.private import number_of_tasks
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.signals import StopFlag

from pyspark.sql import Column, DataFrame, SparkSession

SMALL_BATCH = 10  # tasks up to which a batch becomes a single file; above that, it becomes one file per core


class SourceAwayError(PipelineError):
    """The source does not answer, perhaps only for a while."""


class Backlog(NamedTuple):
    """Records or files still to be read: `amount` of them, of this `kind`. The last batch read `of_batch` of them."""

    amount: int
    kind: str
    of_batch: int
    by_partition: dict[int, int] = {}


class Source:
    """A stream's source: a topic (pipeline/kafka/source.py) or a folder (pipeline/files/source.py).

    The defaults suit a source that is always available, keeps its data, and delivers the records themselves in its batches.
    `mode`: how the source is read, in words for the user. A batch that was begun in one mode can't be repeated in another.
    """

    mode: str
    knows_records = False  # whether it can identify records by their origin
    has_keys = False  # whether its records are Kafka messages, with a `kafka_key`
    has_arrays = True  # whether a record can be an array
    notes: dict[str, str] = {}  # properties of the table for other programs

    def read_batch(self, batch: DataFrame) -> DataFrame:
        """Returns the records of a micro-batch: `raw` and `ingest_time` for the contract, and the columns that say where a record
        came from. A repeated batch returns the same records.
        """
        return batch

    def is_small(self, records: DataFrame) -> bool:
        """Whether a single task should write the records of a batch, into a single file."""
        return number_of_tasks(records) <= SMALL_BATCH

    def contents(self, batch: DataFrame, end: dict[str, Any]) -> dict[str, Any]:
        """Describes the records of a micro-batch that the checkpoint plans to end at `end`. If two batches have the same number
        and the same description, they hold the same records.
        """
        return end

    def last_records(self, is_record: Column) -> Column | None:
        """An aggregate (a string) to observe over the records of a batch, from which a start can tell whether the source still has
        them. None if there is nothing to observe. `is_record`: false for a further row of the same record.
        """
        return None

    def remember(self, spark: SparkSession, last_records: str | None) -> str | None:
        """Returns the note to keep after a batch about the last records read, given the observed `last_records`."""
        return last_records

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        """Returns the records to quarantine when the second reading of a batch has accepted different records.

        `judged`: the records of the second reading, as returned by `parse`. `written`: the origins of the records that are already
        in one of the tables, with the reject_reason of those in the quarantine; a source that `knows_records` leaves these out.
        """
        return judged.where("reject_reason IS NOT NULL")

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        """Like `read_batch`, after reading has failed with `error`. Raises `error` if there is no other way to read the batch."""
        raise error

    def identity(self) -> dict[str, str]:
        """Table properties that identify the source; they change when it is recreated. {} if it has none or can't tell."""
        return {}

    def require_same_source(
        self, identity: dict[str, str], written_from: dict[str, str], unread: dict[str, Any]
    ) -> bool:
        """Returns whether the source was recreated since `written_from`, the properties of its table, were set.

        Raises PipelineError if that would lose unread records and the loss was not accepted.
        """
        return False

    def require_unread_records(
        self,
        spark: SparkSession,
        tables: TablePair,
        unread: dict[str, Any],
        planned: dict[str, Any],
        checkpoint: str,
        last_records: str | None,
    ) -> str | None:
        """Raises PipelineError if the source no longer has the records from the checkpoint's offsets `unread` to the end `planned`
        of a batch that was begun.

        Returns where a new checkpoint has to begin if this one can't continue, else None. `last_records`: the latest result of
        `remember`.
        """
        return None

    def require_unchanged(self, spark: SparkSession, identity: dict[str, str]) -> None:
        """Raises PipelineError if the records of the running batch may come from a source other than the one with this `identity`,
        or if the last records read before this batch have been replaced by others.
        """

    def begin_at(self, place: str) -> None:
        """Sets where a stream without a checkpoint begins: the result of `require_unread_records`, or "" for the beginning."""

    def take_back(self, spark: SparkSession, tables: TablePair, begin: dict[str, Any], end: dict[str, Any]) -> None:
        """Deletes from `tables` the records of an unfinished batch, from `begin` to `end`, that the source still has and a new
        checkpoint is going to read.
        """

    def explain(self, error: Exception) -> str | None:
        """Returns what to do about an error of the source that has ended the query, or None for any other error."""
        return None

    def watch(self) -> None:
        """Called twice a second while the query runs, for sources that have something to monitor."""

    def wait_until_available(self, error: Exception, stopping: StopFlag) -> None:
        """Returns when the stream can continue after the `error` that ended its query, or when `stopping` is set. Otherwise raises."""
        raise error

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Warns the user about a finished batch. `reasons`: why records were rejected; `quarantine`: the table that has them."""

    def report(self, progress: dict[str, Any], rows: int) -> Backlog | None:
        """Reports a batch of `rows` rows, for which Spark reports `progress`, to the source, for other tools to see. Returns the
        backlog after it, None if it is unknown.
        """
        return None
