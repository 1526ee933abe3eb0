"""Private APIs of Spark's streaming engine: the query behind a micro-batch, and the files of a checkpoint.

Without them, a batch would know neither which query it belongs to nor when it was planned, and could not be recognised after
a crash; and a start could not tell whether the tables have the batches that the checkpoint counts as done.
"""

import json
import re
import time
from typing import Any, cast
from urllib.parse import unquote

from pipeline.paths import local_path
from pipeline.spark import durable
from pipeline.spark.file_system import FileSystem
from pipeline.spark.globs import MAX_PATTERNS, is_pattern
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

LAST_BATCH = "_last_batch.json"  # in the checkpoint, next to Spark's own files; a file stream ignores such names
ID = "metadata"  # Spark's file with the stream's id
READ_AGAIN = "read everything that is still available into a new --table with a new --checkpoint"


def stream_of(batch: DataFrame) -> str:
    """The id of the query that passed this micro-batch to `foreachBatch`, which does not get the id as an argument."""
    return batch.sparkSession.sparkContext.getLocalProperty("sql.streaming.queryId") or ""


def query_of(batch: DataFrame) -> StreamingQuery:
    """The query that passed this micro-batch to `foreachBatch`. The batch's own session is a copy that doesn't know about any queries."""
    query = SparkSession.builder.getOrCreate().streams.get(stream_of(batch))
    assert query
    return query


def batch_time_ms(batch: DataFrame) -> int:
    """When this micro-batch was planned, in milliseconds since 1970. This is its current_timestamp(), which is otherwise available
    only together with a record.
    """
    batch_id = int(batch.sparkSession.sparkContext.getLocalProperty("streaming.sql.batchId") or 0)
    offsets = cast(Any, query_of(batch))._jsq.streamingQuery().offsetLog().get(batch_id)
    return offsets.get().metadataOpt().get().batchTimestampMs()


def damaged_message(path: str, reason: str) -> str:
    return f"The checkpoint {path} is damaged: {reason}. Restore it and its tables from a backup, or {READ_AGAIN}."


class Checkpoint:
    """Spark's checkpoint at `path`, on any file system that Spark supports. `last_done`: the newest batch that was done when this
    object was created, or -1.
    """

    def __init__(self, spark: SparkSession, path: str):
        self.path = path
        self.files = FileSystem(spark, path)
        self.last_done = self._newest("commits")

    def id(self) -> str | None:
        """The id of the stream, under which Delta records its batches; None if there is no checkpoint yet."""
        metadata = self.files.read(f"{self.path}/{ID}")
        return None if metadata is None else self._parse(metadata, ID)["id"]

    def last_begun(self) -> int:
        """The newest batch that has begun, and whose contents are therefore fixed; -1 if there is none."""
        return self._newest("offsets")

    def _newest(self, folder: str) -> int:
        return max((int(name) for name in self.files.names_in(f"{self.path}/{folder}") if name.isdecimal()), default=-1)

    def drop_cut_id(self) -> None:
        """Deletes the stream's id if a power cut left it empty. Nothing can refer to it in that case, because the id is synced before the
        tables are created.
        """
        if self.last_done < 0 and ID in self.files.names_in(self.path):
            self._drop_cut(ID)

    def drop_cut_entries(self, written: int) -> None:
        """Deletes the newest entries that a power cut left incomplete, so that Spark begins their batch again.

        `written`: the last batch in the tables. Its plan was synced before it was written, so only the entry that marks it as
        done, or the plan of a later batch, can be incomplete.
        """
        while self.last_done >= 0 and self._drop_cut(f"commits/{self.last_done}"):
            self.last_done -= 1
        planned = self.last_begun()
        names = self.files.names_in(f"{self.path}/sources/0")
        logs = [name for name in names if re.fullmatch(r"\d+(\.compact)?", name)]
        newest = max(logs, key=lambda name: int(name.removesuffix(".compact")), default=None)
        if planned > max(self.last_done, written):
            if newest and self._drop_cut(f"sources/0/{newest}"):
                self.files.delete(f"{self.path}/offsets/{planned}")
            elif newest and self._has_too_many_patterns(f"sources/0/{newest}"):
                say(
                    f"Batch {planned} of {self.path} has too many files with wildcards in their names. It will be split into smaller ones."
                )
                self.files.delete(f"{self.path}/sources/0/{newest}")
                self.files.delete(f"{self.path}/offsets/{planned}")
            elif not self._drop_cut(f"offsets/{planned}") and _goes_back(self.unread(), self.end_of(planned)):
                say(
                    f"Batch {planned} of {self.path} was planned to end before it begins. None of it was written; it will be planned again."
                )
                self.files.delete(f"{self.path}/offsets/{planned}")
        elif newest and (
            planned < 0 or int(newest.removesuffix(".compact")) > self.end_of(planned).get("logOffset", float("inf"))
        ):
            self._drop_cut(f"sources/0/{newest}")  # lists files whose batch was not planned yet

    def _has_too_many_patterns(self, file: str) -> bool:
        """Whether an entry of the file log has more files with wildcards in their names than Spark can list (`MAX_PATTERNS`)."""
        entries = [json.loads(line) for line in (self.files.read(f"{self.path}/{file}") or "").split("\n")[1:]]
        # Skips Kafka's entry, which is by topic.
        files = [entry for entry in entries if {"path", "batchId"} <= entry.keys()]
        paths = [unquote(file["path"]) for file in files if file["batchId"] == files[-1]["batchId"]]
        return sum(is_pattern(path) and local_path(path) is not None for path in paths) * len(paths) > MAX_PATTERNS**2

    def _is_whole(self, file: str) -> bool:
        """Whether one of Spark's files is complete: a version line (which only the stream's id lacks) followed by lines of JSON."""
        # Kafka's sources/0/0 begins with a null byte.
        text = (self.files.read(f"{self.path}/{file}") or "").removeprefix("\0")
        lines = text.strip("\n").split("\n")
        try:
            return (lines[0].startswith("v") or file == ID) and isinstance(json.loads(lines[-1]), dict | int)
        except (IndexError, ValueError):
            return False

    def _drop_cut(self, file: str) -> bool:
        if self._is_whole(file):
            return False
        say(
            f"{self.path}/{file} is incomplete, perhaps because of a power cut. Its batch starts over; nothing is lost or written twice."
        )
        self.files.delete(f"{self.path}/{file}")
        return True

    def unread(self) -> dict[str, Any]:
        """Where the next batch begins (the end of the last batch that is done), in the source's format; {} at the start."""
        return self.end_of(self.last_done)

    def end_of(self, batch_id: int) -> dict[str, Any]:
        """Where a batch ends, in the source's format; {} for a batch that has not begun."""
        file = f"offsets/{batch_id}"
        text = self.files.read(f"{self.path}/{file}")
        if text is None and (batch_id > self.last_done or batch_id < 0):
            return {}
        # A version, the metadata, and a line for each source; here there is one source.
        lines = (text or "").split("\n")
        if lines[0] != "v1":
            raise PipelineError(damaged_message(self.path, f"{file} does not begin with v1"))
        return self._parse(lines[-1], file)

    def _parse(self, text: str, file: str) -> dict[str, Any]:
        try:
            return json.loads(text)
        except ValueError:
            raise PipelineError(damaged_message(self.path, f"{file} is not JSON")) from None

    def last_batch(self) -> dict[str, Any]:
        """The latest note of `write_last_batch`. {} if there is none, or if it is about an earlier batch, because a version without
        such notes has run since.
        """
        try:
            note = json.loads(self.files.read(f"{self.path}/{LAST_BATCH}") or "{}")
        except ValueError:  # cut off by a crash, in a store that can't replace a file atomically
            return {}
        return note if note.get("batch", 0) in (self.last_done, self.last_done + 1) else {}

    def write_last_batch(self, note: dict[str, Any]) -> None:
        """Stores facts about a batch before Spark marks it as done; before the first batch, only the tables' `versions`."""
        file, local = f"{self.path}/{LAST_BATCH}", local_path(self.path)
        if local is None:
            self.files.write(file, json.dumps(note))
        else:
            durable.replace(f"{local}/{LAST_BATCH}", json.dumps(note))

    def sync(self, batch_id: int, end: dict[str, Any]) -> None:
        """Syncs the files that Spark wrote when it began a batch that ends at `end`. Does nothing for other stores."""
        if (local := local_path(self.path)) is not None:
            files = f"sources/0/{end.get('logOffset', 0)}"  # the file names of a folder
            written = (ID, f"commits/{batch_id - 1}", f"offsets/{batch_id}", files, f"{files}.compact")
            durable.sync(f"{local}/{file}" for file in written)

    def set_aside(self) -> str:
        """Renames the checkpoint, so that the stream starts over, and returns its new path."""
        aside = f"{self.path}.{time.strftime('%Y%m%dT%H%M%S')}"
        if not self.files.rename(self.path, aside):
            raise PipelineError(
                f"The checkpoint {self.path} could not be renamed to {aside}. Rename it, then start again."
            )
        return aside


def _goes_back(begin: Any, end: Any) -> bool:
    """Whether a batch from `begin` to `end` (in the source's format) ends before it begins, or lacks a partition, because Kafka
    has briefly reported stale offsets.
    """
    if isinstance(begin, dict):
        return any(
            _goes_back(offset, end.get(place, -1) if isinstance(end, dict) else -1) for place, offset in begin.items()
        )
    return end < begin
