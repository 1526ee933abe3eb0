"""Java's class-data archive, from which Spark starts in about half the time: made once, by a short run of the pipeline.

`python3 -m common.class_archive FILE` is that run; `class_archive` starts it. What the archive is:
https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html
"""

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from pyspark import SparkContext
from pyspark.sql import functions as F

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
        print("First start: preparing Java's class archive, so that each later start takes half the time …", file=sys.stderr)
        draft = archive.with_suffix(f".{os.getpid()}")
        run = subprocess.Popen([sys.executable, "-m", __name__, make, draft], cwd=REPOSITORY, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            if run.wait() or not draft.exists():  # this Java can't make one: it starts with an empty one, too
                draft.write_bytes(b"")
            os.replace(draft, archive)  # whole or not at all, also when two scripts start at once
        finally:
            with suppress(ProcessLookupError):  # after a Ctrl+C: that process and its JVM
                os.killpg(run.pid, signal.SIGKILL)
            draft.unlink(missing_ok=True)
    return f"{use}={archive}"


def main(make: str, archive: str) -> None:
    """Takes records through a stream into tables and shows them, so that all that this needs is in the archive."""
    from common.session import build_spark
    from common.streams import run_query
    from common.table_writer import TableWriter
    from common.tables import BRONZE_COLUMNS, BRONZE_QUARANTINE_COLUMNS
    from common.viewer import newest_since, read_table, show

    spark = build_spark("class-archive", make_archive=f"{make}={archive}")
    with tempfile.TemporaryDirectory() as folder:
        records = spark.readStream.format("text").load(f"{REPOSITORY}/input/sensor_data").select(
            F.col("value").cast("binary").alias("raw"), F.lit("").alias("source_file"),
            F.current_timestamp().alias("ingest_time"))
        writer = TableWriter(f"{folder}/table", BRONZE_COLUMNS, BRONZE_QUARANTINE_COLUMNS)
        run_query(records, writer, argparse.Namespace(checkpoint=f"{folder}/checkpoint", once=True))
        for table in (writer.table, writer.quarantine):
            newest_since(spark, table, 5)
            show(read_table(spark, table, "").orderBy(F.desc("ingest_time")), 5)
        kafka = spark.read.format("kafka").option("kafka.bootstrap.servers", "127.0.0.1:1").option("subscribe", "none")
        with suppress(Exception):  # there is no such broker, but what would talk to it has been loaded
            kafka.option("kafka.default.api.timeout.ms", 1).option("kafka.request.timeout.ms", 1).load().count()
    jvm = SparkContext._gateway.proc
    spark.stop()
    jvm.stdin.close()
    sys.exit(jvm.wait())


if __name__ == "__main__":
    main(*sys.argv[1:])
