"""Private APIs of PySpark and py4j, with the reason for each. pipeline/spark/session.py has those needed to start a session."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import DataFrame, Observation, SparkSession

# F.lit imports a module only to find out whether its argument may come from these libraries. Where they are installed,
# for dashboard.py, this would add a second to each start and print a warning about their versions. So the module is
# imported here as if they were not.
hidden = {"numpy", "pandas", "pyarrow"} - sys.modules.keys()
sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: no such module
importlib.import_module("pyspark.testing.utils")
for name in hidden:
    del sys.modules[name]


def _java(spark: SparkSession) -> Any:
    """The classes of the session's JVM, by name. PySpark has no public access to them."""
    return spark._jvm


def hadoop_settings(spark: SparkSession) -> Any:
    """A copy of the settings with which the session opens file systems."""
    return _java(spark).org.apache.hadoop.conf.Configuration(spark._jsc.hadoopConfiguration())


SPARK_ERRORS = (PySparkException, Py4JJavaError)  # the latter come from calls to its private APIs
OBSERVATION_SECONDS = 60  # seconds to wait for the figures of a query that has ended
OUT_OF_MEMORY = "java.lang.OutOfMemoryError"


def protect_callbacks(spark: SparkSession) -> None:
    """Makes the port on which Spark's JVM calls `foreachBatch` require the session's secret. By default PySpark accepts calls
    from any user of the machine.

    Py4J can check the secret on the Python side, but its Java side drops the secret when it is told the port (0.10.9.9).
    """
    gateway = cast(Any, spark.sparkContext)._gateway
    secret = gateway.gateway_parameters.auth_token
    gateway.callback_server_parameters.auth_token = secret
    ensure_callback_server_started(gateway)
    field = _java(spark).py4j.CallbackClient._java_lang_class.getDeclaredField("authToken")
    field.setAccessible(True)
    field.set(JavaObject("GATEWAY_SERVER", gateway._gateway_client).getCallbackClient(), secret)


def _scala_seq(spark: SparkSession, values: list[Any]) -> Any:
    return _java(spark).org.apache.spark.api.python.PythonUtils.toSeq(values)


def jvm_of(spark: SparkSession) -> "subprocess.Popen[bytes] | None":
    """The process of the session's JVM; None if spark-submit has started it. PySpark has no way to wait for its end."""
    return cast(Any, spark.sparkContext._gateway).proc


def number_of_tasks(rows: DataFrame) -> int:
    """The number of tasks with which Spark would read the rows. `rows.rdd` would convert them to Python, which is slower."""
    return rows._jdf.queryExecution().toRdd().getNumPartitions()


def observed(spark: SparkSession, observation: Observation, seconds: int) -> dict[str, Any] | None:
    """The figures of an observation by name, with Java's types. Its own `get` waits indefinitely, and converts everything to
    Python.

    Returns None if the query does not end within `seconds`, and {} if Spark has optimized the observation away.
    """
    java, observer = _java(spark).scala.concurrent, cast(Any, observation._jo)
    try:
        row = java.Await.result(observer.future(), java.duration.Duration.create(seconds, "seconds"))
    except Py4JJavaError:
        return None
    if not row.length():
        return {}
    return {
        field.name(): row.getList(number) if field.dataType().typeName() == "array" else row.get(number)
        for number, field in enumerate(row.schema().fields())
    }


def free_checkpoints(spark: SparkSession) -> None:
    """Deletes the local checkpoints on the disk. Otherwise they stay until Java happens to collect them."""
    for rdd in cast(Any, spark.sparkContext)._jsc.getPersistentRDDs().values():
        if not rdd.getStorageLevel().useMemory():  # Delta keeps a table's state in memory
            rdd.unpersist(False)


def in_memory(rows: DataFrame) -> DataFrame:
    """A snapshot of the rows in the JVM's memory, without going through Python."""
    return dataframe_of(rows.sparkSession, rows._jdf.collectAsList(), rows)


def dataframe_of(spark: SparkSession, rows: Any, like: DataFrame) -> DataFrame:
    """A DataFrame of Java's `rows` with the columns of `like`, without going through Python."""
    return DataFrame(spark._jsparkSession.createDataFrame(rows, like._jdf.schema()), spark)


@contextmanager
def setting(spark: SparkSession, name: str, value: str) -> Iterator[None]:
    """Changes a setting of the session within the context."""
    usual = str(spark.conf.get(name))
    spark.conf.set(name, value)
    try:
        yield
    finally:
        spark.conf.set(name, usual)


def code_generation(spark: SparkSession) -> AbstractContextManager[None]:
    """Enables code generation within the context, as is Spark's default. pipeline/spark/session.py disables it with this internal
    setting.
    """
    return setting(spark, "spark.sql.codegen.factoryMode", "FALLBACK")
