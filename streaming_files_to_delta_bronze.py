"""JSON files -> Bronze: streams newly added files of sensor readings into a Delta table.

    input/sensor_data/*.json, *.json.gz ──> lake/bronze/sensor_data
                                      └───> lake/bronze/sensor_data_quarantine

A file holds one JSON object per line; with --multiline it holds one JSON value, an object or an array of objects,
pretty-printed or not. Each record is checked against the contract in readings.py (--readings): a valid reading is appended to the
table, any other record to the quarantine beside it, unchanged and with the reason. Every record is in one of the two,
exactly once, whatever is killed. A broken .gz, or a file that has a line (with --multiline: or is itself) of more than 8 MB,
is named and in the quarantine as a whole (unreadable_file), and the others go on. An error of the disk or the store stops the
stream, and the next start reads the file.

Files are taken once, by name: what a file gains after it was read is not read, and such a file is named. So write a file
elsewhere, or under a name that begins with "." or "_" or in such a folder, and rename it when it is complete.

    python3 streaming_files_to_delta_bronze.py
    python3 streaming_files_to_delta_bronze.py --once
    python3 streaming_files_to_delta_bronze.py --input /data/readings --multiline
"""

import common.process  # isort: skip  # noqa: F401 # first, so that Ctrl+C during the other imports is clean too

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, argument_parser, at_least, local_path, location, run, warn
from common.contract import load_contract
from common.internals import BrokenFileError, FileSystem, planned_files
from common.json_files import (
    MAX_PATTERNS,
    away,
    escape_glob,
    files_in,
    find_multiline,
    is_pattern,
    is_there,
    read_lines,
    read_values,
    unread_file,
)
from common.process import REPOSITORY
from common.session import build_spark
from common.source import Left, Source, SourceAwayError
from common.streams import add_stream_options, may_not_read, run_until_stopped, trigger_of
from common.tables import BRONZE, TablePair, bronze_tables
from common.taken_files import TakenFiles, is_draft, plain

TAKEN_NAMES = "[^._]*.{[jJ][sS][oO][nN]{,[lL]},[nN][dD][jJ][sS][oO][nN]}{,.[gG][zZ]}"  # .json, .jsonl, .ndjson, and with .gz


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    spark = build_spark("files-to-bronze", verbose=options.verbose)
    new_files = list_new_files(spark, options)
    source = FileSource(spark, options)
    run_until_stopped(spark, [(new_files, trigger_of(options))], source, bronze_tables(options.table, contract.columns), contract, options)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--input", type=location, default=str(REPOSITORY / "input" / "sensor_data"),
                        help="folder that the files are put into")
    parser.add_argument("--multiline", action="store_true", help="a file is one JSON value, an object or an array")
    parser.add_argument("--archive", type=location, metavar="FOLDER",
                        help="move files there, under their whole path, some time after their records are in the tables")
    add_stream_options(parser, BRONZE, str(REPOSITORY / "checkpoints" / "bronze_sensor"), trigger="5 seconds")
    parser.add_argument("--max-files-per-trigger", type=at_least(1), metavar="N", default=1000,
                        help="the most files that one batch takes")
    parser.add_argument("--max-unpacked", type=at_least(1), metavar="MB", default=1000,
                        help="size of a .gz file, unpacked, beyond which it goes to the quarantine as unreadable_file")
    return parser.parse_args()


def list_new_files(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """New files as a stream: `path`, `length`, `modificationTime` (both of now, each time that they are looked at), and
    `ingest_time`, the start of the batch that takes the file.

    Not what is in them, so that a file that can't be read stops no batch: FileSource reads them.
    """
    if not FileSystem(spark, options.input).is_folder(options.input):
        raise PipelineError(f"No folder {options.input}. Make it, or name another with --input.")
    if options.archive:
        check_archive(options.archive, options.input)
        if linked := next(links_in(options.input), None):
            raise PipelineError(f"{linked} is a link to a folder, whose files --archive would move away unread. Remove it.")
    has_patterns = is_pattern(options.input)
    for path in paths_in(options.input):
        if re.search("[\ud800-\udfff]", path):
            warn(f"{path.encode(errors='backslashreplace').decode()} can't be read: its name is not in UTF-8. Rename it.")
        has_patterns = has_patterns or is_pattern(path)
    most_files = min(options.max_files_per_trigger, MAX_PATTERNS if has_patterns else options.max_files_per_trigger)
    return (
        spark.readStream.format("binaryFile")
        .schema("path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY")
        .option("pathGlobFilter", TAKEN_NAMES)
        .option("recursiveFileLookup", "true")
        .option("maxFilesPerTrigger", most_files)
        # A file is left out if it is so much older than the newest one seen, whose time may lie in any year: so, never.
        .option("maxFileAge", f"{2**63 - 1}ms")
        .option("ignoreMissingFiles", "true")  # renamed or removed since it was listed
        .options(**{"cleanSource": "archive", "sourceArchiveDir": options.archive} if options.archive else {})
        .load(escape_glob(options.input))
        .select("path", "length", "modificationTime", F.current_timestamp().alias("ingest_time"))
    )


def check_archive(archive: str, folder: str) -> None:
    """Raises PipelineError if Spark can't move files from `folder` to `archive`, or would read them there again."""
    place, source = (urlsplit(path) if (local := local_path(path)) is None else SplitResult("", "", os.path.realpath(local), "", "")
                     for path in (archive, folder))
    one, other = (f"/{each.path.strip('/')}".rstrip("/") + "/" for each in (place, source))
    if place[:2] != source[:2] or one.startswith(other) or other.startswith(one):
        raise PipelineError(f"{archive} can't be the archive of {folder}: it has to be a folder of the same store, and neither of the "
                            f"two may be in the other. Name another with --archive.")
    if not place.scheme:
        with suppress(OSError):  # what can't be made can't be written to
            os.makedirs(place.path, exist_ok=True)
        for path in (place.path, source.path):  # Spark would silently leave the files where they are
            if not os.access(path, os.W_OK | os.X_OK):
                raise PipelineError(f"This user may not move files from {folder} to {archive}: {path} can't be written to. Give it "
                                    f"permission, or name another folder with --archive.")


def count_waiting(taken: TakenFiles, options: argparse.Namespace) -> int:
    """How many files were not taken yet; 0 if the folder or the checkpoint is not on this machine."""
    if None in (local_path(options.input), local_path(options.checkpoint)):
        return 0
    taken.read_log()
    return len({path for path in paths_in(options.input) if re.search(r"(?i)\.(jsonl?|ndjson)(\.gz)?$", path)} - taken.files.keys())


def paths_in(folder: str) -> Iterator[str]:
    """The files in a folder of this machine and in those inside it, without drafts and links; of a URI none.

    Raises PipelineError if one of the folders may not be read, or is a link back.
    """
    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):  # not one that has just gone
            raise PipelineError(may_not_read(error.filename)) from error

    for place, folders, names in os.walk(local_path(folder) or "", onerror=refuse):
        folders[:] = (name for name in folders if not is_draft(name))
        for name in folders:
            if is_loop(os.path.join(place, name), folder):
                raise PipelineError(f"{os.path.join(place, name)} is a link that leads back to {folder}, where Spark would follow it round "
                                    f"and round. Remove it.")
        yield from (path for name in names if not is_draft(name) and not os.path.islink(path := os.path.join(place, name)))


def links_in(folder: str) -> Iterator[str]:
    """The links to folders in a folder of this machine and in those inside it; of a URI none."""
    for place, folders, _ in os.walk(local_path(folder) or ""):
        yield from (path for name in folders if os.path.islink(path := os.path.join(place, name)))


def is_behind_link(path: str, folder: str) -> bool:
    """Whether the way from `folder`, which may itself be a link, to a folder in it has a link."""
    return os.path.realpath(path) != os.path.normpath(os.path.join(os.path.realpath(folder), os.path.relpath(path, folder)))


def is_loop(path: str, folder: str) -> bool:
    """Whether a path is a link to `folder` or to a folder above or inside it."""
    one, other = (os.path.realpath(each) + "/" for each in (path, local_path(folder) or ""))
    return os.path.islink(path) and (one.startswith(other) or other.startswith(one))


class FileSource(Source):
    """Files, whose names come in the batches, as the source of a stream (common/source.py)."""

    def __init__(self, spark: SparkSession, options: argparse.Namespace):
        self.folder = FileSystem(spark, options.input).qualified(options.input)
        self.taken = TakenFiles(spark, options.checkpoint, self.folder, options.archive)
        self.options, self.waiting = options, 0  # files, if that is known
        self.is_multiline = options.multiline
        self.read = read_values if self.is_multiline else read_lines
        self.max_unpacked = options.max_unpacked * 1_000_000
        self.mode = "with --multiline" if self.is_multiline else "without --multiline"
        self.begun: list[str] = []  # the files of a batch that an earlier run has begun
        self.entry = -1  # of the log of taken files: the last one that is done
        self.files: list[Row] = []  # those of the running batch, as they were when it began
        self.faults: dict[str, str] = {}  # those of them that are to blame for it if they can't be read

    def check_unread(self, spark: SparkSession, tables: TablePair, unread: dict[str, Any], planned: dict[str, Any], checkpoint: str,
                     last_records: str | None) -> None:
        """Names the files that have changed since they were read, or since they were to be. `last_records`: `TakenFiles.read_later`."""
        self.taken.read_log()
        self.taken.check_folder()
        for path, modified in json.loads(last_records or "{}").items():
            self.taken.note(path, modified)
        self.entry = unread.get("logOffset", -1)
        self.waiting = count_waiting(self.taken, self.options) if self.options.once else 0
        self.begun = self.taken.after(self.entry)
        self.taken.name_changed(self.taken.changed(self.taken.files))

    def contents(self, batch: DataFrame, end: dict[str, Any]) -> dict[str, Any]:
        paths = planned_files(batch)
        return {"files": len(paths), "sha256": hashlib.sha256("\n".join(paths).encode()).hexdigest()}

    def remember(self, spark: SparkSession, last_records: str | None) -> str | None:
        return json.dumps(self.taken.read_later)

    def read_batch(self, batch: DataFrame) -> DataFrame:
        self.files, self.faults = self._files_in(batch), {}
        self.taken.read_log()
        found = {plain(file.path): file.modified for file in self.files}
        # Spark passes over a file that it does not find, and over an empty one.
        planned = self.taken.after(self.entry)
        gone = [path for path in planned if path not in found and not is_there(batch.sparkSession, path)]
        self._name_gone(gone)
        self.taken.name_changed(path for path in self.begun if path in found and found[path] != self.taken.files[path].modified)
        for path, modified in found.items():
            self.taken.note(path, modified)
        self.taken.name_packed(planned)
        if not self.options.archive:
            self.taken.name_renamed(planned)
        if self.options.archive:
            self.taken.name_archived_drafts(plain(path) for path in planned_files(batch) if is_draft(path, self.folder))
        return self.read(batch.sparkSession, self.files, self.faults, self.max_unpacked, careful=False)

    def rejected_otherwise(self, judged: DataFrame, written: DataFrame) -> DataFrame:
        warn("Files of this batch were read twice, with different results: some of them have changed in between. Put what is missing into "
             "files of other names.")
        return super().rejected_otherwise(judged, written)

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        files = self._files_in(batch)
        there = {file.path for file in files}
        self._name_gone([path for file in self.files
                         if file.path not in there and not is_there(batch.sparkSession, path := plain(file.path))])
        return self.read(batch.sparkSession, files, self.faults, self.max_unpacked, careful=True)

    def _name_gone(self, paths: list[str]) -> None:
        """Names files that are gone. Raises SourceAwayError if a folder of theirs on this machine is empty: its disk may be away."""
        for folder, path in {os.path.dirname(path): path for path in reversed(paths) if path.startswith("/")}.items():
            if not os.path.isdir(folder) or not os.listdir(folder):
                raise SourceAwayError(f"The folder {folder} is empty or gone, and with it files of this batch, {path} among them. If its "
                                      f"disk is not mounted, mount it and start again. If somebody has removed the files, put any other "
                                      f"file there: the stream goes on without them.")
        self.taken.name_gone(paths)

    def _files_in(self, batch: DataFrame) -> list[Row]:
        """The files of a batch, without drafts that Spark doesn't recognize (`_site=A/1.json`) and files reached through a link."""
        files = [file for file in files_in(batch) if not is_draft(file.path, self.folder)]
        folders = {os.path.dirname(plain(file.path)) for file in files}
        linked = {folder for folder in folders if folder.startswith("/") and is_behind_link(folder, self.taken.folder)}
        not_read = {file.path for file in files if os.path.dirname(plain(file.path)) in linked or os.path.islink(plain(file.path))}
        self.taken.name_linked(map(plain, not_read), is_archived=bool(self.options.archive))
        return [file for file in files if file.path not in not_read]

    def explain(self, error: Exception) -> str | None:
        if isinstance(error, SourceAwayError):
            return str(error)
        path = unread_file(error)
        return away(path, error) if path and plain(path).startswith(plain(self.folder)) else None

    def watch(self) -> None:
        self.taken.watch()

    def left(self, progress: dict[str, Any], rows: int) -> Left | None:
        return Left(self.waiting, f"file{'s' * (self.waiting > 1)} left", len(self.files)) if self.waiting > 0 else None

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Names files that changed while they were taken, and those that should be read with --multiline."""
        self.waiting -= len(self.files)
        self.entry, self.begun = self.taken.last_entry, []
        files = self._files_in(batch)
        before = {file.path: file for file in self.files}
        self.taken.name_changed(plain(file.path) for file in files if before.get(file.path, file) != file)
        if files and not self.is_multiline and "malformed_json" in reasons:
            with suppress(PySparkException, Py4JJavaError, SourceAwayError, BrokenFileError):  # one is gone by now; this is only advice
                for path in find_multiline(batch.sparkSession, files, quarantine):
                    warn(f"{path} holds one JSON value, and its lines were read as records. They are in the quarantine; start with "
                         f"--multiline, and give the file a new name.")


if __name__ == "__main__":
    run(main)
