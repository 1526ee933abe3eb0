"""Locks that make the writers of a table on a local disk take turns, and retries after conflicts elsewhere."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from pipeline.paths import local_path
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import warn
from pipeline.terminal.signals import StopFlag, Stopped

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentWriteException,
    DeltaConcurrentModificationException,
    MetadataChangedException,
    ProtocolChangedException,
)

POLL_SECONDS = 0.01  # at full speed, a stream leaves its tables unlocked for a tenth of a second between two batches
QUIET_SECONDS = 3  # seconds of waiting before a message says so
MAX_ATTEMPTS = 5
# All of Delta's conflicts that a retry can resolve. ConcurrentTransactionException is not among them: it means that
# another stream with the same checkpoint has written the same batch.
CONFLICTS = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentWriteException,
    DeltaConcurrentModificationException,
    MetadataChangedException,
    ProtocolChangedException,
)

Result = TypeVar("Result")
_released_at = float("-inf")  # when this process last released a lock


@contextmanager
def write_lock(table: str, stopping: StopFlag | None = None) -> Iterator[None]:
    """Locks the table at the path `table` against other writers; waits while another writer has the lock.

    On a local disk, Delta checks that the next version does not exist, and then renames its commit to that version. If two
    processes do so at the same moment, both succeed and the second commit replaces the first. Hold the lock for a whole
    operation, not only for its commit, because VACUUM deletes files that were written earlier and are not committed yet.

    Raises Stopped if `stopping` is set while waiting. A table that does not exist, or is in another store (`s3a://…`), is not
    locked.
    """
    global _released_at
    stopping = stopping or StopFlag()
    # A process that has been waiting gets its turn before the one that has just had the lock.
    time.sleep(max(0, _released_at + 2 * POLL_SECONDS - time.monotonic()))
    deadline = time.monotonic() + QUIET_SECONDS
    while (folder := _locked_folder(table)) is None:
        if stopping.wait(POLL_SECONDS):
            raise Stopped
        if time.monotonic() > deadline:
            warn(f"Waiting for another process that is writing to {table} …")
            deadline = float("inf")
    try:
        yield
    finally:
        if folder >= 0:
            os.close(folder)
            _released_at = time.monotonic()


def _locked_folder(table: str) -> int | None:
    """Returns the table's folder, opened and locked; -1 if it can't be locked here, None if another writer has the lock.

    The lock is on the folder itself and not on a file in it. It is therefore independent of the path by which the table is
    named, requires no write permission, and does not recreate a deleted table. The kernel releases it when the process ends.
    """
    place = local_path(table)
    if place is None:
        return -1
    try:
        folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(folder), os.stat(place)):  # otherwise the folder was replaced in the meantime
                return folder
        os.close(folder)
        return None
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as error:
        raise PipelineError(
            f"The folder {table} can't be locked against other writers: {error.strerror}. Give this user permission to "
            f"read it, or choose a file system that has locks (flock)."
        ) from error


def with_retries(write: Callable[[], Result]) -> Result:
    """Returns the result of `write`, and calls it again if it conflicts with another writer's commit."""
    for attempt in range(1, MAX_ATTEMPTS):
        try:
            return write()
        except CONFLICTS:
            time.sleep(attempt)
    return write()
