"""Repeated readings: their key is in the table already, or in an earlier row of the same batch."""

from itertools import pairwise
from typing import Any

from pipeline.contract.columns import ROW
from pipeline.contract.contract import DUPLICATE, Contract
from pipeline.spark.private import OBSERVATION_SECONDS, code_generation, observed, setting

from pyspark import StorageLevel
from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StringType

FEW_ROWS = 2000  # up to this many valid rows in a batch, a single task without compiled code is fastest
MAX_BROADCAST_ROWS = 300_000  # up to this many rows, each task keeps a copy of them in memory
GREGORIAN_START = -12_219_292_800_000_000  # 1582-10-15, in microseconds since 1970
LONG_BYTES = 100  # longer texts in a key are hashed
# Bounds of age groups: seconds between a reading and its arrival. Each group has a time range of its own, so that a device whose
# clock has stopped does not widen the range of all others.
AGES = (-(10**12), -10, 10, 60, 600, 3600, 6 * 3600, 86_400, 7 * 86_400, 30 * 86_400, 365 * 86_400, 10**12)


def mark_duplicates(judged: DataFrame, contract: Contract, table: DataFrame) -> DataFrame:
    """Returns the judged rows (see `parse`) with the reject_reason "duplicate" for each valid row whose key is in `table`, or in an
    earlier valid row: by partition, offset and position in the array, or by file name and place in the file. The rows are read only
    once, and kept on disk.
    """
    spark, seen = judged.sparkSession, Observation()
    figures = _figures(contract.key_time)
    rows = judged.withColumn(ROW, F.monotonically_increasing_id())
    with code_generation(spark):
        # A cache would hold a batch of rows in memory.
        rows = rows.observe(seen, *figures).localCheckpoint(storageLevel=StorageLevel.DISK_ONLY)
    found = observed(spark, seen, OBSERVATION_SECONDS)
    count = rows.where("reject_reason IS NULL").count() if found is None else found.get("rows", 0)
    if not count:
        return rows.drop(ROW)
    is_few = count <= FEW_ROWS
    with setting(spark, "spark.sql.shuffle.partitions", "1") if is_few else code_generation(spark):
        near = table.where(_has_time_near(contract.key_time, found))
        duplicates = _duplicates(rows, contract.key, near, count)
        if is_few:
            numbers = [str(row[0]) for row in duplicates.collect()]
            is_duplicate = f"`{ROW}` IN ({', '.join(numbers)})" if numbers else "false"
            reason = F.coalesce("reject_reason", F.when(F.expr(is_duplicate), DUPLICATE))
            return rows.withColumn("reject_reason", reason).drop(ROW)
        duplicates = duplicates.localCheckpoint()
        is_large = duplicates.count() > MAX_BROADCAST_ROWS
    duplicates = duplicates.select(ROW, F.lit(DUPLICATE).alias(f"{ROW} reason"))
    return (
        rows.join(duplicates if is_large else F.broadcast(duplicates), ROW, "left")
        .withColumn("reject_reason", F.coalesce("reject_reason", f"`{ROW} reason`"))
        .drop(f"{ROW} reason", ROW)
    )


def _figures(time: str) -> list[Column]:
    """The figures to observe: the number of valid rows, and their first and last time in each range of AGES."""
    is_valid = F.col("reject_reason").isNull()
    times = []
    for low, high in pairwise(AGES) if time else ():
        age = f"(unix_micros(ingest_time) - unix_micros(`{time}`))"
        is_of_age = f"reject_reason IS NULL AND {age} >= {low * 1_000_000} AND {age} < {high * 1_000_000}"
        one = f"CASE WHEN {is_of_age} THEN unix_micros(`{time}`) END"
        times += [f"min({one})", f"max({one})"]
    return [F.count_if(is_valid).alias("rows"), F.expr(f"array({', '.join(times)})").alias("times")]


def _has_time_near(time: str, found: dict[str, Any] | None) -> str:
    """SQL: whether a row of the table, judging by its time, can have the key of a valid row. `found`: the observed figures. Delta
    skips files without such rows.
    """
    if not time or found is None:
        return "true"
    times = list(found["times"])
    if any(first is not None and first < GREGORIAN_START for first in times):
        return "true"  # Delta misreads its statistics of the days that the Gregorian calendar skipped
    ranges = [(first, last) for first, last in zip(times[::2], times[1::2]) if first is not None]
    return " OR ".join(
        [
            "false",
            *(f"`{time}` BETWEEN timestamp_micros({first}) AND timestamp_micros({last})" for first, last in ranges),
        ]
    )


def _duplicates(judged: DataFrame, key: tuple[str, ...], table: DataFrame, count: int) -> DataFrame:
    """The numbers (ROW) of the valid rows (`count` in all) whose key is in the table or in an earlier row."""
    names = [f"key {number}" for number in range(len(key))]
    keys = [F.expr(_short(column, judged.schema[column].dataType)).alias(name) for column, name in zip(key, names)]
    of_topic = [name for name in ("partition", "offset", "element") if name in judged.columns]
    order = of_topic if "offset" in judged.columns else ["source_file"]
    rows = judged.where("reject_reason IS NULL").select(ROW, *order, *keys)
    in_order = Window.partitionBy(*(f"`{name}`" for name in names)).orderBy(*order, ROW)
    rows = rows.withColumn("number", F.row_number().over(in_order))
    repeats, firsts, there = rows.where("number > 1"), rows.where("number = 1"), table.select(*keys)
    if count <= MAX_BROADCAST_ROWS:  # reads the table without sorting it
        found = there.join(F.broadcast(firsts), names).select(ROW).distinct()
    else:
        found = firsts.join(there, names, "left_semi").select(ROW)
    return repeats.select(ROW).union(found)


def _short(column: str, kind: DataType) -> str:
    """SQL: the value of a key's column, or its hash if it is long, because keys are kept in memory."""
    if not isinstance(kind, StringType):
        return f"`{column}`"
    return f"IF(octet_length(`{column}`) > {LONG_BYTES}, sha2(`{column}`, 256), `{column}`)"
