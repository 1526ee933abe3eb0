"""Java's class-data archive, which halves the start-up time of Spark. It is built once, by pipeline/training_run.py.

See https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from pipeline.paths import REPOSITORY
from pipeline.spark.java import SPARK_JARS, Java, cache_folder
from pipeline.terminal.messages import warn
from pipeline.terminal.progress import in_progress

from filelock import FileLock

UNUSED_SECONDS = (
    30 * 86_400
)  # seconds after which an archive counts as left over from an earlier Java; it takes up 200 MB
# Java's options to create and to use an archive. From Java 25 on, the archive also contains Java's method profiles.
OPTIONS = {False: ("-XX:ArchiveClassesAtExit", "-XX:SharedArchiveFile"), True: ("-XX:AOTCacheOutput", "-XX:AOTCache")}


def use_archive(java: Java, jars: list[str]) -> str:
    """Returns the `java` option to use the archive for Java itself, PySpark's jars and `jars`; the archive is stored beside the
    latter. The first call builds the archive, which takes half a minute, and says so.
    """
    make, use = OPTIONS[java.release >= 25]
    path = os.path.realpath(java.path)
    # Java silently rejects the archive if one of the jars has a different path or modification time, as PySpark's jars
    # do in another virtual environment, or in a recreated one.
    times = [str(os.path.getmtime(each)) for each in (path, SPARK_JARS)]
    place = _short_hash(path, str(SPARK_JARS))
    archive = cache_folder() / f"classes-{place}-{_short_hash(*times, *jars)}.jsa"
    if not archive.exists() and os.access(archive.parent, os.W_OK):  # Java also starts without an archive
        with in_progress() as note:
            note("First start: preparing Java's class archive, so that each later start takes half the time …")
            with FileLock(archive.with_suffix(".lock")):
                if not archive.exists():
                    for older in archive.parent.glob("classes-*.jsa"):
                        if place in older.name or older.stat().st_mtime < time.time() - UNUSED_SECONDS:
                            older.unlink()
                    _make(archive, make)
    with suppress(OSError):  # somebody else's, or none
        os.utime(archive)  # marks it as used
    return f"{use}={archive}"


def _short_hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _make(archive: Path, option: str) -> None:
    """Builds the archive in a training run, with the `option` that makes Java write it."""
    draft = archive.with_suffix(".draft")
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline.training_run", option, draft],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        if code := run.wait():
            warn(
                f"Java's class archive could not be built (exit code {code}). This start takes longer; the next one tries again."
            )
        else:
            draft.touch()  # a Java that can't create one also starts with an empty one
            os.replace(draft, archive)  # all or nothing
    finally:
        if run.returncode is None:  # after Ctrl+C: that process and its JVM
            os.killpg(run.pid, signal.SIGKILL)
        draft.unlink(missing_ok=True)
