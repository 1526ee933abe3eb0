"""Kafka's records as columns: in a stream's format, and for comparing those in the tables with those in Kafka."""

import hashlib

from pipeline.contract.contract import MAX_RECORD_BYTES, OVERSIZED
from pipeline.contract.judge import json_sql
from pipeline.delta.tables import TablePair

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

# 15 October 1582: Spark's reader interprets earlier times as Julian calendar times.
GREGORIAN_START_MS = -12_219_292_800_000
NO_TIMESTAMP = -1  # of a record in the message format before Kafka 0.10
LOG_APPEND_TIME = 1  # a value of Spark's timestampType
MAX_TIMESTAMP_MS = 2**63 // 1000  # the latest time that a TIMESTAMP can hold


def time_sql(milliseconds: str) -> str:
    """SQL: Kafka's time if both ways of reading (`KafkaSource.read_again`) return the same, else null."""
    is_known = (
        f"{milliseconds} BETWEEN {GREGORIAN_START_MS} AND {MAX_TIMESTAMP_MS} AND {milliseconds} <> {NO_TIMESTAMP}"
    )
    return f"CASE WHEN {is_known} THEN {milliseconds} END"


def known_time(milliseconds: int) -> int | None:
    """Like `time_sql`, for a single record."""
    is_known = GREGORIAN_START_MS <= milliseconds <= MAX_TIMESTAMP_MS and milliseconds != NO_TIMESTAMP
    return milliseconds if is_known else None


def hash_of(value: bytes | None) -> str | None:
    """Like `md5_sql`, for a single record."""
    return None if value is None else hashlib.md5(value, usedforsecurity=False).hexdigest()


def differs(known: tuple[int | None, str | None], found: tuple[int | None, str | None]) -> bool:
    """Whether two reads of an offset (time and hash each) certainly returned different records."""
    (known_time, known_md5), (time, md5) = known, found
    return known_time is not None and known_time != time or None not in (known_md5, md5) and known_md5 != md5


def is_oversized(kafka: DataFrame) -> Column:
    """Whether the key or the value of a record is too large, from the columns of Spark's Kafka source or of `kafka_records`."""
    sizes = (
        [F.col("serializedKeySize"), F.col("serializedValueSize")]
        if "serializedValueSize" in kafka.columns
        else [F.octet_length("key"), F.octet_length("value")]
    )
    return F.coalesce(F.greatest(*sizes) > MAX_RECORD_BYTES, F.lit(False))


def md5_sql(value: str) -> str:
    """SQL: a hash for comparing records; null for records that are not always read (`KafkaSource.read_again`)."""
    return f"CASE WHEN octet_length({value}) <= {MAX_RECORD_BYTES} THEN md5({value}) END"


IS_SAME_PLACE = (
    "row.partition = record.partition AND row.offset = record.offset "
    f"AND {time_sql('unix_millis(row.kafka_timestamp)')} <=> record.time"
)


def is_same_sql(tables: TablePair) -> dict[str, str]:
    """SQL by table: whether a `row` of it has the `record` of `LastRecords._in_kafka`. Of the readings in a message, one row has it."""
    return {
        tables.table: f"{IS_SAME_PLACE} AND {md5_sql('row.raw_json')} <=> record.json_md5",
        tables.quarantine: f"{IS_SAME_PLACE} AND {md5_sql('row.raw')} <=> record.md5",
    }


def records_of(kafka: DataFrame, topic: str, ingest_time: Column) -> DataFrame:
    """The records in a stream's format, from the columns of Spark's Kafka source.

    Out: the value as `raw` and `raw_json`, the columns that say where it came from, `ingest_time`, `arrival_time` (null if the
    broker does not record it), and a `reject_reason` for records that are too large.
    """
    is_known = (F.col("timestamp") >= F.timestamp_millis(F.lit(GREGORIAN_START_MS))) & (
        F.col("timestamp") != F.timestamp_millis(F.lit(NO_TIMESTAMP))
    )
    return kafka.select(
        F.when(is_oversized(kafka), OVERSIZED).alias("reject_reason"),
        F.col("value").alias("raw"),
        F.expr(json_sql("value")).alias("raw_json"),
        F.lit(topic).alias("topic"),
        "partition",
        "offset",
        F.when(is_known, F.col("timestamp")).alias("kafka_timestamp"),
        F.col("key").alias("kafka_key"),
        ingest_time.alias("ingest_time"),
        # With CreateTime, the producer sets the time.
        F.when(F.col("timestampType") == LOG_APPEND_TIME, F.col("timestamp")).alias("arrival_time"),
    )
