"""Readings that came twice: their key is in the table already, or in an earlier row of the same batch."""

from pipeline.contract.columns import ROW
from pipeline.contract.contract import DUPLICATE, Contract
from pipeline.spark.private import code_generation

from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

MAX_BROADCAST_ROWS = 300_000  # keys that each task keeps in memory


def mark_duplicates(judged: DataFrame, contract: Contract, table: DataFrame) -> DataFrame:
    """Returns the judged rows (see `parse`) with the reject_reason "duplicate" for each valid row whose key is in `table`, or in an
    earlier valid row: a message with a lower partition or offset, or a line above it in its file. The rows are read only once,
    and kept on the disk.
    """
    order = ["partition", "offset"] if "offset" in judged.columns else ["source_file"]
    spark = judged.sparkSession
    with code_generation(spark):
        # A cache would hold a batch of rows in memory.
        rows = judged.withColumn(ROW, F.monotonically_increasing_id()).localCheckpoint(
            storageLevel=StorageLevel.DISK_ONLY
        )
        valid = rows.where("reject_reason IS NULL")
        key = [F.col(f"`{column}`") for column in contract.key]
        names = [f"key{number}" for number in range(len(key))]
        keys = valid.select(ROW, *order, *(column.alias(name) for column, name in zip(key, names)))
        is_first = Window.partitionBy(*names).orderBy(*order, ROW)
        found = keys.withColumn("number", F.row_number().over(is_first)).where("number > 1").select(ROW)
        there = table.where(_near(valid, contract.key_time)).select(
            *(column.alias(name) for column, name in zip(key, names))
        )
        found = found.union(_in_both(keys, there, names)).distinct().localCheckpoint()
        count = found.count()
    if not count:
        return rows.drop(ROW)
    found = found.select(ROW, F.lit(DUPLICATE).alias(f"{ROW}_reason"))
    return (
        rows.join(F.broadcast(found) if count <= MAX_BROADCAST_ROWS else found, ROW, "left")
        .withColumn("reject_reason", F.coalesce("reject_reason", f"{ROW}_reason"))
        .drop(f"{ROW}_reason", ROW)
    )


def _near(valid: DataFrame, time: str) -> str:
    """SQL: whether a row of the table may have a key of the valid rows, by its time. Delta skips files without such rows.

    Times that are about equally long ago make one range, so that a device whose clock stands still does not extend the range of
    all others.
    """
    if not time:
        return "true"
    seconds = f"unix_micros(ingest_time) / 1e6 - unix_micros(`{time}`) / 1e6"
    about = F.expr(f"signum({seconds}) * floor(log2(1 + abs({seconds})))")
    micros = F.unix_micros(f"`{time}`")
    ranges = valid.groupBy(about).agg(F.min(micros).alias("first"), F.max(micros).alias("last")).collect()
    return " OR ".join(
        [
            "false",
            *(f"`{time}` BETWEEN timestamp_micros({first}) AND timestamp_micros({last})" for _, first, last in ranges),
        ]
    )


def _in_both(keys: DataFrame, there: DataFrame, names: list[str]) -> DataFrame:
    """The numbers of those `keys` that are `there`, too."""
    if keys.limit(MAX_BROADCAST_ROWS + 1).count() <= MAX_BROADCAST_ROWS:
        return there.join(F.broadcast(keys), names).select(ROW)  # reads the table without sorting it
    return keys.join(there, names, "left_semi").select(ROW)
