"""Java's class-data archive, from which Spark starts in about half the time: made once, by common/training_run.py.

What the archive is: https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html
"""

import hashlib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from common.console import in_progress
from common.java import Java, cache_folder
from common.process import REPOSITORY

# The options that make an archive and use it. From Java 25 on it also holds what Java has learned of the methods.
OPTIONS = {False: ("-XX:ArchiveClassesAtExit", "-XX:SharedArchiveFile"), True: ("-XX:AOTCacheOutput", "-XX:AOTCache")}


def use_archive(java: Java, jars: list[str]) -> str:
    """The option by which `java` starts from the archive for itself and `jars`, beside the jars.

    The first call makes the archive, in half a minute, and says so.
    """
    make, use = OPTIONS[java.release >= 25]
    path = os.path.realpath(java.path)
    made_for = hashlib.sha256("\n".join([path, str(os.path.getmtime(path)), *jars]).encode()).hexdigest()[:16]
    archive = cache_folder() / f"classes-{made_for}.jsa"
    if not archive.exists() and os.access(archive.parent, os.W_OK):  # Java starts without one, too
        with in_progress() as note:
            note("First start: preparing Java's class archive, so that each later start takes half the time …")
            with FileLock(archive.with_suffix(".lock")):
                if not archive.exists():
                    _make(archive, make)
    return f"{use}={archive}"


def _make(archive: Path, option: str) -> None:
    """Makes the archive by a training run of which Java is told so by `option`."""
    draft = archive.with_suffix(".draft")
    run = subprocess.Popen([sys.executable, "-m", "common.training_run", option, draft], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        if run.wait() or not draft.exists():  # this Java can't make one: it starts with an empty one, too
            draft.write_bytes(b"")
        os.replace(draft, archive)  # whole or not at all
    finally:
        with suppress(ProcessLookupError):  # after a Ctrl+C: that process and its JVM
            os.killpg(run.pid, signal.SIGKILL)
        draft.unlink(missing_ok=True)
