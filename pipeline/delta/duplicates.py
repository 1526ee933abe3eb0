"""Readings that came twice: their key is in the table already, or in an earlier row of the same batch."""

from pipeline.contract.columns import ROW
from pipeline.contract.contract import DUPLICATE, Contract
from pipeline.spark.private import code_generation, setting

from pyspark import StorageLevel
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

FEW_ROWS = 2000  # valid rows of a batch for which one task is fastest
MAX_BROADCAST_ROWS = 300_000  # rows of which each task keeps a copy in memory


def mark_duplicates(judged: DataFrame, contract: Contract, table: DataFrame) -> DataFrame:
    """Returns the judged rows (see `parse`) with the reject_reason "duplicate" for each valid row whose key is in `table`, or in an
    earlier valid row: a message with a lower partition or offset, or a line above it in its file. The rows are read only once,
    and kept on the disk.
    """
    spark = judged.sparkSession
    with code_generation(spark):
        # A cache would hold a batch of rows in memory.
        rows = judged.withColumn(ROW, F.monotonically_increasing_id()).localCheckpoint(
            storageLevel=StorageLevel.DISK_ONLY
        )
        valid = rows.where("reject_reason IS NULL")
        count, is_near = _near(valid, contract.key_time)
        is_few = count <= FEW_ROWS
        with setting(spark, "spark.sql.shuffle.partitions", "1" if is_few else "4"):
            found = _duplicates(valid, contract.key, table.where(is_near), count)
            if is_few:
                numbers = [str(row[0]) for row in found.collect()]
                is_duplicate = f"`{ROW}` IN ({', '.join(numbers)})" if numbers else "false"
                reason = F.coalesce("reject_reason", F.when(F.expr(is_duplicate), DUPLICATE))
                return rows.withColumn("reject_reason", reason).drop(ROW)
            found = found.distinct().localCheckpoint()
            is_large = found.count() > MAX_BROADCAST_ROWS
    found = found.select(ROW, F.lit(DUPLICATE).alias(f"{ROW} reason"))
    return (
        rows.join(found if is_large else F.broadcast(found), ROW, "left")
        .withColumn("reject_reason", F.coalesce("reject_reason", f"`{ROW} reason`"))
        .drop(f"{ROW} reason", ROW)
    )


def _near(valid: DataFrame, time: str) -> tuple[int, str]:
    """Returns the number of valid rows, and SQL: whether a row of the table may have the key of one, by its time. Delta skips files
    without such rows.

    Times that are about equally long ago make one range, so that a device whose clock stands still does not extend the range of
    all others.
    """
    if not time:
        return valid.count(), "true"
    seconds = f"unix_micros(ingest_time) / 1e6 - unix_micros(`{time}`) / 1e6"
    about = F.expr(f"signum({seconds}) * floor(log2(1 + abs({seconds})))")
    micros = F.unix_micros(f"`{time}`")
    ranges = valid.groupBy(about).agg(F.count("*").alias("rows"), F.min(micros), F.max(micros)).collect()
    conditions = [
        f"`{time}` BETWEEN timestamp_micros({first}) AND timestamp_micros({last})" for _, _, first, last in ranges
    ]
    return sum(row.rows for row in ranges), " OR ".join(conditions) or "false"


def _duplicates(valid: DataFrame, key: tuple[str, ...], table: DataFrame, count: int) -> DataFrame:
    """The numbers (ROW) of those valid rows, of which there are `count`, whose key is in the table or in an earlier one."""
    names = [f"key {number}" for number in range(len(key))]
    keys = [F.col(f"`{column}`").alias(name) for column, name in zip(key, names)]
    of_topic = [name for name in ("partition", "offset", "element") if name in valid.columns]
    order = of_topic if "offset" in valid.columns else ["source_file"]
    rows = valid.select(ROW, *order, *keys)
    in_order = Window.partitionBy(*(f"`{name}`" for name in names)).orderBy(*order, ROW)
    repeats = rows.withColumn("number", F.row_number().over(in_order)).where("number > 1").select(ROW)
    there = table.select(*keys)
    if count <= MAX_BROADCAST_ROWS:  # reads the table without sorting it
        return repeats.union(there.join(F.broadcast(rows), names).select(ROW)).distinct()
    return repeats.union(rows.join(there, names, "left_semi").select(ROW))
