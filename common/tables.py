"""The pipeline's tables: their places, their columns, and what keeps them healthy."""

from delta.tables import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql.types import StructType

from common.console import REPOSITORY
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
# The table property that holds the id of the checkpoint whose stream writes the table.
WRITER = "pipeline.checkpoint.id"


def quarantine_of(table: str) -> str:
    """The path of the table beside `table` that takes the records it rejects."""
    return table.rstrip("/") + "_quarantine"


def create_table(spark: SparkSession, path: str, columns: str, writer: str) -> None:
    """Creates the Delta table at `path` with `columns` (DDL) for the stream with the checkpoint id `writer`."""
    table = DeltaTable.createIfNotExists(spark).location(path).addColumns(StructType.fromDDL(columns))
    for name, value in (PROPERTIES | {WRITER: writer}).items():
        table = table.property(name, value)
    table.execute()


def writer_of(spark: SparkSession, path: str) -> str | None:
    """The checkpoint id of the stream that writes the table at `path`; None where there is no table.

    A table that no stream of this pipeline made has the id "".
    """
    if not DeltaTable.isDeltaTable(spark, path):
        return None
    # Takes the properties from the newest commit's checksum; DeltaTable.detail() would read the whole table's state.
    properties = spark.sql(f"SHOW TBLPROPERTIES {as_identifier(path)}").collect()
    return next((row.value for row in properties if row.key == WRITER), "")


def as_identifier(path: str) -> str:
    """The table at `path` as SQL names it."""
    return "delta.`" + path.replace("`", "``") + "`"
