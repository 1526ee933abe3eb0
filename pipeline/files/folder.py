"""The input folder: the stream of its new files, and which of the paths in it are files to read."""

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

from pipeline.files.taken import TakenFiles, is_draft
from pipeline.paths import local_path, plain
from pipeline.spark.file_system import FileSystem
from pipeline.spark.globs import MAX_PATTERNS, escape_glob, is_pattern
from pipeline.streaming.errors import unreadable_folder_message
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import warn

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

# Matches .json, .jsonl and .ndjson, each also with .gz.
FILE_NAMES = "[^._]*.{[jJ][sS][oO][nN]{,[lL]},[nN][dD][jJ][sS][oO][nN]}{,.[gG][zZ]}"


def list_new_files(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """New files as a stream: `path`, `length` and `modificationTime` (both current whenever they are evaluated), and `ingest_time`,
    the start of the batch that reads the file.

    The stream does not read the files themselves, so that an unreadable file can't stop a batch; FileSource reads them.
    """
    if not FileSystem(spark, options.input).is_folder(options.input):
        raise PipelineError(f"There is no folder {options.input}. Create it, or name another with --input.")
    if ":" in plain(options.input).split("://")[-1] and is_pattern(options.input):
        raise PipelineError(
            f"Spark can't list {options.input}, whose path has both a colon and one of the wildcards []{{}}*?. Rename a folder."
        )
    if options.archive:
        check_archive(options.archive, options.input)
        if linked := next(links_in(options.input), None):
            raise PipelineError(
                f"{linked} is a link to a folder, whose files --archive would move away unread. Remove the link."
            )
    has_patterns = is_pattern(options.input)
    for path in paths_in(options.input):
        if re.search("[\ud800-\udfff]", path):
            warn(
                f"{path.encode(errors='backslashreplace').decode()} can't be read: its name is not in UTF-8. Rename it."
            )
        has_patterns = has_patterns or is_pattern(path)
    most_files = min(options.max_files_per_trigger, MAX_PATTERNS if has_patterns else options.max_files_per_trigger)
    return (
        spark.readStream.format("binaryFile")
        .schema("path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY")
        .option("pathGlobFilter", FILE_NAMES)
        .option("recursiveFileLookup", "true")
        .option("maxFilesPerTrigger", most_files)
        # Spark skips files that are more than this much older than the newest one seen. The newest one may have a time in
        # any year, so no file is ever skipped.
        .option("maxFileAge", f"{2**63 - 1}ms")
        .option("ignoreMissingFiles", "true")  # renamed or removed since it was listed
        .options(**{"cleanSource": "archive", "sourceArchiveDir": options.archive} if options.archive else {})
        .load(escape_glob(options.input))
        .select("path", "length", "modificationTime", F.current_timestamp().alias("ingest_time"))
    )


def check_archive(archive: str, folder: str) -> None:
    """Raises PipelineError if Spark can't move files from `folder` to `archive`, or would read them again there."""
    place, source = (
        urlsplit(path) if (local := local_path(path)) is None else SplitResult("", "", os.path.realpath(local), "", "")
        for path in (archive, folder)
    )
    one, other = (f"/{each.path.strip('/')}".rstrip("/") + "/" for each in (place, source))
    if place[:2] != source[:2] or one.startswith(other) or other.startswith(one):
        raise PipelineError(
            f"{archive} can't be the archive of {folder}: it has to be a folder in the same store, and neither may "
            "contain the other. Name another with --archive."
        )
    if not place.scheme:
        with suppress(OSError):  # if it can't be created, the check below reports it
            os.makedirs(place.path, exist_ok=True)
        for path in (place.path, source.path):  # otherwise Spark would silently leave the files where they are
            if not os.access(path, os.W_OK | os.X_OK):
                raise PipelineError(
                    f"This user may not move files from {folder} to {archive}: {path} can't be written to. Give this "
                    f"user permission, or name another folder with --archive."
                )


def count_waiting(taken: TakenFiles, options: argparse.Namespace) -> int:
    """The number of files not read yet; 0 if the folder or the checkpoint is not on this machine."""
    if None in (local_path(options.input), local_path(options.checkpoint)):
        return 0
    taken.read_log()
    return len(
        {path for path in paths_in(options.input) if re.search(r"(?i)\.(jsonl?|ndjson)(\.gz)?$", path)}
        - taken.files.keys()
    )


def paths_in(folder: str) -> Iterator[str]:
    """The files in a local folder and its subfolders, without drafts and links; none for a URI.

    Raises PipelineError if a folder can't be read, or contains a link that Spark might follow forever.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, PermissionError):  # a folder that has just disappeared is fine
            raise PipelineError(unreadable_folder_message(error.filename)) from error

    for place, folders, names in os.walk(local_path(folder) or "", onerror=refuse):
        folders[:] = (name for name in folders if not is_draft(name))
        for name in folders:
            path = os.path.join(place, name)
            if is_loop(path, folder):
                raise PipelineError(
                    f"{path} is a link that leads back to {folder}, so Spark would follow it forever. Remove it."
                )
            if os.path.islink(path) and (further := next(links_in(path), None)):
                raise PipelineError(
                    f"{path} is a link to a folder that contains another link, {further}, and Spark might follow them "
                    f"forever. Remove the first link."
                )
        yield from (
            path for name in names if not is_draft(name) and not os.path.islink(path := os.path.join(place, name))
        )


def links_in(folder: str) -> Iterator[str]:
    """The links to folders in a local folder and its subfolders; none for a URI."""
    for place, folders, _ in os.walk(local_path(folder) or ""):
        yield from (path for name in folders if os.path.islink(path := os.path.join(place, name)))


def is_behind_link(path: str, folder: str) -> bool:
    """Whether there is a link on the way from `folder` (which may itself be a link) to a folder inside it."""
    return os.path.realpath(path) != os.path.normpath(
        os.path.join(os.path.realpath(folder), os.path.relpath(path, folder))
    )


def is_loop(path: str, folder: str) -> bool:
    """Whether a path is a link to `folder`, or to a folder above or inside it."""
    one, other = (os.path.realpath(each) + "/" for each in (path, local_path(folder) or ""))
    return os.path.islink(path) and (one.startswith(other) or other.startswith(one))
