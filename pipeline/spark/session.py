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

# A record of 999 levels, or a rule's pattern on a long text, takes more than Java's default stack of 1 MB, whose
# overflow ends the JVM.
STACK = "-Xss16m"
UTC = "-Duser.timezone=UTC"  # Spark's Kafka source shifts times before 1900 by what the machine's zone had then
SETTINGS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # A rule that can't be computed for a record (a division by 0) is null and so does not hold; by default it stops the
    # stream.
    "spark.sql.ansi.enabled": "false",
    "spark.sql.legacy.sizeOfNull": "false",  # null, not -1, as with ANSI
    # A record may carry any date from the year 0 on; without this a date before 1900 would fail the whole batch.
    "spark.sql.parquet.datetimeRebaseModeInWrite": "CORRECTED",
    # INT96, the default, takes a quarter more time to write.
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # The first look at a table is split into this many tasks; 50, Delta's default, is made for clusters.
    "spark.databricks.delta.snapshotPartitions": "1",
    # A list of all files beside each commit, which nothing reads. Where the machine's zone is not UTC, Delta would also
    # check it each time.
    "spark.databricks.delta.allFilesInCrc.enabled": "false",
    # A histogram of the table's file sizes, a fifth of what a small batch adds to the log, unread.
    "spark.databricks.delta.fileSizeHistogramMetrics.enabled": "false",
    # Delta's log is few rows of a hundred columns, for which Spark would write and compile thousands of lines of Java.
    # TableWriter lifts this for the records. Whole stages are compiled anyway.
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # HotSpot never compiles a method of more bytecode than this, as the rules would make: Spark then splits it instead.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    # Delta looks at its log by several small queries a batch, which planning again while they run only delays.
    "spark.sql.adaptive.enabled": "false",
    # What is listed or shuffled here is small; the defaults, 10,000 and 200 tasks, made a VACUUM take a minute, not 5
    # s.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.sql.shuffle.partitions": "4",
    # As quick as snappy, Spark's default, and half the size.
    "spark.sql.parquet.compression.codec": "zstd",
    # By default Parquet keeps a hundred rows in memory before it looks how large they are, and the least and the
    # greatest value of each column until the file is done: the largest records, which are in these, would take more
    # than there is.
    "spark.sql.parquet.enableVectorizedReader": "false",  # it takes 4,096 rows at a time
    "spark.hadoop.parquet.page.size.row.check.min": "1",
    "spark.hadoop.parquet.block.size.row.check.min": "1",
    "spark.hadoop.parquet.block.size": str(32 * 1024 * 1024),
    "spark.hadoop.parquet.column.statistics.enabled#raw": "false",
    "spark.hadoop.parquet.column.statistics.enabled#raw_json": "false",
    "spark.hadoop.parquet.column.statistics.enabled#_rescued_data": "false",
    # Java's serialization, through which a second reading's records go to the disk, holds the last hundred of them.
    "spark.serializer.objectStreamReset": "1",
    # Auto compaction merges files of less than the one size into files of the other. A batch waits for it, so it is a
    # little at a time: a Silver table with a million rows a day (14 MB) gets 9 files a day.
    "spark.databricks.delta.autoCompact.minFileSize": str(3 * 512 * 1024),
    "spark.databricks.delta.autoCompact.maxFileSize": str(32 * 1024 * 1024),
    # Delta writes its log through this, without Hadoop's checksum files: it lists the log at every commit.
    # `build_spark` turns them off for all other files; hadoop-aws needs the class that fs.file.impl names by default.
    "spark.hadoop.fs.AbstractFileSystem.file.impl": "org.apache.hadoop.fs.local.RawLocalFs",
    # The input folder is listed, though another job of Spark's has left a list of its own there, with paths that may be
    # of elsewhere.
    "spark.sql.streaming.fileStreamSink.ignoreMetadata": "true",
    # Spark keeps a consumer for each partition from batch to batch, by default for 64 partitions at most.
    "spark.kafka.consumer.cache.capacity": "1000",
    "spark.executor.extraJavaOptions": f"{STACK} {UTC}",  # on a cluster
    # A record too large for the memory fails its task, of which the source learns which one it is; by default it ends
    # the JVM.
    "spark.executor.killOnFatalError.depth": "0",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
# Settings of the driver's JVM. Under spark-submit it runs already, and they are options of spark-submit instead.
# A stream is after throughput, not short pauses: the parallel collector takes a fifth less time than the default, G1.
# Java's best compiler (C2) takes what has run twenty times as often as by default: at a start it was half of the CPU.
STREAM_JVM = {
    "spark.driver.extraJavaOptions": (
        f"{STACK} -XX:+UseParallelGC -XX:Tier4InvocationThreshold=100000 -XX:Tier4MinInvocationThreshold=12000 "
        "-XX:Tier4CompileThreshold=300000 -XX:Tier4BackEdgeThreshold=800000"
    )
}
# A reader lives for seconds, most of them start-up, which the quick compiler alone (C1) shortens.
READER_JVM = {"spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1"}


# bytes of heap for each task: for any record within the limits, two were seen to fit into 1 GB
TASK_MEMORY = 512 * 1024 * 1024
MAX_DEFAULT_TASKS = 8  # more take a larger heap, which the user has to ask for


def build_spark(
    app_name: str, jvm: dict[str, str] = STREAM_JVM, verbose: bool = False, make_archive: str | None = None
) -> SparkSession:
    """Builds a SparkSession with Delta and the Kafka source, in UTC, on the local cores or on the master given to spark-submit.

    `jvm`: settings of the driver's JVM (`STREAM_JVM` or `READER_JVM`). `verbose`: shows Spark's own log. `--conf` options of
    spark-submit override `SETTINGS`. Raises PipelineError if Spark can't start.
    """
    is_submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit, whose JVM runs already
    launch = SparkConf(loadDefaults=False) if is_submitted else _local_launch(jvm, make_archive)
    with delay_stop_signals():  # for the seconds in which Spark's JVM could neither be used nor ended
        gateway = _start_jvm(launch, verbose)
        if not has_name():
            user = gateway.jvm.org.apache.hadoop.security.UserGroupInformation
            user.setLoginUser(user.createRemoteUser(str(os.getuid())))  # Hadoop would ask for the name, too
        conf = SparkConf(_jvm=gateway.jvm).setAppName(app_name)
        if re.fullmatch(r"local(\[.*\])?", conf.get("spark.master") or ""):
            conf.setIfMissing("spark.authenticate", "true")  # its ports would take orders from any user of this machine
        if conf.get("spark.master") == "local[*]":
            java = gateway.jvm.Runtime.getRuntime()
            tasks = int(java.maxMemory() / (0.8 * TASK_MEMORY))  # Java leaves a part of its young generation out
            conf.setMaster(f"local[{max(1, min(java.availableProcessors(), tasks))}]")
        for key, value in (SETTINGS | {"spark.hadoop.fs.permissions.umask-mode": f"{umask():03o}"}).items():
            conf.setIfMissing(key, value)
        context = SparkContext(conf=conf, gateway=gateway)
        # After a power cut, Hadoop would refuse a whole data file whose checksum file is empty. The instance is the one
        # that Spark uses.
        local_files = gateway.jvm.org.apache.hadoop.fs.FileSystem.getLocal(context._jsc.hadoopConfiguration())
        local_files.setWriteChecksum(False)
        local_files.setVerifyChecksum(False)
    if not verbose:
        context.setLogLevel("ERROR")
        # What ends a stream reaches the script as an exception.
        log4j = gateway.jvm.org.apache.logging.log4j
        log4j.core.config.Configurator.setLevel("org.apache.spark.sql.execution.streaming", log4j.Level.OFF)
        for name in ("SQLQueryContextLogger", "DataFrameQueryContextLogger"):  # so does what these say in JSON
            PySparkLogger.getLogger(name).disabled = True
    return SparkSession(context)


def _local_launch(jvm: dict[str, str], make_archive: str | None) -> SparkConf:
    """The settings with which Spark's JVM is started locally, which are also passed in the environment."""
    java = find_java()
    jars = spark_jars(DELTA, KAFKA_SOURCE)
    java_options = [
        *jvm["spark.driver.extraJavaOptions"].split(),
        UTC,
        f"-Djava.io.tmpdir={scratch_folder()}",
        "-Xlog:disable",
        make_archive or use_archive(java, jars),
    ]
    if not has_name():
        java_options.append(f"-Duser.home={cache_folder()}")  # Java only asks for it by the name
    # Not the home of another Spark that the user may have.
    os.environ["SPARK_HOME"] = str(SPARK_JARS.parent)
    # Nothing outside this machine has a reason to reach the driver of a local session.
    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    # Of the memory that Java's compiler frees, the C library keeps some for each of its arenas, by default eight a
    # core.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # not whatever python3 is first on the PATH
    return SparkConf(loadDefaults=False).setAll(
        [
            *(
                jvm
                | {
                    "spark.driver.memory": f"{heap_size(os.cpu_count() or 1, _memory()) // 2**20}m",
                    "spark.driver.extraClassPath": os.pathsep.join(jars),
                    "spark.driver.extraJavaOptions": " ".join(map(quoted, java_options)),
                }
            ).items()
        ]
    )


def heap_size(cores: int, memory: int) -> int:
    """The heap size in bytes for a machine with so many cores and bytes of memory: at least 1 GB, otherwise at most half of the
    memory.
    """
    return max(2 * TASK_MEMORY, min(TASK_MEMORY * min(cores, MAX_DEFAULT_TASKS), memory // 2))


def _memory() -> int:
    """The memory of this machine or container in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no limit is "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def umask() -> int:
    """The permission bits withheld from new files of this process. Hadoop ignores the umask and sets permissions itself."""
    os.umask(mask := os.umask(0o077))
    return mask


def has_name() -> bool:
    """Whether this user has a name, which is often not the case in a container."""
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def quoted(option: str) -> str:
    """A Java option in the syntax of spark.driver.extraJavaOptions, which is split at blanks."""
    return re.sub(r"""(["'\\\s])""", r"\\\1", option)


def _start_jvm(launch: SparkConf, verbose: bool) -> Any:
    """Starts Spark's JVM, which ends together with the script, or connects to that of spark-submit."""
    with tempfile.TemporaryFile() as stderr:  # it warns at its start before any log setting can act
        try:
            # Its stdout has nothing but Delta's remarks on a VACUUM.
            gateway = launch_gateway(launch, {} if verbose else {"stderr": stderr, "stdout": subprocess.DEVNULL})
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
                + " --verbose shows everything it says."
            ) from error
    # A terminal or a service manager signals the JVM, too. What is to be done is the script's business, but to end
    # spark-submit itself.
    java = gateway.jvm.sun.misc
    for name in ("INT", "TERM", "HUP") if gateway.proc else ("INT",):
        java.Signal.handle(java.Signal(name), java.SignalHandler.SIG_IGN)
    if gateway.proc:
        atexit.register(_end_jvm, gateway.proc)
    return gateway


def _end_jvm(jvm: "subprocess.Popen[bytes]") -> None:
    try:
        jvm.communicate(timeout=10)  # closes its stdin, at which it ends
    except subprocess.TimeoutExpired:
        jvm.kill()
