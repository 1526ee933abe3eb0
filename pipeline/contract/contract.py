"""Contracts. A contract defines the fields of a valid record and the rules it must obey; readings.py is an example.

    from pipeline.contract import Boolean, Contract, Integer, Number, Text, Timestamp

pipeline/contract/judge.py applies it to records.
"""

import argparse
import hashlib
import itertools
import re
import runpy
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.contract.columns import ELEMENT_COLUMNS
from pipeline.contract.fields import KEY, ContractError, Elements, Field
from pipeline.contract.private import is_deterministic, is_of_one_row, is_zone
from pipeline.contract.times import Timestamp
from pipeline.paths import REPOSITORY
from pipeline.terminal.arguments import location
from pipeline.terminal.errors import PipelineError, first_line

from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

# Maximum bytes of a record, or of a file with --multiline. It has to fit in memory several times over per core.
MAX_RECORD_BYTES = 8_000_000
# Reasons that come from reading, not from a contract: two reads of a record disagree, a message is larger than
# MAX_RECORD_BYTES or has too many readings, or a file can't be read to its end.
OTHER_REASONS = INCONSISTENT, OVERSIZED, UNREADABLE = "inconsistent_verdict", "oversized_record", "unreadable_file"
DUPLICATE = "duplicate"
MOVING = "replay ([0-9]+): "  # pattern: the start of a record's reject_reason while a replay moves it


@dataclass(frozen=True)
class Contract:
    """Defines which records are valid. Raises ContractError.

    `fields`: in the order of the table's columns; records are read fastest if they have their fields in the same order.
    `rules`: reasons to reject a record, each with an SQL condition on the columns and `ingest_time` that is true for such a record. The
    first rule that is true gives the reason. `key`: the columns that identify a reading. A reading that is otherwise valid, but
    whose key is in the table already, is rejected as a duplicate.
    """

    fields: tuple[Field, ...]
    rules: dict[str, str] = field(default_factory=dict)
    key: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.fields or not all(isinstance(each, Field) for each in self.fields):
            raise ContractError("it needs at least one field, of one of the kinds in pipeline.contract")
        if not self.json_fields:
            raise ContractError(f"it needs at least one field besides {KEY}")
        columns: dict[str, Field] = {}
        for each in self.fields:
            if any(each.name == other.name for other in columns.values()):
                raise ContractError(f"the field {each.name} appears twice")
            if other := columns.get(each.column.lower()):
                raise ContractError(
                    f"the fields {other.name} and {each.name} share a column, {each.column} (case is "
                    f'ignored); name another for one of them with column="…"'
                )
            columns[each.column.lower()] = each
        for fields in (self.record_fields, self.element_fields):
            for outer, inner in itertools.permutations(fields, 2):
                if inner.path[: len(outer.path)] == outer.path:
                    kind = "an array" if isinstance(outer, Elements) else "a single value"
                    raise ContractError(f"the field {outer.name} is {kind}, so {inner.name} can't be inside it")
        self._check_array()
        for reason, sql in self.rules.items():
            if not (isinstance(reason, str) and reason.strip() and isinstance(sql, str)):
                raise ContractError(f"the rule {reason!r} must be a name and its SQL, both of them strings")
            if reason in (*self._own_reasons, *OTHER_REASONS, *([DUPLICATE] if self.key else [])):
                raise ContractError(f"the rule {reason} has the name of an existing reason; rename it")
            if re.match(MOVING, reason):
                raise ContractError(
                    f"the rule {reason} begins like the reason of a record that is being replayed; rename it"
                )
        self._check_key()

    def _check_key(self) -> None:
        if isinstance(self.key, str):
            raise ContractError(f'its key must be a tuple, such as ("{self.key}",)')
        required = [each.column for each in self.fields if each.required]
        for column in self.key:
            if column not in required:
                raise ContractError(
                    f"its key has {column}, which is not the column of a required field; choose from {', '.join(required)}"
                )

    def _check_array(self) -> None:
        arrays = sorted({each.array for each in self.element_fields})
        if len(arrays) > 1:
            raise ContractError(f"it has fields in two arrays, {arrays[0]} and {arrays[1]}; it can have only one array")
        if self.array == "[]" and (outside := [each.name for each in self.json_fields if not each.array]):
            raise ContractError(f"the field {outside[0]} is outside the array [], which is the whole record")
        if self.array and (own := {each.column.lower() for each in self.fields} & ELEMENT_COLUMNS):
            raise ContractError(
                f"a field has the column {min(own)}, which is reserved for the tables of a contract with an array; name another "
                f'with column="…"'
            )

    @property
    def array(self) -> str:
        """The name of the array whose elements are the readings, such as "readings[]"; "" if each record is one reading."""
        return next((each.array for each in self.fields if each.array), "")

    @property
    def json_fields(self) -> tuple[Field, ...]:
        """The fields that are read from the record itself."""
        return tuple(each for each in self.fields if each.name != KEY)

    @property
    def record_fields(self) -> tuple[Field, ...]:
        """The fields outside the array, and the array itself if there is one."""
        fields = tuple(each for each in self.fields if not each.array)
        return (*fields, Elements(self.array)) if self.array else fields

    @property
    def element_fields(self) -> tuple[Field, ...]:
        """The fields of the array's elements."""
        return tuple(each for each in self.fields if each.array)

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a table: SQL names and types."""
        return {each.column: each.type for each in self.fields}

    @property
    def time(self) -> str:
        """The column that says when a record was created; if there is none, when it arrived."""
        return next((each.column for each in self.fields if isinstance(each, Timestamp)), "ingest_time")

    @property
    def key_time(self) -> str:
        """The key's first Timestamp column; "" if it has none."""
        return next(
            (each.column for each in self.fields if isinstance(each, Timestamp) and each.column in self.key), ""
        )

    @property
    def id(self) -> str:
        """Changes when the verdict on a record, or its values, may change."""
        key = f", key={self.key!r}" if self.key else ""
        described = f"Contract(fields={self.fields!r}, rules={self.rules!r}{key})"
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons for which a record can be rejected, in the order in which they are checked."""
        return (*self._own_reasons, *self.rules, *([DUPLICATE] if self.key else []))

    @property
    def _own_reasons(self) -> tuple[str, ...]:
        """Those that do not come from its rules or its key."""
        return (
            "empty_record",
            "invalid_encoding",
            "malformed_json",
            *(
                f"{kind}_{each.name}"
                for fields in (self.record_fields, self.element_fields)
                for kind in ("missing", "invalid")
                for each in fields
                if each.required or kind == "invalid"
            ),
        )

    @property
    def conditions(self) -> dict[str, str]:
        """The rules as SQL to embed in other SQL. A line break follows each rule, in case it ends with a comment."""
        return {reason: f"({sql}\n)" for reason, sql in self.rules.items()}

    def check(self, spark: SparkSession, has_keys: bool = True, has_arrays: bool = True) -> None:
        """Raises ContractError if Java does not know a time zone, a rule is not SQL over the columns, or its result can differ for
        the same record. `has_keys`: whether the records are Kafka messages, which have a key. `has_arrays`: whether a record can be
        an array.
        """
        if not has_keys and self.json_fields != self.fields:
            raise ContractError(f"the field {KEY} is the key of a Kafka message, which a file does not have")
        if not has_arrays and self.array == "[]":
            name = self.fields[0].name
            raise ContractError(
                f"with --multiline, each element of a file's array is a record already; write {name.removeprefix('[].')} "
                f"instead of {name}"
            )
        for each in self.fields:
            if isinstance(each, Timestamp) and each.zone and not is_zone(spark, each.zone):
                raise ContractError(
                    f'the field {each.name} has an unknown zone, {each.zone}; use one such as "Europe/Berlin"'
                )
        columns = self.columns | {"ingest_time": "TIMESTAMP"}
        empty = spark.range(0).selectExpr(*(f"CAST(NULL AS {kind}) AS `{name}`" for name, kind in columns.items()))
        for reason, condition in self.conditions.items():
            told = " ".join(self.rules[reason].split())
            try:
                if not is_of_one_row(empty, condition):
                    raise ContractError(
                        f"the rule {reason} ({told}) depends on more than the record, and its result may change when a batch is "
                        f"repeated; it can only use {', '.join(columns)}"
                    )
                if not is_deterministic(empty, condition):
                    raise ContractError(
                        f"the rule {reason} ({told}) can give different results when a batch is repeated; for the "
                        f"current time, use ingest_time"
                    )
            except PySparkException as error:
                problem = re.sub(r"\.? SQLSTATE.*", "", first_line(str(error)).strip())
                raise ContractError(
                    f"the rule {reason} is not a condition on {', '.join(columns)}: {problem}"
                ) from error


@contextmanager
def in_file(path: str) -> Iterator[None]:
    """Turns a ContractError into a PipelineError that names the file."""
    try:
        yield
    except ContractError as error:
        raise PipelineError(f"Invalid contract in {path}: {error}.") from error


def add_readings_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option --readings."""
    parser.add_argument(
        "--readings",
        type=location,
        default=str(REPOSITORY / "readings.py"),
        metavar="FILE",
        help="Python file that defines CONTRACT; the script runs it",
    )


def load_contract(path: str) -> Contract:
    """Returns the CONTRACT of the Python file at `path`. Raises PipelineError if there is none or it is invalid."""
    return load_readings(path)["CONTRACT"]


def load_readings(path: str) -> dict[str, Any]:
    """Returns everything defined in the Python file at `path`. Raises PipelineError if it defines no CONTRACT."""
    if not Path(path).is_file():
        raise PipelineError(f"There is no contract file {path}. Name one with --readings; readings.py is an example.")
    try:
        with in_file(path):
            names = runpy.run_path(path)
    except PipelineError:
        raise
    except SyntaxError as error:
        raise PipelineError(f"{path} is not valid Python on line {error.lineno}: {error.msg}.") from error
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "common":
            raise PipelineError(
                f'{path} was written for an older version. Write "from pipeline.contract import …" instead of "from '
                f'common.contract import …", with the same names.'
            ) from error
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        raise PipelineError(
            f"{path} fails on line {lines[-1] if lines else 1}: {type(error).__name__}: {error}."
        ) from error
    if not isinstance(names.get("CONTRACT"), Contract):
        raise PipelineError(f"{path} has no CONTRACT = Contract(…). readings.py is an example.")
    return names
