"""What a stream needs to know of its source, whatever it is."""

from typing import Any, NamedTuple

from pipeline.delta.tables import TablePair
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.signals import StopFlag

from pyspark.sql import Column, DataFrame, SparkSession


class SourceAwayError(PipelineError):
    """The source does not answer, which may pass."""


class Backlog(NamedTuple):
    """What is left to read: so many of the `kind`, of which the last batch had `of_batch`."""

    amount: int
    kind: str
    of_batch: int


class Source:
    """Where a stream's records come from: a topic (pipeline/kafka/source.py) or a folder
    (streaming_files_to_delta_bronze.py).

    What a source does not say itself is right for one that always answers, keeps what it has, and gives its records in
    the batch. `mode`: how it is read, as it is told to a user. A batch that was begun in one mode can't be repeated in
    another.
    """

    mode: str
    knows_records = False  # by their origin

    def read_batch(self, batch: DataFrame) -> DataFrame:
        """The records of a micro-batch: `raw` and `ingest_time` for the contract, and what the tables have of their
        origin.

        A batch that is repeated gives the same records.
        """
        return batch

    def contents(self, batch: DataFrame, end: dict[str, Any]) -> dict[str, Any]:
        """Says which records a micro-batch holds, which the checkpoint plans to go to `end`: two batches of one number
        with the same contents hold the same records.
        """
        return end

    def last_records(self) -> Column | None:
        """What to observe of a batch's records (an aggregate, a string) so that a start can tell whether the source
        still has them; None for nothing.
        """
        return None

    def remember(self, spark: SparkSession, last_records: str | None) -> str | None:
        """What to note of the last records that were read, after a batch of which `last_records` were observed."""
        return last_records

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        """The records for the quarantine where a second reading of a batch has accepted others than its first.

        `judged`: the records of the second reading, as `parse` gives them. `written`: where those came from that are in
        one of the tables. Where the source `knows_records`, none of these is returned.
        """
        return judged.where("reject_reason IS NOT NULL")

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        """The same after reading them has failed with `error`; raises it where there is no other way."""
        raise error

    def identity(self) -> dict[str, str]:
        """Table properties that identify the source; a recreated one has others. {} if it has none, or can't say."""
        return {}

    def require_same_source(
        self, identity: dict[str, str], written_from: dict[str, str], unread: dict[str, Any]
    ) -> bool:
        """Whether the source differs from the one in `written_from`, the properties of its table.

        Raises PipelineError if what the old one still had would be lost, unless that was accepted.
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
        """Raises PipelineError if the source no longer has the records after the offsets `unread` of the checkpoint, up
        to the end `planned` of a batch that was begun.

        Returns where a new checkpoint has to begin if this one can't go on, None if it can. `last_records`: what
        `remember` gave last.
        """
        return None

    def require_read_records(self, spark: SparkSession) -> None:
        """Raises PipelineError if the source no longer has the records that were read last before the running batch,
        but others.
        """

    def begin_at(self, place: str) -> None:
        """Is told where a stream without a checkpoint begins: what `require_unread_records` has returned, or "" for the
        beginning.
        """

    def take_back(self, spark: SparkSession, tables: TablePair, begin: dict[str, Any], end: dict[str, Any]) -> None:
        """Removes from `tables` the records of a half-done batch, from `begin` to `end`, that the source has and a new
        checkpoint reads.
        """

    def explain(self, error: Exception) -> str | None:
        """What to do about an error of the source that has ended the query; None for another error."""
        return None

    def watch(self) -> None:
        """Called twice a second while the query runs: for a source that has to look after something."""

    def wait_until_available(self, error: Exception, stopping: StopFlag) -> None:
        """After the `error` that has ended the query: returns when it can go on, or `stopping` is set; else raises."""
        raise error

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Warns of what a user should know of a batch, of which records are in the table `quarantine` for these
        `reasons`.
        """

    def commit_offsets(self, progress: dict[str, Any]) -> None:
        """Tells the source how far the stream has come, after a batch of which Spark reports `progress`: for those who
        look there.
        """

    def lag(self, progress: dict[str, Any]) -> dict[int, int]:
        """Records left to read after a batch of which Spark reports `progress`, by partition; {} if that is not known."""
        return {}

    def backlog(self, progress: dict[str, Any], rows: int) -> Backlog | None:
        """What is left to read after a batch of so many rows, of which Spark reports `progress`; None if that is not
        known.
        """
        return None
