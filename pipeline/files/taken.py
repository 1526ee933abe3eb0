"""The files that a stream has read, as recorded by Spark in its checkpoint, and those that have changed since."""

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pipeline.files.private import FileLog, TakenFile
from pipeline.paths import local_path, plain
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import warn

from pyspark.sql import SparkSession

MAX_NAMED_FILES = 10  # files named at once; the rest are only counted
ROUND_SECONDS = 60  # seconds
AT_ONCE = 1000  # files that one call of `watch` checks, in a few milliseconds


def is_draft(path: str, folder: str = "") -> bool:
    """Whether the name of a file, or of a folder above it up to `folder`, begins with "_" or "."."""
    begin = f"{folder.rstrip('/')}/" if folder else ""
    inner = path[len(begin) :] if path.startswith(begin) else os.path.basename(path)
    return any(name[:1] in ("_", ".") for name in inner.split("/"))


def _are_on_one_disk(*paths: str) -> bool:
    try:
        return len({os.stat(local_path(path) or "").st_dev for path in paths}) == 1
    except OSError:
        return False


class TakenFiles:
    """The files that a stream has read, by path (see `plain`), from Spark's log of them."""

    def __init__(self, spark: SparkSession, checkpoint: str, folder: str, archive: str | None):
        self.log, self.checkpoint, self.folder = FileLog(spark, checkpoint), checkpoint, plain(folder)
        # A file that is moved to another disk is copied, and gets a new modification time.
        self.archive = local_path(archive) if archive and _are_on_one_disk(archive, folder) else None
        self.files: dict[str, TakenFile] = {}
        # Modification times of files when they were read, where they differ from Spark's log.
        self.read_later: dict[str, int] = {}
        self.last_entry = -1  # the last entry that was read
        self.named: set[str] = set()
        self.round: Iterator[str] = iter(())  # the files that the current round of `watch` has yet to check
        self.next_round = time.monotonic() + ROUND_SECONDS

    def read_log(self) -> None:
        """Reads new entries of the log. Drafts are listed there, but the stream skips them, and so they are left out."""
        self.last_entry, new = self.log.after(self.last_entry)
        self.files |= {path: file for path, file in new.items() if not is_draft(path, self.folder)}

    def check_folder(self) -> None:
        """Raises PipelineError if the folder has the same files under a different path, so that they would be read again. For a
        URI, the content of the folder does not matter.
        """
        folder, folders = f"{self.folder.rstrip('/')}/", {f"{os.path.dirname(path)}/" for path in self.files}
        if not folders or any(folder.startswith(other) or other.startswith(folder) for other in folders):
            return
        if local_path(folder) is None and folder.startswith(os.path.commonprefix([*folders]).rpartition("/")[0] + "/"):
            return
        taken = {(os.path.basename(path), file.modified) for path, file in self.files.items()}
        there = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
        if local_path(folder) is None or any((os.path.basename(path), self._modified(path)) in taken for path in there):
            raise PipelineError(
                f"The checkpoint {self.checkpoint} belongs to another input folder: the stream has read files such as "
                f"{next(iter(self.files))}, and none in {self.folder}. Under a different path, every file would be read "
                f"again. Use the same --input as before, or give {self.folder} its own --table and --checkpoint."
            )

    def between(self, entry: int, last: int) -> list[str]:
        """The files of the entries after `entry`, up to `last`."""
        newest_first = reversed(self.files)  # they are in the order of the log
        later = itertools.takewhile(lambda path: self.files[path].entry > entry, newest_first)
        return [path for path in later if self.files[path].entry <= last]

    def note(self, path: str, modified: int) -> None:
        """Records the modification time of a file that is being read. It may be later than the one in Spark's log."""
        if path in self.files and self.files[path].modified != modified:
            self.files[path] = self.files[path]._replace(modified=modified)
            self.read_later[path] = modified

    def watch(self) -> bool:
        """Names files that have changed. Checks some of them in each call, so that all of them are checked once a minute, or less
        often if there are many. Returns whether a new round begins.
        """
        self.name_changed(self.changed(itertools.islice(self.round, AT_ONCE)))
        if is_due := time.monotonic() >= self.next_round:
            self.round = itertools.chain(self.round, iter(list(self.files)))
            self.next_round = time.monotonic() + max(ROUND_SECONDS, len(self.files) / AT_ONCE)
        return is_due

    def is_as_planned(self, path: str) -> bool:
        """Whether a local file has content and the modification time in Spark's log."""
        with suppress(OSError):
            status = os.stat(path)
            return status.st_size > 0 and status.st_mtime_ns // 1_000_000 == self.files[path].modified
        return False

    def changed(self, paths: Iterable[str]) -> list[str]:
        """Those of `paths` that are local and were modified after they were read."""
        return [
            path
            for path in paths
            if (modified := self._modified(path)) is not None and modified != self.files[path].modified
        ]

    def name_changed(self, paths: Iterable[str]) -> None:
        """Reports each of these files once, as changed after it was read."""
        self._name(
            paths,
            "has changed since it was read, and a file is read only once, so later additions may be missing from "
            "the tables. Put missing records (see source_file) into a file with a new name. Write files under a "
            "name that begins with "
            '"_", and rename them when they are complete.',
        )

    def name_gone(self, paths: list[str]) -> None:
        """Reports each of these files once, as gone before it was read."""
        self._name(
            paths,
            "disappeared before it was read. If it was not renamed, and no row has it as its source_file, put it back under another name.",
            at_most=len(paths),
        )

    def name_linked(self, paths: Iterable[str], is_archived: bool) -> None:
        """Reports each of these files once, as not read, or even archived unread, because of a link."""
        what_next = (
            "--archive moves the file away all the same. Remove the link, and put the file back"
            if is_archived
            else "Move the file there instead, under another name"
        )
        self._name(paths, f"is not read: links in the input folder are not followed. {what_next}.")

    def name_archived_drafts(self, paths: Iterable[str]) -> None:
        """Reports each of these drafts once, as about to be archived unread."""
        self._name(
            paths,
            'is a draft and is not read, but --archive moves it: Spark does not skip a folder with "=" in its name. '
            "Rename the folder.",
        )

    def name_packed(self, paths: Iterable[str]) -> None:
        """Warns once about each file that looks like an earlier one, compressed or decompressed in place."""
        taken = {
            path: self.files.get(path.removesuffix(".gz") if path.endswith(".gz") else f"{path}.gz") for path in paths
        }
        self._name(
            (
                path
                for path, other in taken.items()
                if other
                and (other.entry < self.files[path].entry or path.endswith(".gz"))
                and other.modified // 1000 == self.files[path].modified // 1000
            ),
            "looks like a file that was read before and then compressed or decompressed in place: it has the same time and, apart "
            "from .gz, the same name. If so, its records are now in the tables twice. Compress files elsewhere, or use --archive.",
        )

    def name_renamed(self, paths: Iterable[str]) -> None:
        """Warns once about each file that looks like an earlier one, renamed or moved within the folder."""

        def mark(path: str) -> tuple[int, str]:
            # A rename keeps the time to the nanosecond, whereas many files may share a time to the second.
            modified = self.files[path].modified
            return modified, "" if modified % 1000 else os.path.basename(path)

        new = {mark(path): path for path in paths}
        renamed = {
            new[mark(path)]
            for path, file in self.files.items()
            if mark(path) in new and path != new[mark(path)] and path.startswith("/")
            # Its name may be that of another file by now.
            if self._modified(path) != file.modified
        }
        self._name(
            sorted(renamed),
            "looks like a file that was read before and then renamed or moved: it has the same time, and the other "
            "one is gone. If so, its records are now in the tables twice. Move files out of the folder once "
            "they have been read, or use --archive.",
        )

    def _name(self, paths: Iterable[str], what: str, at_most: int = MAX_NAMED_FILES) -> None:
        new = [path for path in paths if path not in self.named]
        self.named.update(new)
        for path in new[:at_most]:
            warn(f"{path} {what}")
        if len(new) > at_most:
            warn(f"The same applies to {len(new) - at_most:,} more files.")

    def _modified(self, path: str) -> int | None:
        """The modification time of a local file or of its archived copy (milliseconds since 1970); None if there is neither."""
        places = [path, *([f"{self.archive}{path}"] if self.archive else [])]
        for place in places if path.startswith("/") else ():
            with suppress(OSError):
                return os.stat(place).st_mtime_ns // 1_000_000
        return None
