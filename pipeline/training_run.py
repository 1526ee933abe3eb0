"""A short run of the pipeline that loads all the classes it needs, for Java's class archive (pipeline/spark/class_archive.py).

python3 -m pipeline.training_run -XX:ArchiveClassesAtExit FILE
"""

import argparse
import itertools
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from pipeline.contract.contract import Contract
from pipeline.contract.fields import Integer, Number, Text
from pipeline.contract.times import Timestamp
from pipeline.delta.tables import bronze_tables
from pipeline.files.folder import list_new_files
from pipeline.files.source import FileSource
from pipeline.readers.printing import newest_since, read_table, show
from pipeline.simulator import Simulator
from pipeline.spark.private import jvm_of
from pipeline.spark.session import build_spark
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.query import AVAILABLE_NOW, run_query
from pipeline.streaming.start import Start
from pipeline.streaming.writer import NoMetrics, TableWriter
from pipeline.terminal.signals import StopFlag

from pyspark.sql import functions as F

# Has fields of all kinds, and is not the user's contract, which may change.
CONTRACT = Contract(
    (Timestamp("time"), Text("device_id"), Integer("floor", required=False), Number("value")), {"below_0": "value < 0"}
)


def main(make: str, archive: str) -> None:
    """Streams two files into tables, and shows the tables."""
    spark = build_spark("class-archive", make_archive=f"{make}={archive}")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "input")
        files.mkdir()
        messages = Simulator(CONTRACT, {}).messages(devices=12, invalid_fraction=0.2, seed=1)
        for name in ("1.json", "2.json"):
            (files / name).write_bytes(b"\n".join(record or b"" for _, record in itertools.islice(messages, 20)))
        options = argparse.Namespace(
            input=str(files),
            checkpoint=f"{folder}/checkpoint",
            once=True,
            max_files_per_trigger=1,
            max_unpacked=1,
            archive=None,
            multiline=False,
        )
        tables = bronze_tables(f"{folder}/table", CONTRACT.columns)
        writer = TableWriter(
            tables, CONTRACT, FileSource(spark, options), Start(Checkpoint(spark, options.checkpoint), {}, {})
        )
        run_query(list_new_files(spark, options), AVAILABLE_NOW, writer, options.checkpoint, StopFlag(), NoMetrics())
        for table in (tables.table, tables.quarantine):
            newest_since(spark, table, 5)
            show(read_table(spark, table, "").orderBy(F.desc("ingest_time")), 5)
        kafka = spark.read.format("kafka").option("kafka.bootstrap.servers", "127.0.0.1:1").option("subscribe", "none")
        with suppress(Exception):  # there is no such broker, but this loads the classes that would talk to it
            kafka.option("kafka.default.api.timeout.ms", 1).option("kafka.request.timeout.ms", 1).load().count()
    jvm = jvm_of(spark)
    assert jvm
    spark.stop()
    jvm.communicate()  # closes its stdin, which ends it
    sys.exit(jvm.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
