"""The pipeline's tables: their places, their columns, and what keeps them healthy."""

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from common.console import PipelineError
from common.process import REPOSITORY
from common.readings import READING_COLUMNS

KAFKA_ORIGIN = "topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP, kafka_key BINARY"

BRONZE_COLUMNS = f"{READING_COLUMNS}, source_file STRING"
SILVER_COLUMNS = f"{READING_COLUMNS}, {KAFKA_ORIGIN}, raw_json STRING"
BRONZE_QUARANTINE_COLUMNS = "reject_reason STRING, raw BINARY, source_file STRING, ingest_time TIMESTAMP"
SILVER_QUARANTINE_COLUMNS = f"reject_reason STRING, raw BINARY, {KAFKA_ORIGIN}, ingest_time TIMESTAMP"

LAKE = REPOSITORY / "lake"
BRONZE = str(LAKE / "bronze" / "sensor_data")
SILVER = str(LAKE / "silver" / "sensor_data")

# Columns of which Delta notes the least and greatest value in each file, to skip files by; each more costs time to write.
STATISTICS = ("device_id", "event_time", "ingest_time")
PROPERTIES = {
    # A stream appends a small file per batch: they are merged once there are 50 of them.
    "delta.autoOptimize.autoCompact": "true",
    # Each commit leaves files in _delta_log, which is listed whole at every commit, on a local disk at 15 µs a file. With a
    # batch every two seconds, two hours of time travel are 7,200 files.
    "delta.logRetentionDuration": "interval 2 hours",
    "delta.deletedFileRetentionDuration": "interval 2 hours",
}
# Table properties of this pipeline: the id of the checkpoint whose stream writes the table, and Kafka's id of the topic.
WRITER = "pipeline.checkpoint.id"
TOPIC_ID = "pipeline.topic.id"


def quarantine_of(table: str) -> str:
    """The path of the table beside `table` that takes the records it rejects."""
    return table.rstrip("/") + "_quarantine"


def create_table(spark: SparkSession, path: str, columns: str, owner: dict[str, str], adopt: bool) -> None:
    """Creates the Delta table at `path` with `columns` (DDL) for the stream that the properties `owner` name.

    `adopt`: makes a table that another stream has written that of this one.
    Raises PipelineError where the table is another stream's.
    """
    schema = StructType.fromDDL(columns)
    statistics = ",".join(column for column in STATISTICS if column in schema.names)
    table = DeltaTable.createIfNotExists(spark).location(path).addColumns(schema)
    for name, value in (PROPERTIES | {"delta.dataSkippingStatsColumns": statistics} | owner).items():
        table = table.property(name, value)
    table.execute()
    if properties_of(spark, path).items() >= owner.items():
        return
    if not adopt:
        raise PipelineError(f"Another stream has made the table {path} meanwhile. Give this one a --table and a "
                            f"--checkpoint of its own.")
    changed = ", ".join(f"'{name}' = '{value}'" for name, value in owner.items())
    spark.sql(f"ALTER TABLE {as_identifier(path)} SET TBLPROPERTIES ({changed})")


def clean_up(spark: SparkSession, path: str) -> None:
    """Removes what the table at `path` no longer needs for time travel: old data files and old entries of its log.

    Delta itself removes log entries by the day, which at a batch every two seconds is too coarse: 43,200 commits.
    """
    spark.sql(f"VACUUM {as_identifier(path)}")
    log = _log_of(spark, path)
    by_the_minute = spark._jvm.org.apache.spark.sql.delta.TruncationGranularity.MINUTE()
    log.cleanUpExpiredLogs(log.unsafeVolatileSnapshot(), spark._jvm.scala.Option.empty(), spark._jvm.scala.Option.empty(),
                           by_the_minute)


def state_of(spark: SparkSession, path: str, stream: str) -> tuple[int, int]:
    """The version of the table at `path`, and the number of the last batch that `stream` has written to it, or -1.

    What this session knows of the table, as its only writer: its log is not listed again.
    """
    snapshot = _log_of(spark, path).unsafeVolatileSnapshot()
    last_batch = snapshot.transactions().get(stream)
    return snapshot.version(), last_batch.get() if last_batch.isDefined() else -1


def _log_of(spark: SparkSession, path: str):
    """Delta's own view of the table at `path`, an object of Java."""
    return spark._jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path)


def time_travel(spark: SparkSession, path: str) -> str:
    """How far back the table at `path` can be read, such as "2 hours"."""
    return properties_of(spark, path).get("delta.deletedFileRetentionDuration", "interval 1 week").removeprefix("interval ")


def properties_of(spark: SparkSession, path: str) -> dict[str, str] | None:
    """The properties of the table at `path`; None where there is no table."""
    if not DeltaTable.isDeltaTable(spark, path):
        return None
    # Takes them from the newest commit's checksum; DeltaTable.detail() would read the whole table's state.
    return {row.key: row.value for row in spark.sql(f"SHOW TBLPROPERTIES {as_identifier(path)}").collect()}


def as_identifier(path: str) -> str:
    """The table at `path` as SQL names it."""
    return "delta.`" + path.replace("`", "``") + "`"
