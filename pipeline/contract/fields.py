"""The kinds of fields in a contract: their JSON, and the SQL that turns it into the value of a column."""

import re
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from pipeline.contract.columns import RESERVED_COLUMNS

# RFC 3339 without the lower-case "t" and "z". The short offsets +01 and +0100 of ISO 8601 are accepted, too.
RFC3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d(?::?\d\d)?)"
# The years 0 to 9999 in UTC, in seconds since 1970.
FIRST_SECOND, END_SECOND = -62_167_219_200, 253_402_300_800


class ContractError(Exception):
    """An invalid contract. The message names the field or the rule."""


@dataclass(frozen=True)
class Field(ABC):
    """A field of a record.

    `name`: its name in the record; a dotted path such as "device.id" leads into nested objects. `column`: its column in the
    table, by default the name with "_" instead of ".". `required`: whether a record without the field (absent, null, or a
    blank string) is rejected.
    """

    name: str
    _: KW_ONLY
    column: str = ""
    required: bool = True

    @property
    @abstractmethod
    def type(self) -> str:
        """The SQL type of the column."""

    @property
    @abstractmethod
    def json_types(self) -> tuple[str, ...]:
        """The types that the JSON value can have, as named by schema_of_variant."""

    @property
    @abstractmethod
    def plain(self) -> str:
        """A regular expression for the usual JSON of the field. Its single group is the text passed to `value`."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not all(self.path):
            raise ContractError(f"the field {self.name!r} needs a name that does not begin or end with a dot")
        object.__setattr__(self, "column", self.column or "_".join(self.path))
        if not self.column.isidentifier():
            raise ContractError(
                f"the field {self.name} can't have the column {self.column!r}: a column name may have only letters, "
                f'digits and "_"; name another with column="…"'
            )
        if self.column.lower() in RESERVED_COLUMNS:
            raise ContractError(
                f"the field {self.name} can't have the column {self.column}, which is reserved for the "
                f'tables; name another with column="…"'
            )

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    def value(self, text: str) -> str:
        """SQL: the column's value, from the SQL of the JSON value as a string; null if it is not a valid value."""
        return text

    def is_invalid(self, value: str) -> str:
        """SQL over `value`, `arrival_time` (may be null) and `ingest_time`: whether a field that is present has an invalid value."""
        return f"{value} IS NULL"


class Text(Field):
    """A string. If the field is required, a blank string counts as missing."""

    type = "STRING"
    json_types = ("STRING",)
    # It does not begin with white space, so it is not blank. Its range ends before U+FFFD, which Java substitutes for
    # invalid UTF-8.
    plain = r'"((?!\p{IsWhite_Space})[ !#-\[\]-\x{fffc}]++)"'


class Boolean(Field):
    """true or false."""

    type = "BOOLEAN"
    json_types = ("BOOLEAN",)
    plain = "(true|false)"

    def value(self, text: str) -> str:
        return f"try_cast({text} AS BOOLEAN)"


class Number(Field):
    """A finite number, stored as a double."""

    type = "DOUBLE"
    json_types = ("BIGINT", "DECIMAL", "DOUBLE")
    plain = r"(-?(?:0|[1-9]\d{0,14}+)(?:\.\d{1,15}+)?+)"

    def value(self, text: str) -> str:
        # Adds 0, because a variant holds 0 for -0.0, and a record must have the same value however it is read.
        return f"nullif(nullif(try_cast({text} AS DOUBLE) + 0D, double('Infinity')), double('-Infinity'))"


@dataclass(frozen=True)
class Integer(Field):
    """A number written without a fraction or an exponent, of 32 or 64 `bits`."""

    bits: int = 64

    json_types = ("BIGINT",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (32, 64):
            raise ContractError(f"the field {self.name} has bits={self.bits!r}, which must be 32 or 64")

    @property
    def type(self) -> str:
        return "INT" if self.bits == 32 else "BIGINT"

    @property
    def plain(self) -> str:
        return rf"(-?(?:0|[1-9]\d{{0,{8 if self.bits == 32 else 17}}}+))"

    def value(self, text: str) -> str:
        return f"try_cast({text} AS {self.type})"


@dataclass(frozen=True)
class Timestamp(Field):
    """A time in the years 0 to 9999 in UTC, stored to the microsecond.

    `format`: "rfc3339" (a string: date, "T", time with seconds and an optional fraction, "Z" or an offset), "epoch_s" (seconds
    since 1970) or "epoch_ms" (whole milliseconds since 1970). `at_most_ahead`: how far it may be ahead of the record's
    arrival, such as "1 day"; unlimited by default.
    """

    format: str = "rfc3339"
    at_most_ahead: str = ""

    type = "TIMESTAMP"
    FORMATS: ClassVar = {  # (json_types, plain)
        "rfc3339": (Text.json_types, f'"({RFC3339})"'),
        "epoch_s": (Number.json_types, r"(-?(?:0|[1-9]\d{0,11}+)(?:\.\d{1,12}+)?+)"),
        "epoch_ms": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,14}+))"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in self.FORMATS:
            raise ContractError(
                f"the field {self.name} has format={self.format!r}, which must be one of {', '.join(self.FORMATS)}"
            )
        if self.at_most_ahead and not re.fullmatch(r"\d{1,6} (second|minute|hour|day|week)s?", self.at_most_ahead):
            raise ContractError(
                f"the field {self.name} has at_most_ahead={self.at_most_ahead!r}, which must be a duration such as "
                f'"10 minutes" or "1 day"'
            )

    @property
    def json_types(self) -> tuple[str, ...]:
        return self.FORMATS[self.format][0]

    @property
    def plain(self) -> str:
        return self.FORMATS[self.format][1]

    def value(self, text: str) -> str:
        if self.format == "rfc3339":
            return rf"try_cast(CASE WHEN {text} RLIKE r'\A{RFC3339}\z' THEN {text} END AS TIMESTAMP)"
        if self.format == "epoch_ms":
            number, per_second, time = f"try_cast({text} AS BIGINT)", 1000, "timestamp_millis({})"
        else:
            number, per_second, time = (
                f"try_cast({text} AS DECIMAL(24, 12))",
                1,
                "timestamp_micros(CAST(floor({} * 1000000) AS BIGINT))",
            )
        return (
            f"CASE WHEN {number} >= {FIRST_SECOND * per_second} AND {number} < {END_SECOND * per_second} "
            f"THEN {time.format(number)} END"
        )

    def is_invalid(self, value: str) -> str:
        # With an offset, a time written with the year 0 or 9999 can fall into another year.
        first, end = (f"timestamp_seconds({second})" for second in (FIRST_SECOND, END_SECOND))
        other_year = f" OR {value} < {first} OR {value} >= {end}" if self.format == "rfc3339" else ""
        latest = f"coalesce(arrival_time, ingest_time) + INTERVAL {self.at_most_ahead}"
        return super().is_invalid(value) + other_year + (f" OR {value} > {latest}" if self.at_most_ahead else "")
