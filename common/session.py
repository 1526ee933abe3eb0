"""The SparkSession with the Delta extensions that each script builds for itself."""

import os
import signal
import sys
import tempfile

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.sql import SparkSession

from common.class_archive import class_archive
from common.console import PipelineError
from common.java import DELTA, KAFKA_SOURCE, find_java, spark_jars

SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # A record may carry any date from the year 0 on; without this a date before 1900 would fail the whole batch.
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    "spark.sql.parquet.int96RebaseModeInWrite": "CORRECTED",
    # The first look at a table is split into this many tasks; 50, Delta's default, is made for clusters.
    "spark.databricks.delta.snapshotPartitions": "1",
    # HotSpot never compiles a method of more bytecode than this, as the rules would make: Spark then splits it instead.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
# Settings of the driver's JVM. Under spark-submit it runs already, and they are options of spark-submit instead.
STREAM_JVM = {"spark.driver.memory": "1g"}
# A reader lives for seconds, most of them start-up, which the quick compiler alone (C1) shortens.
READER_JVM = {"spark.driver.memory": "1g", "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1"}


def build_spark(app_name: str, jvm: dict[str, str] = STREAM_JVM, verbose: bool = False) -> SparkSession:
    """A SparkSession with Delta and the Kafka source, in UTC, on `local[*]` or on the master that spark-submit was given.

    `jvm`: settings of the driver's JVM, `STREAM_JVM` or `READER_JVM`. `verbose`: lets Spark's own log through.
    What spark-submit was told by `--conf` wins over `SETTINGS`. Raises PipelineError where Spark can't start.
    """
    launch = SparkConf(loadDefaults=False)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # which spark-submit sets when it runs the script
        find_java()
        jars = spark_jars(DELTA, KAFKA_SOURCE)
        java_options = jvm.get("spark.driver.extraJavaOptions", "")
        if "ArchiveClasses" not in java_options:
            java_options += f" -XX:SharedArchiveFile={class_archive(jars)} -Xlog:disable"
        launch.setAll((jvm | {"spark.driver.extraClassPath": os.pathsep.join(jars),
                              "spark.driver.extraJavaOptions": java_options}).items())
        # Nothing outside this machine has a reason to reach the driver of a local session.
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # not whatever python3 is first on the PATH
    gateway = _start_jvm(launch, verbose)
    conf = SparkConf(_jvm=gateway.jvm).setAppName(app_name)
    for key, value in SETTINGS.items():
        conf.setIfMissing(key, value)
    context = SparkContext(conf=conf, gateway=gateway)
    if not verbose:
        context.setLogLevel("ERROR")  # what stops a script reaches it as an exception
    return SparkSession(context)


def _start_jvm(launch: SparkConf, verbose: bool):
    """Starts Spark's JVM. It warns at its start before any log setting can act, hence the catch at its stderr."""
    # A signal to the whole group, as of a service manager, is the script's to handle; the JVM ends with it.
    handlers = {name: signal.signal(name, signal.SIG_IGN) for name in (signal.SIGTERM, signal.SIGHUP)}
    with tempfile.TemporaryFile() as stderr:
        try:
            return launch_gateway(launch, {} if verbose else {"stderr": stderr})
        except PySparkRuntimeError as error:
            lines = os.pread(stderr.fileno(), 100_000, 0).decode(errors="replace").strip().splitlines()
            reason = next((line for line in lines if "rror" in line or "xception" in line), "no reason given")
            raise PipelineError(f"Spark's JVM did not start: {reason.strip()}. --verbose shows all it says.") from error
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
