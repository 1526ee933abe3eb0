"""The pipeline's tables: their places, their columns, and what keeps them healthy."""

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from common.console import REPOSITORY, PipelineError
from common.readings import READING_COLUMNS

KAFKA_ORIGIN = "topic STRING, partition INT, offset BIGINT, kafka_timestamp TIMESTAMP, kafka_key BINARY"

BRONZE_COLUMNS = f"{READING_COLUMNS}, source_file STRING"
SILVER_COLUMNS = f"{READING_COLUMNS}, {KAFKA_ORIGIN}, raw_json STRING"
BRONZE_QUARANTINE_COLUMNS = "reject_reason STRING, raw BINARY, source_file STRING, ingest_time TIMESTAMP"
SILVER_QUARANTINE_COLUMNS = f"reject_reason STRING, raw BINARY, {KAFKA_ORIGIN}, ingest_time TIMESTAMP"

LAKE = REPOSITORY / "lake"
BRONZE = str(LAKE / "bronze" / "sensor_data")
SILVER = str(LAKE / "silver" / "sensor_data")

PROPERTIES = {
    # A stream appends a small file per batch: they are written in one piece, and merged once there are 50 of them.
    "delta.autoOptimize.optimizeWrite": "true",
    "delta.autoOptimize.autoCompact": "true",
    # Each commit leaves files in _delta_log, which is listed whole at every look: a day of time travel is kept.
    "delta.logRetentionDuration": "interval 1 day",
    "delta.deletedFileRetentionDuration": "interval 1 day",
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
    table = DeltaTable.createIfNotExists(spark).location(path).addColumns(StructType.fromDDL(columns))
    for name, value in (PROPERTIES | owner).items():
        table = table.property(name, value)
    table.execute()
    if properties_of(spark, path).items() >= owner.items():
        return
    if not adopt:
        raise PipelineError(f"Another stream has made the table {path} meanwhile. Give this one a --table and a "
                            f"--checkpoint of its own.")
    changed = ", ".join(f"'{name}' = '{value}'" for name, value in owner.items())
    spark.sql(f"ALTER TABLE {as_identifier(path)} SET TBLPROPERTIES ({changed})")


def properties_of(spark: SparkSession, path: str) -> dict[str, str] | None:
    """The properties of the table at `path`; None where there is no table."""
    if not DeltaTable.isDeltaTable(spark, path):
        return None
    # Takes them from the newest commit's checksum; DeltaTable.detail() would read the whole table's state.
    return {row.key: row.value for row in spark.sql(f"SHOW TBLPROPERTIES {as_identifier(path)}").collect()}


def as_identifier(path: str) -> str:
    """The table at `path` as SQL names it."""
    return "delta.`" + path.replace("`", "``") + "`"
