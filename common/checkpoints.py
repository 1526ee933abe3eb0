"""A stream's checkpoint: one process at a time, and only with the tables that belong to it."""

import argparse
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import SparkSession

from common.console import PipelineError, say
from common.tables import TOPIC_ID, WRITER, properties_of, quarantine_of

if TYPE_CHECKING:
    from common.table_writer import TableWriter


@contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Keeps the checkpoint at `path` from other processes of this machine. PipelineError where one of them has it.

    Where it is a URI (`s3a://…`) there is no such lock: Spark lets one of the two write a batch into the checkpoint, and
    the other fails. A store that can't rename in one step lets both, should they do so in the same moment.
    """
    if "://" in path:
        yield
        return
    lock = Path(path).with_name(f".{Path(path).name}.lock")  # beside it, so that it may be deleted or moved
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise PipelineError(f"The checkpoint {path} can't be made: {error.strerror}. Make room for it, give this user the "
                            f"right, or name another place with --checkpoint.") from error
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PipelineError(taken(path)) from None
        yield


def check_places(options: argparse.Namespace) -> None:
    """PipelineError where the checkpoint is where Delta's clean-up of the table, or of its quarantine, would delete it."""
    for table in (options.table, quarantine_of(options.table)):
        below = os.path.relpath(options.checkpoint, table).split(os.sep)[0] if "://" not in table + options.checkpoint else ".."
        if below == "." or below[0] not in "._":
            raise PipelineError(f"The checkpoint {options.checkpoint} must not be in the table {table}, which deletes what does "
                                f"not belong to it. Name another place with --checkpoint.")


def taken(path: str) -> str:
    return (f"Another stream works with the checkpoint {path}. Stop that one, or give this one a --table and a --checkpoint "
            f"of its own.")


class Checkpoint:
    """What Spark has noted in the checkpoint at `path`, on any file system that Spark reaches."""

    def __init__(self, spark: SparkSession, path: str):
        self.path = path
        self._java = spark._jvm
        self._folder = self._java.org.apache.hadoop.fs.Path(path)
        self._hadoop = spark._jsc.hadoopConfiguration()
        self._files = self._folder.getFileSystem(self._hadoop)

    def id(self) -> str | None:
        """The id of the stream, by which Delta knows its batches; None for a checkpoint that is not there yet."""
        metadata = self._read("metadata")
        return metadata and json.loads(metadata)["id"]

    def last_batch(self) -> int | None:
        """The newest batch that is done."""
        commits = self._child("commits")
        if not self._files.exists(commits):
            return None
        names = (status.getPath().getName() for status in self._files.listStatus(commits))
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def offsets(self) -> str:
        """Where the next batch begins: the end of the last one that is done, as its source writes it; "" at the start."""
        last = self.last_batch()
        lines = (self._read("offsets", str(last)) or "") if last is not None else ""
        return lines.strip().split("\n")[-1]  # a version, the metadata, and a line for each source: there is one

    def is_in_use(self, folder: str) -> bool:
        """Whether a folder has files other than hidden ones, such as .gitkeep and an unfinished _delta_log."""
        path = self._java.org.apache.hadoop.fs.Path(folder)
        files = path.getFileSystem(self._hadoop)
        return files.exists(path) and any(status.getPath().getName()[0] not in "._" for status in files.listStatus(path))

    def set_aside(self) -> str:
        """Renames the checkpoint, so that the stream starts anew; returns its new path."""
        aside = f"{self.path}.{time.strftime('%Y%m%dT%H%M%S')}"
        if self._files.exists(self._folder) and not self._files.rename(
                self._folder, self._java.org.apache.hadoop.fs.Path(aside)):
            raise PipelineError(f"The checkpoint {self.path} could not be renamed to {aside}. Do it, then start again.")
        return aside

    def _child(self, *names: str):
        return self._java.org.apache.hadoop.fs.Path("/".join((self.path, *names)))

    def _read(self, *names: str) -> str | None:
        file = self._child(*names)
        if not self._files.exists(file):
            return None
        content = self._files.open(file)
        try:
            return self._java.org.apache.commons.io.IOUtils.toString(content, "UTF-8")
        finally:
            content.close()


def check_restart(spark: SparkSession, writer: "TableWriter", options: argparse.Namespace) -> None:
    """Raises PipelineError where the checkpoint, the tables and the topic do not belong together.

    Going on would then lose records (a checkpoint that has read them, tables that don't have them) or write them twice.
    """
    checkpoint = Checkpoint(spark, options.checkpoint)
    tables = {table: properties_of(spark, table) for table in (writer.table, writer.quarantine)}
    unread = json.loads(checkpoint.offsets() or "{}") if writer.topic else {}  # {topic: {partition: offset}}
    if writer.topic and _is_made_again(writer, tables, unread):
        problem = (f"{writer.topic} was deleted and made again since {writer.table} was written: what the old one had from "
                   f"{unread.get(writer.topic.name) or 'its beginning'} on (partition: offset) is gone.")
        _accept_loss(problem[0].upper() + problem[1:], "the new topic is read from its beginning", options)
        say(f"The old checkpoint is now {checkpoint.set_aside()}.")
        writer.adopts = True
        return
    _check_tables(checkpoint, tables, writer)
    if unread:
        _check_offsets(checkpoint, unread, writer, options)


def _is_made_again(writer: "TableWriter", tables: dict[str, dict[str, str] | None], unread: dict[str, dict]) -> bool:
    """Whether the topic is another one, by Kafka's id, than the table was written from. Sets the writer's `topic_id`."""
    writer.topic_id = writer.topic.id()
    written_from = (tables[writer.table] or {}).get(TOPIC_ID, writer.topic_id)
    # Brokers before 2.8 have no ids.
    return writer.topic_id not in ("", written_from) and (not unread or writer.topic.name in unread)


def _check_tables(checkpoint: Checkpoint, tables: dict[str, dict[str, str] | None], writer: "TableWriter") -> None:
    for table, properties in tables.items():
        if properties is None and checkpoint.last_batch() is not None:
            raise PipelineError(f"The checkpoint {checkpoint.path} has batches that were written to {table}, but there is no "
                                f"such table. Put the table back, or read all again: delete the checkpoint and {writer.table}*.")
        if properties is not None and WRITER not in properties or properties is None and checkpoint.is_in_use(table):
            raise PipelineError(f"There is something at {table} that no stream of this pipeline has made. Name another place "
                                f"with --table.")
        if properties is not None and properties.get(WRITER) != checkpoint.id():
            raise PipelineError(f"The table {table} was not written with the checkpoint {checkpoint.path}, and going on could "
                                f"write rows twice. Give the checkpoint that belongs to it (--checkpoint), or read all "
                                f"again: delete the checkpoint and {writer.table}*.")


def _check_offsets(checkpoint: Checkpoint, unread: dict[str, dict], writer: "TableWriter", options: argparse.Namespace) -> None:
    """Whether the topic still has the offsets from `unread` on ({topic: {partition: offset}})."""
    if writer.topic.name not in unread:
        raise PipelineError(f"The checkpoint {checkpoint.path} is that of the topic {', '.join(unread)}. Give the topic "
                            f"{writer.topic.name} a --table and a --checkpoint of its own.")
    next_offsets = {int(partition): offset for partition, offset in unread[writer.topic.name].items()}
    if lost := writer.topic.lost(next_offsets):
        _accept_loss(f"Kafka no longer has records of {writer.topic} that were not read yet: {lost}. Its retention "
                     f"removed them, or something else did.", "it goes on with what there is", options)
    if too_far := writer.topic.read_too_far(next_offsets):
        raise PipelineError(f"Of {writer.topic} more was read than is committed: a transaction is still open in {too_far}. "
                            f"Start again when it has ended, or go on with isolation.level=read_uncommitted in --kafka-config.")


def _accept_loss(problem: str, what_follows: str, options: argparse.Namespace) -> None:
    if not options.accept_data_loss:
        raise PipelineError(f"{problem} Nothing was skipped. With --accept-data-loss {what_follows}.")
    say(f"{problem} --accept-data-loss: {what_follows}.")
