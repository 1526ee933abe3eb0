"""A short run of the pipeline, so that all that it needs of Java is in the archive of classes (common/class_archive.py).

    python3 -m common.training_run -XX:ArchiveClassesAtExit FILE
"""

import argparse
import sys
import tempfile
from contextlib import suppress

from pyspark.sql import functions as F

from common.contract import load_contract
from common.internals import jvm_of
from common.process import REPOSITORY, StopFlag
from common.session import build_spark
from common.streams import TO_ITS_END, run_query
from common.table_writer import Start, TableWriter, Unwatched
from common.tables import bronze_tables
from common.viewer import newest_since, read_table, show
from streaming_files_to_delta_bronze import FileSource, list_new_files


def main(make: str, archive: str) -> None:
    """Takes the sample files through a stream into tables, and shows these."""
    spark = build_spark("class-archive", make_archive=f"{make}={archive}")
    with tempfile.TemporaryDirectory() as folder:
        options = argparse.Namespace(input=f"{REPOSITORY}/input/sensor_data", checkpoint=f"{folder}/checkpoint", once=True,
                                     max_files_per_trigger=1, archive=None)
        contract = load_contract(f"{REPOSITORY}/readings.py")
        tables = bronze_tables(f"{folder}/table", contract.columns)
        writer = TableWriter(tables, contract, FileSource(is_multiline=False), Start({}, {}))
        run_query(list_new_files(spark, options), TO_ITS_END, writer, options.checkpoint, StopFlag(), Unwatched())
        for table in (tables.table, tables.quarantine):
            newest_since(spark, table, 5)
            show(read_table(spark, table, "").orderBy(F.desc("ingest_time")), 5)
        kafka = spark.read.format("kafka").option("kafka.bootstrap.servers", "127.0.0.1:1").option("subscribe", "none")
        with suppress(Exception):  # there is no such broker, but what would talk to it has been loaded
            kafka.option("kafka.default.api.timeout.ms", 1).option("kafka.request.timeout.ms", 1).load().count()
    jvm = jvm_of(spark)
    spark.stop()
    jvm.communicate()  # closes its stdin, at which it ends
    sys.exit(jvm.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
