"""Errors of the checkpoint, the tables and their file systems: how each is recognised, and the message for the user."""

import os
import re
import shutil
import tempfile
from pathlib import Path

from pipeline.delta.locks import CONFLICTS
from pipeline.paths import plain
from pipeline.spark.private import OUT_OF_MEMORY
from pipeline.streaming.private import damaged_message
from pipeline.streaming.start import in_use_message
from pipeline.terminal.errors import first_line, java_class, root_cause

from delta.exceptions import ConcurrentTransactionException

NEXT_START = "Nothing is lost: the next start resumes from the last committed offsets."


def explain(error: Exception, table: str, checkpoint: str) -> str | None:
    """Returns what to do about an error of the checkpoint, the tables or their file systems; None for any other error."""
    kind, message = java_class(error), first_line(root_cause(error))
    if isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}"
    if kind == OUT_OF_MEMORY:
        return (
            f"Spark's JVM does not have enough memory for a batch ({message}). Give it more (docs/operations.md, "
            f"Not enough memory) and start again. {NEXT_START}"
        )
    if isinstance(error, CONFLICTS):
        return (
            f"Something else changed {table} or its quarantine each time a batch was about to be written "
            f"({message}). Keep that program stopped while the stream is running, and start again. {NEXT_START}"
        )
    file_of_checkpoint = rf"{re.escape(plain(checkpoint))}/(metadata|(offsets|commits)/\d+) already exists$"
    if (
        isinstance(error, ConcurrentTransactionException)
        or kind == "org.apache.spark.SparkConcurrentModificationException"
        or re.search(file_of_checkpoint, message)
    ):
        return in_use_message(checkpoint)
    if re.match(r"\[MALFORMED_LOG_FILE\]|Incomplete log file$", message):
        return damaged_message(checkpoint, message)
    places = [place for place in (table, checkpoint, tempfile.gettempdir()) if "://" not in place]
    if re.search(r"(No space left on device|Disk quota exceeded|Not enough space)\)?$", message):
        free = {place: shutil.disk_usage(_existing(place)).free for place in places}
        fullest = min(free, key=lambda place: free[place], default=table)
        return f"There is no space left for {fullest} ({message}). Free up some space and start again. {NEXT_START}"
    if re.search(r"(Input/output error|Stale file handle|Too many open files)\)?$", message):
        return f"The operating system reports an error ({message}). Fix it and start again. {NEXT_START}"
    denied = re.search(r"(/.*): Permission denied$", message)
    if denied and os.path.isdir(denied[1]) and not os.access(denied[1], os.R_OK | os.X_OK):
        return unreadable_folder_message(denied[1])
    if kind.endswith("AccessControlException") or re.search(
        r"(Permission denied|Read-only file system|Operation not permitted)\)?$|^Mkdirs failed to create |CANNOT_CREATE_LOG_PATH\b",
        message,
    ):
        closed = next((place for place in places if not os.access(_existing(place), os.W_OK)), table)
        return (
            f"This user may not write to {closed} ({message}). Give the user permission and start again. {NEXT_START}"
        )
    return None


def unreadable_folder_message(folder: str) -> str:
    return f"This user may not read the folder {folder}. Give the user permission, or move the folder, and start again. {NEXT_START}"


def _existing(path: str) -> str:
    """The path itself, or its nearest parent folder that exists."""
    return next(place for place in (path, *map(str, Path(path).parents)) if os.path.exists(place))
