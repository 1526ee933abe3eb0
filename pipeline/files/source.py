"""The input folder as the source of a stream."""

import argparse
import hashlib
import json
import os
from collections import deque
from contextlib import suppress
from typing import Any

from pipeline.delta.tables import TablePair
from pipeline.files.folder import count_waiting, is_behind_link, paths_in
from pipeline.files.private import planned_files
from pipeline.files.reading import away, files_in, find_multiline, is_there, read_lines, read_values, unreadable_file_of
from pipeline.files.taken import TakenFiles, is_draft
from pipeline.paths import plain
from pipeline.spark.file_system import BrokenFileError, FileSystem
from pipeline.spark.private import SPARK_ERRORS
from pipeline.streaming.source import Backlog, Source, SourceAwayError
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import warn

from pyspark.sql import DataFrame, Row, SparkSession

SMALL_FILES, SMALL_BYTES = 300, 64_000_000  # of a batch that a single task writes


class FileSource(Source):
    """The input folder as the source of a stream (streaming/source.py). Its batches contain file names."""

    def __init__(self, spark: SparkSession, options: argparse.Namespace):
        # A task keeps its readers' buffers until its end, and with large records, those of several scans would fill the memory.
        spark.conf.set("spark.sql.files.maxPartitionNum", spark.sparkContext.defaultParallelism)
        self.folder = FileSystem(spark, options.input).qualified(options.input)
        self.taken = TakenFiles(spark, options.checkpoint, self.folder, options.archive)
        self.options, self.waiting = options, 0  # number of files, if known
        self.read = read_values if options.multiline else read_lines
        self.has_arrays = not options.multiline  # whose elements are the records
        self.max_unpacked = options.max_unpacked * 1_000_000
        self.mode = "with --multiline" if options.multiline else "without --multiline"
        self.begun: list[str] = []  # the files of a batch that an earlier run began
        self.entry = -1  # the last entry of the log of taken files that is done
        self.end = -1  # the last one of the running batch; after a power cut, there may be more
        self.planned: list[str] = []  # the paths of the running batch
        self.files: list[Row] = []  # its files, as they were when it began
        self.listed: set[str] = set()  # the paths of all files that Spark has found for it
        self.faults: dict[str, str] = {}  # those that can't be read because of their own content

    def require_unread_records(
        self,
        spark: SparkSession,
        tables: TablePair,
        unread: dict[str, Any],
        planned: dict[str, Any],
        checkpoint: str,
        last_records: str | None,
    ) -> None:
        """Names files that have changed since they were read or planned. `last_records`: `TakenFiles.read_later`."""
        self.taken.read_log()
        self.taken.check_folder()
        for path, modified in json.loads(last_records or "{}").items():
            self.taken.note(path, modified)
        self.entry = unread.get("logOffset", -1)
        self.waiting = count_waiting(self.taken, self.options) if self.options.once else 0
        self.begun = self.taken.between(self.entry, self.taken.last_entry)
        self.taken.name_changed(self.taken.changed(self.taken.files))

    def contents(self, batch: DataFrame, end: dict[str, Any]) -> dict[str, Any]:
        paths, self.end = planned_files(batch), end.get("logOffset", -1)
        return {"files": len(paths), "sha256": hashlib.sha256("\n".join(paths).encode()).hexdigest()}

    def remember(self, spark: SparkSession, last_records: str | None) -> str | None:
        return json.dumps(self.taken.read_later)

    def read_batch(self, batch: DataFrame) -> DataFrame:
        self.taken.read_log()
        self.planned = self.taken.between(self.entry, self.end)
        self.files, self.faults = self._files_in(batch), {}
        found = {plain(file.path): file.modified for file in self.files}
        # Spark skips files that it does not find, and empty files.
        self._name_gone(batch.sparkSession, self.planned)
        self.taken.name_changed(
            path for path in self.begun if path in found and found[path] != self.taken.files[path].modified
        )
        for path, modified in found.items():
            self.taken.note(path, modified)
        self.taken.name_packed(self.planned)
        if not self.options.archive or self.taken.archive:
            self.taken.name_renamed(self.planned)
        if self.options.archive:
            self.taken.name_archived_drafts(plain(path) for path in planned_files(batch) if is_draft(path, self.folder))
        return self.read(batch.sparkSession, self.files, self.faults, self.max_unpacked, careful=False)

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        warn(
            "Files of this batch were read twice, with different results, because some of them changed in between. Put missing "
            "records into files with new names."
        )
        return super().rejected_otherwise(judged, written)

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        files = self._files_in(batch)
        self._name_gone(batch.sparkSession, [plain(file.path) for file in self.files])
        return self.read(batch.sparkSession, files, self.faults, self.max_unpacked, careful=True)

    def is_small(self, records: DataFrame) -> bool:
        return len(self.files) <= SMALL_FILES and sum(file.length for file in self.files) <= SMALL_BYTES

    def _name_gone(self, spark: SparkSession, paths: list[str]) -> None:
        """Names those of `paths` that have disappeared. Raises SourceAwayError if one of their local folders is empty, because its disk
        may not be mounted, or if a file has come back since Spark listed the batch.
        """
        missing = [path for path in paths if path not in self.listed]
        gone = [path for path in missing if not is_there(spark, path)]
        if back := next((path for path in missing if path not in gone and self._has_come_back(spark, path)), None):
            raise SourceAwayError(
                f"{back} was not there when its batch began, but is there now; perhaps its disk was mounted late. Start "
                f"again: the next start reads it."
            )
        for folder, path in {os.path.dirname(path): path for path in reversed(gone) if path.startswith("/")}.items():
            while not os.path.isdir(folder):
                folder = os.path.dirname(folder)
            if not os.listdir(folder):
                raise SourceAwayError(
                    f"The folder {folder} is empty, so files of this batch are missing, such as {path}. If its "
                    f"disk is not mounted, mount it and start again. If somebody has removed the files, put any other "
                    f"file there: the stream goes on without them."
                )
        self.taken.name_gone(gone)

    def _has_come_back(self, spark: SparkSession, path: str) -> bool:
        """Whether a file that Spark did not find has content: Spark skips empty files, too."""
        return self.taken.is_as_planned(path) if path.startswith("/") else bool(FileSystem(spark, path).size(path))

    def _files_in(self, batch: DataFrame) -> list[Row]:
        """The files of a batch, without drafts that Spark doesn't recognise (`_site=A/1.json`), files behind a link, and those in a
        folder that has taken the place of a planned file.
        """
        planned = set(self.planned)
        files = [file for file in files_in(batch) if plain(file.path) in planned]
        self.listed = {plain(file.path) for file in files}
        folders = {os.path.dirname(plain(file.path)) for file in files}
        linked = {folder for folder in folders if folder.startswith("/") and is_behind_link(folder, self.taken.folder)}
        if linked and self.options.archive:
            raise PipelineError(
                f"{min(linked)} is, or is inside, a linked folder, and --archive would move its files unread. "
                f"Remove the link."
            )
        not_read = {
            file.path
            for file in files
            if os.path.dirname(plain(file.path)) in linked or os.path.islink(plain(file.path))
        }
        self.taken.name_linked(map(plain, not_read), is_archived=bool(self.options.archive))
        return [file for file in files if file.path not in not_read]

    def explain(self, error: Exception) -> str | None:
        if isinstance(error, SourceAwayError):
            return str(error)
        path = unreadable_file_of(error)
        return away(path, error) if path and plain(path).startswith(plain(self.folder)) else None

    def watch(self) -> None:
        if self.taken.watch():
            deque(paths_in(self.options.input), maxlen=0)  # ends a stream whose listing would follow links forever

    def report(self, progress: dict[str, Any], rows: int) -> Backlog | None:
        return (
            Backlog(self.waiting, f"file{'s' * (self.waiting > 1)} left", len(self.files)) if self.waiting > 0 else None
        )

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Names files that changed while they were read, and files that should be read with --multiline."""
        self.waiting -= len(self.files)
        self.entry, self.begun = self.end, []
        files = self._files_in(batch)
        before = {file.path: file for file in self.files}
        self.taken.name_changed(plain(file.path) for file in files if before.get(file.path, file) != file)
        if files and not self.options.multiline and "malformed_json" in reasons:
            # It does not matter if a file is gone by now: this is only advice.
            with suppress(*SPARK_ERRORS, SourceAwayError, BrokenFileError):
                for path in find_multiline(batch.sparkSession, files, quarantine):
                    warn(
                        f"{path} holds one JSON value, but its lines were read as records. They are in the quarantine; start with "
                        f"--multiline, and give the file a new name."
                    )
