"""The pipeline's tables: columns, properties, creation and maintenance."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.contract.columns import ELEMENT, FILE_ORIGIN, KAFKA_ORIGIN
from pipeline.delta.locks import write_lock
from pipeline.delta.private import configuration, remove_old_log_entries
from pipeline.paths import local_path, quarantine_of
from pipeline.spark.file_system import FileSystem
from pipeline.spark.private import setting
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say
from pipeline.terminal.signals import StopFlag

from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession

PROPERTIES = {
    # A stream appends one small file per batch. The files are merged as soon as there are 50 of them.
    "delta.autoOptimize.autoCompact": "true",
}
LOG_HISTORY, FILE_HISTORY = "delta.logRetentionDuration", "delta.deletedFileRetentionDuration"
# Each commit leaves files in _delta_log. On a local disk, every commit lists them all, which takes 15 µs per file; a
# batch every two seconds makes 7,200 files in two hours. Other stores are listed from the last checkpoint on.
LOCAL_HISTORY, REMOTE_HISTORY = "2 hours", "7 days"
# Table properties of this pipeline: the id of the checkpoint whose stream writes the table, and how its records are
# read (the contract's id and the source's mode).
WRITER = "pipeline.checkpoint.id"
NO_WRITER = ""  # the next stream with a new checkpoint takes over the table
REPLACED = "pipeline.checkpoint.replaced"  # the checkpoint that owned the table until it lost its writer
STARTS_AT = "pipeline.source.starts_at"  # where a stream with a new checkpoint starts reading, in the source's format
CONTRACT = "pipeline.contract.id"
MODE = "pipeline.source.mode"


@dataclass(frozen=True)
class TablePair:
    """The table at the path `table` and its quarantine, with their columns (SQL names and types).

    `origin`: the columns that say where a row came from. `keep_history`: how long their old versions can be read, such as
    "7 days"; None leaves existing tables as they are.
    """

    table: str
    columns: dict[str, str]
    quarantine_columns: dict[str, str]
    origin: tuple[str, ...]
    keep_history: str | None = None

    @property
    def has_elements(self) -> bool:
        """Whether a row is an element of its record."""
        return "elements" in self.quarantine_columns

    @property
    def quarantine(self) -> str:
        return quarantine_of(self.table)

    @contextmanager
    def write_lock(self, stopping: StopFlag, create: bool = False) -> Iterator[None]:
        """Locks both tables against other writers (pipeline/delta/locks.py). `create`: creates their folders first."""
        for path in filter(None, map(local_path, (self.quarantine, self.table))):
            if create:
                os.makedirs(path, exist_ok=True)
        with write_lock(self.quarantine, stopping), write_lock(self.table, stopping):
            yield


def bronze_tables(
    path: str, contract_columns: dict[str, str], keep_history: str | None = None, has_elements: bool = False
) -> TablePair:
    """`has_elements`: whether the contract has an array, and a row is one of its elements."""
    of_element = ELEMENT if has_elements else {}
    return TablePair(
        path,
        contract_columns | {"ingest_time": "TIMESTAMP"} | FILE_ORIGIN | of_element | {"_rescued_data": "STRING"},
        _quarantine_columns(FILE_ORIGIN, has_elements),
        ("source_file", *of_element),
        keep_history,
    )


def silver_tables(
    path: str, contract_columns: dict[str, str], keep_history: str | None = None, has_elements: bool = False
) -> TablePair:
    """`has_elements`: whether the contract has an array, and a row is one of its elements."""
    of_element = ELEMENT if has_elements else {}
    columns = (
        contract_columns
        | {"ingest_time": "TIMESTAMP"}
        | KAFKA_ORIGIN
        | of_element
        | {"raw_json": "STRING", "_rescued_data": "STRING"}
    )
    origin = ("partition", "offset", "kafka_timestamp", *of_element)
    return TablePair(path, columns, _quarantine_columns(KAFKA_ORIGIN, has_elements), origin, keep_history)


def _quarantine_columns(origin: dict[str, str], has_elements: bool) -> dict[str, str]:
    of_element = {"elements": "ARRAY<INT>"} if has_elements else {}
    return {"reject_reason": "STRING", "raw": "BINARY"} | origin | of_element | {"ingest_time": "TIMESTAMP"}


def create_table(spark: SparkSession, path: str, columns: dict[str, str], properties: dict[str, str]) -> None:
    """Creates the Delta table at `path` with these `properties`, among them WRITER, or takes over a table that no longer has a
    writer. Raises PipelineError if the table belongs to another stream.
    """
    files, log = FileSystem(spark, path), f"{path}/_delta_log"
    if not any(name[0].isdecimal() for name in files.names_in(log)):
        files.delete(log)  # left by an interrupted creation: Delta would neither find nor create a table there
    table = DeltaTable.createIfNotExists(spark).location(path)
    for name, kind in columns.items():
        table = table.addColumn(name, kind)
    # Columns whose minimum and maximum Delta records for each file, so that it can skip files. Each of them takes time
    # to write.
    times = ",".join(f"`{name}`" for name, kind in columns.items() if kind == "TIMESTAMP")
    history = history_of(LOCAL_HISTORY if local_path(path) else REMOTE_HISTORY)
    for name, value in (PROPERTIES | history | {"delta.dataSkippingStatsColumns": times} | properties).items():
        table = table.property(name, value)
    table.execute()
    writer = (properties_of(spark, path) or {}).get(WRITER)
    if writer == NO_WRITER:
        set_properties(spark, path, properties)
    elif writer != properties[WRITER]:
        raise PipelineError(
            f"Another stream has created the table {path} in the meantime. Give this one a --table and a "
            f"--checkpoint of its own."
        )


def add_missing_columns(spark: SparkSession, path: str, columns: dict[str, str]) -> None:
    """Adds the `columns` that the table at `path` lacks; they are null in older rows.

    A column that is no longer listed stays, and is null in newer rows. Raises PipelineError if a column has a different type.
    """
    there = {name.lower(): kind.upper() for name, kind in spark.read.format("delta").load(path).dtypes}
    for name, kind in columns.items():
        if there.get(name.lower(), kind) != kind:
            raise PipelineError(
                f"The column {name} of {path} is {there[name.lower()]}, but the contract says {kind}. Name "
                f"another column for the field, or give the stream a --table and a --checkpoint of its own."
            )
    new = ", ".join(f"`{name}` {kind}" for name, kind in columns.items() if name.lower() not in there)
    if new:
        spark.sql(f"ALTER TABLE {as_identifier(path)} ADD COLUMNS ({new})")
        say(f"New columns in {path}: {new.replace('`', '')}.")


def set_properties(spark: SparkSession, path: str, properties: dict[str, str]) -> dict[str, str] | None:
    """Sets properties of the table at `path`. Returns all of them."""
    quoted = {name: value.replace("\\", r"\\").replace("'", r"\'") for name, value in properties.items()}
    changed = ", ".join(f"'{name}' = '{value}'" for name, value in quoted.items())
    spark.sql(f"ALTER TABLE {as_identifier(path)} SET TBLPROPERTIES ({changed})")
    return properties_of(spark, path)


def clean_up(spark: SparkSession, path: str) -> None:
    """Deletes data files and log entries of the table at `path` that time travel no longer needs."""
    spark.sql(f"VACUUM {as_identifier(path)}")
    remove_old_log_entries(spark, path)


def history_of(duration: str | None) -> dict[str, str]:
    """Delta's properties for a table whose old versions can be read for `duration`, such as "7 days"; {} for None."""
    return dict.fromkeys((LOG_HISTORY, FILE_HISTORY), f"interval {duration}") if duration else {}


def time_travel(spark: SparkSession, path: str) -> str:
    """How far back the table at `path` can be read, for example "2 hours"."""
    properties = properties_of(spark, path) or {}
    return properties.get(FILE_HISTORY, "interval 1 week").removeprefix("interval ")


def properties_of(spark: SparkSession, path: str) -> dict[str, str] | None:
    """The properties of the table at `path`; None if there is no table."""
    if not DeltaTable.isDeltaTable(spark, path):
        return None
    return configuration(spark, path)


def rows_at(spark: SparkSession, path: str, version: int) -> DataFrame:
    """The table as of a version, even if it is older than the table's history. Its files may be gone."""
    with setting(spark, "spark.databricks.delta.vacuum.enforceTimeTravelWithinDeletedFileRetentionDuration", "false"):
        return spark.read.format("delta").option("versionAsOf", version).load(path)


def as_identifier(path: str) -> str:
    """The SQL identifier of the table at `path`."""
    return "delta.`" + path.replace("`", "``") + "`"
