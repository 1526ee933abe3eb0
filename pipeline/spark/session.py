"""The SparkSession with the Delta extensions that every script builds for itself."""

import atexit
import os
import pwd
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.spark.class_archive import use_archive
from pipeline.spark.java import DELTA, KAFKA_SOURCE, SPARK_JARS, cache_folder, find_java, spark_jars
from pipeline.spark.scratch import scratch_folder
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.signals import delay_stop_signals

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkRuntimeError
from pyspark.java_gateway import launch_gateway
from pyspark.logger import PySparkLogger
from pyspark.sql import SparkSession

# A record nested 999 levels deep, or a rule's pattern on a long string, needs more than Java's default stack of 1 MB. A
# stack overflow ends the JVM.
STACK = "-Xss16m"
UTC = "-Duser.timezone=UTC"  # else Spark's Kafka source shifts times before 1900 by the machine's offset at the time
SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # A rule that can't be evaluated for a record (a division by 0) is null, so it does not apply; by default, it would
    # stop the stream.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.legacy.sizeOfNull": "false",  # null, not -1, as with ANSI
    # A record may contain any date from the year 0 on; without this setting, a date before 1900 would fail the whole
    # batch.
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    # Writing INT96, the default, takes a quarter more time.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # The first snapshot of a table is split into this many tasks. Delta's default, 50, is meant for clusters.
    "spark.databricks.delta.snapshotPartitions": "1",
    # A list of all files with each commit, which nothing reads. If the machine's time zone is not UTC, Delta would also
    # check the list each time.
    "spark.databricks.delta.allFilesInCrc.enabled": "false",
    # A histogram of the table's file sizes, which nothing reads. It is a fifth of what a small batch adds to the log.
    "spark.databricks.delta.fileSizeHistogramMetrics.enabled": "false",
    # Delta's log has few rows but a hundred columns, for which Spark would generate and compile thousands of lines of
    # Java. TableWriter lifts this restriction for the records. Whole stages are compiled regardless.
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # HotSpot never compiles a method with more bytecode than this, and the rules would produce such methods. With this
    # limit, Spark splits them.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    # Delta runs several small queries on its log in each batch; planning them again while they run would only delay
    # them.
    "spark.sql.adaptive.enabled": "false",
    # Listings and shuffles are small here; with the defaults, 10,000 and 200 tasks, a VACUUM took a minute, not 5 s.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.sql.shuffle.partitions": "4",
    # As fast as snappy, Spark's default, at half the size.
    "spark.sql.parquet.compression.codec": "zstd",
    # By default, Parquet keeps a hundred rows in memory before it checks how large they are, and keeps the minimum and
    # maximum of each column until the file is complete. The largest records, which are in these columns, would need
    # more memory than there is.
    "spark.sql.parquet.enableVectorizedReader": "false",  # it takes 4,096 rows at a time
    "spark.hadoop.parquet.page.size.row.check.min": "1",
    "spark.hadoop.parquet.block.size.row.check.min": "1",
    "spark.hadoop.parquet.block.size": str(32 * 1024 * 1024),
    "spark.hadoop.parquet.column.statistics.enabled#raw": "false",
    "spark.hadoop.parquet.column.statistics.enabled#raw_json": "false",
    "spark.hadoop.parquet.column.statistics.enabled#_rescued_data": "false",
    # The records of a second reading and those of a contract with a key are written to the disk: with Java's serialization,
    # this takes twice as long, and by default a hundred records stay in memory.
    "spark.serializer": "org.apache.spark.serializer.KryoSerializer",
    # Auto compaction merges files smaller than the first size into files of the second size. A batch waits for it, so
    # it merges a little at a time: a Silver table with a million rows a day (14 MB) gets 9 files a day.
    "spark.databricks.delta.autoCompact.minFileSize": str(3 * 512 * 1024),
    "spark.databricks.delta.autoCompact.maxFileSize": str(32 * 1024 * 1024),
    # Delta writes its log through this class without Hadoop's checksum files, because it lists the log at every commit.
    # `build_spark` turns them off for all other files; hadoop-aws needs the default class of fs.file.impl.
    "spark.hadoop.fs.AbstractFileSystem.file.impl": "org.apache.hadoop.fs.local.RawLocalFs",
    # Lists the input folder itself, even if another Spark job has left its own file list there, which may have paths
    # from elsewhere.
    "spark.sql.streaming.fileStreamSink.ignoreMetadata": "true",
    # An aggregate keeps this many groups in memory, by default 128, and sorts the rest: groups may hold a record of 8 MB each.
    "spark.sql.objectHashAggregate.sortBased.fallbackThreshold": "8",
    # Spark keeps a consumer for each partition between batches, by default for at most 64 partitions.
    "spark.kafka.consumer.cache.capacity": "1000",
    "spark.executor.extraJavaOptions": f"{STACK} {UTC}",  # on a cluster
    # A record that is too large for memory fails its task, so that the source learns which record it is. By
    # default, it ends the JVM.
    "spark.executor.killOnFatalError.depth": "0",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
# Settings of the driver's JVM. Under spark-submit, the JVM is already running, and they are options of spark-submit
# instead.
# A stream needs throughput, not short pauses: the parallel collector takes a fifth less time than the default, G1. Records of 8 MB
# live in the old generation; by default, it has only two thirds of the heap.
# C2, Java's best compiler, compiles a method at 20 times the default thresholds. By default, it took half of the CPU at
# startup.
STREAM_JVM = {
    "spark.driver.extraJavaOptions": (
        f"{STACK} -XX:+UseParallelGC -XX:NewRatio=5 -XX:Tier4InvocationThreshold=100000 -XX:Tier4MinInvocationThreshold=12000 "
        "-XX:Tier4CompileThreshold=300000 -XX:Tier4BackEdgeThreshold=800000"
    )
}
# A reader runs for seconds, most of them startup. Using only the quick compiler (C1) shortens it.
READER_JVM = {"spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1"}


# Bytes of heap per task: with any record within the limits, two tasks fit into 1 GB in tests.
TASK_MEMORY = 512 * 1024 * 1024
MAX_DEFAULT_TASKS = 8  # more tasks need a larger heap, which the user has to request


def build_spark(
    app_name: str, jvm: dict[str, str] = STREAM_JVM, verbose: bool = False, make_archive: str | None = None
) -> SparkSession:
    """Builds a SparkSession with Delta and the Kafka source, in UTC, on the local cores or on the master given to spark-submit.

    `jvm`: settings of the driver's JVM (`STREAM_JVM` or `READER_JVM`). `verbose`: shows Spark's own log. `--conf` options of
    spark-submit override `SETTINGS`. Raises PipelineError if Spark can't start.
    """
    is_submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit, whose JVM is already running
    launch = {} if is_submitted else _local_launch(jvm, make_archive)
    with delay_stop_signals():  # Spark's JVM can neither be used nor ended for a few seconds
        gateway = _start_jvm(launch, verbose)
        if not has_name():
            user = gateway.jvm.org.apache.hadoop.security.UserGroupInformation
            user.setLoginUser(user.createRemoteUser(str(os.getuid())))  # Hadoop would look up the name, too
        conf = SparkConf(_jvm=gateway.jvm).setAppName(app_name)
        if re.fullmatch(r"local(\[.*\])?", conf.get("spark.master") or ""):
            conf.setIfMissing("spark.authenticate", "true")  # otherwise, any user of this machine could use its ports
        if conf.get("spark.master") == "local[*]":
            java = gateway.jvm.Runtime.getRuntime()
            tasks = int(java.maxMemory() / (0.8 * TASK_MEMORY))  # Java does not count part of its young generation
            conf.setMaster(f"local[{max(1, min(java.availableProcessors(), tasks))}]")
        os.umask(umask := os.umask(0o077))  # Hadoop ignores it, and sets permissions itself
        for key, value in (SETTINGS | {"spark.hadoop.fs.permissions.umask-mode": f"{umask:03o}"}).items():
            conf.setIfMissing(key, value)
        context = SparkContext(conf=conf, gateway=gateway)
        # After a power cut, Hadoop would reject an intact data file whose checksum file is empty. This is the instance
        # that Spark uses.
        local_files = gateway.jvm.org.apache.hadoop.fs.FileSystem.getLocal(context._jsc.hadoopConfiguration())
        local_files.setWriteChecksum(False)
        local_files.setVerifyChecksum(False)
    if not verbose:
        context.setLogLevel("ERROR")
        # An error that ends a stream reaches the script as an exception.
        log4j = gateway.jvm.org.apache.logging.log4j
        log4j.core.config.Configurator.setLevel("org.apache.spark.sql.execution.streaming", log4j.Level.OFF)
        for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):  # so do the errors that these log as JSON
            PySparkLogger.getLogger(name).disabled = True
    return SparkSession(context)


def _local_launch(jvm: dict[str, str], make_archive: str | None) -> dict[str, str]:
    """The settings with which Spark's JVM is started locally, which are also passed in the environment."""
    java = find_java()
    jars = spark_jars(DELTA, KAFKA_SOURCE)
    java_options = [
        *jvm["spark.driver.extraJavaOptions"].split(),
        UTC,
        f"-Djava.io.tmpdir={scratch_folder()}",
        "-Xlog:disable",
        make_archive or use_archive(java, jars),
        *([] if has_name() else [f"-Duser.home={cache_folder()}"]),  # Java looks it up only by the name
    ]
    # Not the home of another Spark installation that the user may have.
    os.environ["SPARK_HOME"] = str(SPARK_JARS.parent)
    # Nothing outside this machine needs to reach the driver of a local session.
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # The C library retains some of the memory that Java's compiler frees in each of its arenas, by default eight per
    # core.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # not whichever python3 comes first on the PATH
    return jvm | {
        "spark.driver.memory": f"{heap_size() // 2**20}m",
        "spark.driver.extraClassPath": os.pathsep.join(jars),
        "spark.driver.extraJavaOptions": " ".join(map(quoted, java_options)),
    }


def heap_size() -> int:
    """The heap size in bytes for this machine or container: at least 1 GB, otherwise at most half of its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # without a limit, it is "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(2 * TASK_MEMORY, min(TASK_MEMORY * min(os.cpu_count() or 1, MAX_DEFAULT_TASKS), memory // 2))


def has_name() -> bool:
    """Whether this user has a name, which is often not the case in a container."""
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def quoted(option: str) -> str:
    """A Java option in the syntax of spark.driver.extraJavaOptions, which is split at blanks."""
    return re.sub(r"""(["'\\\s])""", r"\\\1", option)


def _start_jvm(launch: dict[str, str], verbose: bool) -> Any:
    """Starts Spark's JVM, which ends together with the script, or connects to that of spark-submit."""
    with tempfile.TemporaryFile() as stderr:  # it prints warnings at startup, before any log setting takes effect
        try:
            # Its stdout only contains Delta's messages about a VACUUM.
            conf = SparkConf(loadDefaults=False).setAll([*launch.items()])
            gateway = launch_gateway(conf, {} if verbose else {"stderr": stderr, "stdout": subprocess.DEVNULL})
        except PySparkRuntimeError as error:
            lines = os.pread(stderr.fileno(), 100_000, 0).decode(errors="replace").strip().splitlines()
            reason = next((line for line in lines if "rror" in line or "xception" in line), "no reason given")
            told = [
                f"{name}={os.environ[name]}"
                for name in ("SPARK_CONF_DIR", "PYSPARK_SUBMIT_ARGS", "JAVA_TOOL_OPTIONS")
                if name in os.environ
            ]
            raise PipelineError(
                f"Spark's JVM did not start: {reason.strip(' .')}."
                + (f" Check {' and '.join(told)}." if told else "")
                + " --verbose shows its full output."
            ) from error
    # A terminal or a service manager signals the JVM, too. The script decides what to do, so the JVM ignores the
    # signals; only spark-submit itself still ends on SIGTERM and SIGHUP.
    java = gateway.jvm.sun.misc
    for name in ("INT", "TERM", "HUP") if gateway.proc else ("INT",):
        java.Signal.handle(java.Signal(name), java.SignalHandler.SIG_IGN)
    if gateway.proc:
        atexit.register(_end_jvm, gateway.proc)
    return gateway


def _end_jvm(jvm: "subprocess.Popen[bytes]") -> None:
    try:
        jvm.communicate(timeout=10)  # closes its stdin, which ends it
    except subprocess.TimeoutExpired:
        jvm.kill()
