"""The folder for Spark's temporary files. If a script is killed, a later start removes its folder."""

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

PREFIX = "pipeline-spark-"


def scratch_folder() -> str:
    """Creates a folder for this user alone, which is removed when the process ends. Also removes those of killed processes."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _lock(left):
            shutil.rmtree(left, ignore_errors=True)
    # Under its final name, it could be removed by another start before it is locked.
    draft = Path(tempfile.mkdtemp(prefix="new-"))
    _lock(draft)
    folder = draft.rename(draft.with_name(f"{PREFIX}{draft.name}"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


def _lock(folder: Path) -> bool:
    """Locks a folder of this user until the process ends. Returns False if another process has the lock, or there is no such
    folder.
    """
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    with suppress(BlockingIOError):
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(number).st_uid == os.getuid():
            return True
    os.close(number)  # another user may have thousands of them
    return False
