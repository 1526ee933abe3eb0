"""The Java installation that runs the pipeline, and the jars it needs."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import quoteattr

from pipeline.terminal.errors import PipelineError, first_line
from pipeline.terminal.progress import in_progress

import pyspark
from filelock import FileLock

SPARK_JARS = Path(pyspark.__file__).parent / "jars"
SUMS = Path(__file__).with_name("jars.sha256")
SCALA = "2.13"  # the Scala version that the pyspark package is built with

DELTA = f"io.delta:delta-spark_{pyspark.__version__[:3]}_{SCALA}:{version('delta-spark')}"
KAFKA_SOURCE = f"org.apache.spark:spark-sql-kafka-0-10_{SCALA}:{pyspark.__version__}"

# Long-term support releases that Spark 4.2 runs on: https://spark.apache.org/docs/4.2.0/#downloading
SUPPORTED_JAVA = (17, 21, 25)
INSTALL_JAVA = (
    "Install OpenJDK 17, 21 or 25 (Debian, Ubuntu: apt install openjdk-17-jre-headless) or set JAVA_HOME to one."
)


class Java(NamedTuple):
    path: str
    release: int


def find_java() -> Java:
    """The Java that Spark is going to use: `$JAVA_HOME/bin/java`, or else `java` on the PATH.

    Raises PipelineError if there is none, or if Spark can't run on it.
    """
    home = os.environ.get("JAVA_HOME")
    java = os.path.join(home, "bin", "java") if home else shutil.which("java")
    if not java or not shutil.which(java):
        raise PipelineError(f"No Java found{' in JAVA_HOME=' + home if home else ''}. {INSTALL_JAVA}")
    run = subprocess.run([java, "--list-modules"], capture_output=True, text=True, errors="replace")
    if run.returncode and "--list-modules" not in run.stdout + run.stderr:  # an option that Java 8 does not know
        raise PipelineError(f"{java} can't be run: {first_line(run.stdout + run.stderr)}. {INSTALL_JAVA}")
    version = re.search(r"^java\.base@(\d+)(?:\.(\d+)\.(\d+))?", run.stdout, re.MULTILINE)
    if not version or int(version[1]) not in SUPPORTED_JAVA:
        raise PipelineError(
            f"{java} is {'Java ' + version[1] if version else 'older than Java 9'}, but Spark needs Java "
            f"17, 21 or 25. {INSTALL_JAVA}"
        )
    # Earlier versions can corrupt data with the G1 collector, which a cluster's executors use:
    # https://issues.apache.org/jira/browse/SPARK-55852
    if version[1] == "25" and (int(version[2] or 0), int(version[3] or 0)) < (0, 3):
        raise PipelineError(
            f"{java} is Java {version[0].removeprefix('java.base@')}, which can corrupt data. Use 25.0.3 or "
            f"later, or OpenJDK 17 or 21."
        )
    if "jdk.incubator.vector@" not in run.stdout:
        raise PipelineError(
            f"{java} lacks the module jdk.incubator.vector, which Spark loads at startup. {INSTALL_JAVA}"
        )
    return Java(java, int(version[1]))


def require_own(folder: Path | str, option: str) -> None:
    """Raises PipelineError if other users could change the content of a folder or the target of a link. `option`: names another
    folder.
    """
    link, status = os.lstat(folder), os.stat(folder)
    if strangers := {link.st_uid, status.st_uid} - {os.getuid(), 0}:
        problem = f"belongs to another user ({min(strangers)})"
    elif status.st_mode & 0o002:
        problem = "can be changed by any user of this machine"
    else:
        return
    raise PipelineError(
        f"The folder {folder} {problem}, who could make this script run other code or overwrite other files. Name another folder "
        f"with {option}, or give it to this user alone (chown, chmod)."
    )


def cache_folder() -> Path:
    """The folder for jars and Java's class archive: `$PIPELINE_CACHE`, or by default Ivy's own folder, `~/.ivy2`.

    Raises PipelineError if the folder can't be used.
    """
    elsewhere = "Name another folder for the jars: export PIPELINE_CACHE=/path/to/folder."
    try:
        folder = Path(os.environ.get("PIPELINE_CACHE") or Path.home() / ".ivy2").absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except RuntimeError:
        raise PipelineError(f"This user has no home folder to keep Spark's jars in. {elsewhere}") from None
    except OSError as error:
        raise PipelineError(
            f"The folder {folder} for Spark's jars can't be created: {error.strerror}. {elsewhere}"
        ) from None
    require_own(folder, "PIPELINE_CACHE")
    if os.pathsep in str(folder):
        raise PipelineError(
            f'The folder {folder} has a "{os.pathsep}" in its path, at which Java splits its class path. {elsewhere}'
        )
    return folder


def spark_jars(*coordinates: str) -> list[str]:
    """The paths of the jars for Maven `coordinates` ("group:artifact:version") that Spark does not ship."""
    shipped = {re.sub(r"-\d[^-]*(-\w+)?\.jar$", "", jar.name) for jar in SPARK_JARS.glob("*.jar")}
    return resolve_jars(coordinates, without=shipped)


def resolve_jars(coordinates: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """The paths of the jars of Maven `coordinates` and of their dependencies, except the artifacts named in `without`.

    The first call downloads them into `cache_folder()` with the Ivy that comes with pyspark, and says so. It checks them
    against `SUMS`. Later calls use a list stored beside them. Raises PipelineError if a jar can't be downloaded, or is not the
    expected one.
    """
    coordinates = sorted(coordinates)
    cache = cache_folder()
    known = cache / ("_".join(coordinates).replace(":", "-") + ".checked")
    if jars := _listed_in(known):
        return jars
    if not os.access(cache, os.W_OK):
        raise PipelineError(
            f"This user may not write Spark's jars to {cache}. Give this user permission, or name another folder: "
            f"export PIPELINE_CACHE=/path/to/folder."
        )
    with in_progress() as note:
        note(f"First start: downloading {', '.join(coordinates)} with dependencies to {cache} …")
        with FileLock(cache / "first-start.lock"):  # Ivy's cache can't be shared by two processes
            if not _listed_in(known):
                _download(coordinates, without, known)
            return _listed_in(known)


def require_known(jars: Iterable[Path]) -> None:
    """Raises PipelineError if the SHA-256 sum of a jar is not the one in `SUMS`."""
    sums = {name: sum_ for sum_, name in map(str.split, SUMS.read_text(encoding="utf-8").splitlines())}
    for jar in jars:
        if hashlib.sha256(jar.read_bytes()).hexdigest() != sums.get(jar.name):
            raise PipelineError(
                f"{jar} is not the file that this project was tested with: {SUMS} has "
                f"{'a different SHA-256 sum' if jar.name in sums else 'no SHA-256 sum'} for it. Remove it and start again; if "
                f"you have changed a version yourself, add the sums of its jars there (sha256sum)."
            )


def _listed_in(known: Path) -> list[str]:
    """The jars in a list written by `_download`; empty if one of them is missing."""
    jars = known.read_text(encoding="utf-8").strip().split(os.pathsep) if known.exists() else []
    return jars if all(map(os.path.exists, jars)) else []


def _download(coordinates: list[str], without: Iterable[str], known: Path) -> None:
    """Downloads the jars into the folder of the file `known`, and writes their list to that file."""
    dependencies = "".join(
        '<dependency org={} name={} rev={} conf="default"/>'.format(*map(quoteattr, coordinate.split(":")))
        for coordinate in coordinates
    )
    exclusions = "".join(f"<exclude module={quoteattr(name)}/>" for name in sorted(without))
    with tempfile.TemporaryDirectory() as folder:
        module, classpath = Path(folder, "ivy.xml"), Path(folder, "classpath")
        module.write_text(
            '<ivy-module version="2.0"><info organisation="pipeline" module="jars"/>'
            f"<dependencies>{dependencies}{exclusions}</dependencies></ivy-module>"
        )
        ivy = subprocess.run(
            [
                find_java().path,
                "-jar",
                *map(str, SPARK_JARS.glob("ivy-*.jar")),
                "-ivy",
                str(module),
                "-cache",
                str(known.parent),
                "-confs",
                "default",
                "-types",
                "jar",
                "bundle",
                "-cachepath",
                str(classpath),
            ],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if ivy.returncode != 0 or not classpath.exists():
            problems = [
                line.strip(" \t:")
                for line in (ivy.stdout + ivy.stderr).splitlines()
                if re.search(r"not found|failed|exception|unresolved", line, re.IGNORECASE)
            ]
            raise PipelineError(
                f"Could not download {', '.join(coordinates)} from Maven Central ({'; '.join(problems[:2])}). Check the "
                f"connection or the proxy (JAVA_TOOL_OPTIONS=-Dhttps.proxyHost=…) and start again."
            )
        require_known(map(Path, classpath.read_text(encoding="utf-8").strip().split(os.pathsep)))
        draft = known.with_suffix(".draft")
        shutil.copy(classpath, draft)
        os.replace(draft, known)  # all or nothing
