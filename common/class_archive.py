"""Java's class-data archive, from which Spark starts in about half the time: made once, by a short run of the pipeline.

`python3 -m common.class_archive FILE` is that run; `class_archive` starts it. What the archive is:
https://docs.oracle.com/en/java/javase/17/vm/class-data-sharing.html
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from pyspark import SparkContext
from pyspark.sql import functions as F

from common.console import REPOSITORY
from common.java import find_java


def class_archive(jars: list[str]) -> Path:
    """The archive for this Java and `jars`, beside Ivy's cache. The first call makes it, in half a minute, and says so."""
    java = os.path.realpath(find_java())
    made_for = hashlib.sha256("\n".join([java, str(os.path.getmtime(java)), *jars]).encode()).hexdigest()[:16]
    archive = Path.home() / ".ivy2" / f"classes-{made_for}.jsa"
    if not archive.exists():
        print("First start: preparing Java's class archive, so that each later start takes half the time …", file=sys.stderr)
        draft = archive.with_suffix(f".{os.getpid()}")
        run = subprocess.run([sys.executable, "-m", __name__, draft], cwd=REPOSITORY, capture_output=True)
        with suppress(OSError):  # a home that may not be written to: Java starts without an archive that is not there
            if run.returncode or not draft.exists():  # this Java can't make one: it starts without an empty one, too
                draft.write_bytes(b"")
            os.replace(draft, archive)  # whole or not at all, also when two scripts start at once
    return archive


def main(archive: str) -> None:
    """Takes records through a stream into tables and shows them, so that all that this needs is in the archive."""
    from common.session import STREAM_JVM, build_spark
    from common.streams import run_query
    from common.table_writer import TableWriter
    from common.tables import BRONZE_COLUMNS, BRONZE_QUARANTINE_COLUMNS
    from common.viewer import newest_since, read_table, show

    spark = build_spark("class-archive", STREAM_JVM | {
        "spark.driver.extraJavaOptions": f"{STREAM_JVM['spark.driver.extraJavaOptions']} -XX:ArchiveClassesAtExit={archive}"})
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
    main(sys.argv[1])
