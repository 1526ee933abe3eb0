"""The kinds of fields in a contract: their JSON, and the SQL that turns it into the value of a column."""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from pipeline.contract.columns import RESERVED_COLUMNS

# RFC 3339 without the lower-case "t" and "z". The short offsets +01 and +0100 of ISO 8601 are accepted, too.
OFFSET = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
RFC3339 = rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?{OFFSET}"
# ISO 8601's calendar date and time, in its extended form (also with a blank instead of the "T") or its basic form.
DATE_TIME = r"(?:\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?|\d{8}T\d{4}(?:\d\d(?:[.,]\d+)?)?)"
KEY = "@key"  # the name of a field that stands for the key of a Kafka message
# The years 0 to 9999 in UTC, in seconds since 1970.
FIRST_SECOND, END_SECOND = -62_167_219_200, 253_402_300_800


class ContractError(Exception):
    """An invalid contract. The message names the field or the rule."""


def sql_text(text: str) -> str:
    """SQL: a constant string."""
    return "'" + re.sub(r"(['\\])", r"\\\1", text) + "'"


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Field(ABC):
    """A field of a record.

    `name`: its name in the record; a dotted path such as "device.id" reaches into nested objects. "readings[].value" is a
    field of the elements of an array, each of which is a reading; "[].value" if the record itself is the array. `column`:
    its column in the table, by default the name (in an element, the part after "[].") with "_" instead of ".". `required`:
    whether a record without the field (absent, null, or a blank string) is rejected.
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
    def expected(self) -> str:
        """The JSON that the field takes, in words."""

    @property
    def marks_strings(self) -> bool:
        """Whether `value` takes strings with a quote in front, to tell "1" from 1."""
        return False

    @property
    @abstractmethod
    def plain(self) -> str:
        """A regular expression for the usual JSON of the field. Exactly one of its groups captures the text passed to `value`."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not all(self.path):
            raise ContractError(f"the field {self.name!r} needs a name that does not begin or end with a dot")
        if "[]" in "".join((self.array[:-2], *self.path)) or not all(self.array.split(".")) and self.array:
            raise ContractError(
                f'the field {self.name} needs a name with at most one array and a name after it, such as "readings[].value"'
            )
        if self.name == KEY and not isinstance(self, Text):
            raise ContractError(f"the field {KEY} is the key of a Kafka message, which is a Text")
        object.__setattr__(self, "column", self.column or "_".join(self.path).removeprefix("@"))
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
    def array(self) -> str:
        """The name of the array whose elements have the field, such as "readings[]"; "" for a field outside of arrays."""
        before, mark, _ = self.name.partition("[].")
        return f"{before}[]" if mark else ""

    @property
    def path(self) -> tuple[str, ...]:
        """The names that lead to the field, from the record or from an element of its array."""
        return tuple((self.name.partition("[].")[2] or self.name).split("."))

    def value(self, text: str) -> str:
        """SQL: the column's value, from the SQL of the JSON value as a string; null if it is not a valid value."""
        return text

    def is_invalid(self, value: str) -> str:
        """SQL over `value`, `arrival_time` (may be null) and `ingest_time`: whether a field that is present has an invalid value."""
        return f"{value} IS NULL"


class Elements(Field):
    """The array whose elements are the readings of a record. `name`: such as "readings[]"; "[]" if it is the record itself."""

    type = "BOOLEAN"  # true for an array
    expected = "an array"
    json_types = ()
    plain = ""

    def __post_init__(self) -> None:
        """Its name was checked with those of the fields."""

    def value(self, text: str) -> str:
        return "true"

    @property
    def path(self) -> tuple[str, ...]:
        return tuple(self.name.removesuffix("[]").split(".")) if self.name != "[]" else ("[]",)


class Text(Field):
    """A string. If the field is required, a blank string counts as missing."""

    type = "STRING"
    expected = "a string"
    json_types = ("STRING",)
    # It does not begin with white space, so it is not blank. Its range ends before U+FFFD, which Java substitutes for
    # invalid UTF-8.
    plain = r'"((?!\p{IsWhite_Space})[ !#-\[\]-\x{fffc}]++)"'


@dataclass(frozen=True)
class Unquoted(Field):
    """A field whose JSON is not a string.

    `quoted`: also takes the value in a string, written as it would be without the quotes: "21.5" for 21.5.
    """

    quoted: bool = False

    @property
    @abstractmethod
    def unquoted(self) -> str:
        """A regular expression for the usual JSON of the field without quotes. Its single group captures everything."""

    @property
    def plain(self) -> str:
        return f'(?:{self.unquoted}|"{self.unquoted}")' if self.quoted else self.unquoted


@dataclass(frozen=True)
class Boolean(Unquoted):
    """true or false.

    `true`, `false`: the strings, integers and Booleans that stand for them instead, such as ("ON", 1) and ("OFF", 0).
    """

    true: tuple[str | int | bool, ...] = ()
    false: tuple[str | int | bool, ...] = ()

    type = "BOOLEAN"
    unquoted = "(true|false)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.true or self.false):
            return
        for values in (self.true, self.false):
            if (
                not isinstance(values, tuple)
                or not values
                or not all(type(value) in (str, int, bool) for value in values)
            ):
                raise ContractError(
                    f"the field {self.name} needs both true=(…) and false=(…), each with strings, integers or Booleans, such as "
                    f'true=("ON", 1), false=("OFF", 0)'
                )
        if both := {*map(json_text, self.true)} & {*map(json_text, self.false)}:
            raise ContractError(f"the field {self.name} takes {min(both)} for both true and false")
        if large := [value for value in self.true + self.false if type(value) is int and not -(2**63) <= value < 2**63]:
            raise ContractError(f"the field {self.name} can't take {large[0]}, which does not fit in 64 bits")
        if self.quoted:
            raise ContractError(f"the field {self.name} can't be quoted: list the strings in true=(…) and false=(…)")
        if any(isinstance(value, str) and not value.strip() for value in self.true + self.false):
            raise ContractError(
                f"the field {self.name} can't take a blank string for true or false: it counts as missing"
            )

    @property
    def expected(self) -> str:
        return " or ".join(map(json_text, self.true + self.false)) or "true or false"

    @property
    def marks_strings(self) -> bool:
        return bool(self.true)

    @property
    def json_types(self) -> tuple[str, ...]:
        names = {str: "STRING", int: "BIGINT", bool: "BOOLEAN"}
        return tuple({names[type(value)] for value in self.true + self.false}) or ("BOOLEAN",)

    @property
    def plain(self) -> str:
        if not self.true:
            return super().plain
        texts = [json_text(value) for value in self.true + self.false]
        # Those that need no escape, can't be confused with invalid UTF-8 (see `Text.plain`), and have no bracket that
        # would count as a group.
        strings = [text[:-1] for text in texts if re.fullmatch(r'"[ !#-\'*-\[\]-\ufffc]+"', text)]
        others = [text for text in texts if text[0] != '"']
        return '(?:({})"|({}))'.format(
            *("|".join(rf"\Q{each}\E" for each in some) or "(?!)" for some in (strings, others))
        )

    def value(self, text: str) -> str:
        if not self.true:
            return f"try_cast({text} AS BOOLEAN)"
        of_true, of_false = (
            ", ".join(sql_text(f'"{value}' if isinstance(value, str) else json_text(value)) for value in values)
            for values in (self.true, self.false)
        )
        return f"CASE WHEN {text} IN ({of_true}) THEN true WHEN {text} IN ({of_false}) THEN false END"


@dataclass(frozen=True)
class Number(Unquoted):
    """A finite number, stored as a double."""

    type = "DOUBLE"
    expected = "a number"
    json_types = ("BIGINT", "DECIMAL", "DOUBLE")
    unquoted = r"(-?(?:0|[1-9]\d{0,14}+)(?:\.\d{1,15}+)?+)"

    def value(self, text: str) -> str:
        # Adds 0, because a variant holds 0 for -0.0, and a record must have the same value however it is read.
        return f"nullif(nullif(try_cast({text} AS DOUBLE) + 0D, double('Infinity')), double('-Infinity'))"


@dataclass(frozen=True)
class Integer(Unquoted):
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
    def expected(self) -> str:
        return f"a {self.bits}-bit integer"

    @property
    def unquoted(self) -> str:
        return rf"(-?(?:0|[1-9]\d{{0,{8 if self.bits == 32 else 17}}}+))"

    def value(self, text: str) -> str:
        return f"try_cast({text} AS {self.type})"


@dataclass(frozen=True)
class Timestamp(Unquoted):
    """A time in the years 0 to 9999 in UTC, stored to the microsecond.

    `format`: "rfc3339" (a string: date, "T", time with seconds and an optional fraction, "Z" or an offset), "iso8601" (a
    string: also with a blank instead of the "T", without seconds, with a comma before the fraction, in the basic form
    20261120T080000), "epoch_s" (seconds since 1970), or "epoch_ms", "epoch_us" or "epoch_ns" (whole milli-, micro- or
    nanoseconds since 1970). `zone`: the time zone of times in "iso8601" that have no offset, such as "Europe/Berlin"; they
    are invalid without it. Times in the hour that a zone repeats in autumn are read as the earlier one; times in the hour
    that it skips in spring are invalid. `at_most_ahead`: how far it may be ahead of the record's arrival, such as "1 day";
    unlimited by default.
    """

    format: str = "rfc3339"
    at_most_ahead: str = ""
    zone: str = ""

    type = "TIMESTAMP"
    FORMATS: ClassVar = {  # (json_types, unquoted or plain)
        "rfc3339": (Text.json_types, f'"({RFC3339})"'),
        "iso8601": (Text.json_types, f'"({DATE_TIME}{OFFSET}?)"'),
        "epoch_s": (Number.json_types, r"(-?(?:0|[1-9]\d{0,11}+)(?:\.\d{1,12}+)?+)"),
        "epoch_ms": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,14}+))"),
        "epoch_us": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,17}+))"),
        "epoch_ns": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,18}+))"),
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
        if self.quoted and self._is_string:
            raise ContractError(f"the field {self.name} can't be quoted: {self.format} is a string already")
        if self.zone and (self.format != "iso8601" or not re.fullmatch(r"\w+(/[\w+-]+)*", self.zone)):
            raise ContractError(
                f'the field {self.name} has zone={self.zone!r}, which must be a time zone such as "Europe/Berlin", together with '
                f'format="iso8601"'
            )

    @property
    def expected(self) -> str:
        form = {
            "rfc3339": "a time such as 2026-11-20T08:00:00Z",
            "iso8601": "an ISO 8601 date and time" + (f" in {self.zone}" if self.zone else " with an offset"),
            "epoch_s": "a time in seconds",
        }.get(self.format, f"a whole number of {self.format.removeprefix('epoch_')} since 1970")
        return form + (f", at most {self.at_most_ahead} ahead" if self.at_most_ahead else "")

    @property
    def _is_string(self) -> bool:
        return self.json_types == Text.json_types

    @property
    def json_types(self) -> tuple[str, ...]:
        return self.FORMATS[self.format][0]

    @property
    def unquoted(self) -> str:
        return self.FORMATS[self.format][1]

    def value(self, text: str) -> str:
        if self.format == "rfc3339":
            return rf"try_cast(CASE WHEN {text} RLIKE r'\A{RFC3339}\z' THEN {text} END AS TIMESTAMP)"
        if self.format == "iso8601":
            return self._iso8601(text)
        whole = f"try_cast({text} AS BIGINT)"
        number, per_second, time = {
            "epoch_s": (
                f"try_cast({text} AS DECIMAL(24, 12))",
                1,
                "timestamp_micros(CAST(floor({} * 1000000) AS BIGINT))",
            ),
            "epoch_ms": (whole, 1000, "timestamp_millis({})"),
            "epoch_us": (whole, 1_000_000, "timestamp_micros({})"),
            # 64 bits hold the years 1677 to 2262. Division rounds towards zero.
            "epoch_ns": (f"({whole} div 1000 - CAST({whole} % 1000 < 0 AS INT))", 1_000_000, "timestamp_micros({})"),
        }[self.format]
        return (
            f"CASE WHEN {number} >= {FIRST_SECOND * per_second} AND {number} < {END_SECOND * per_second} "
            f"THEN {time.format(number)} END"
        )

    def _iso8601(self, text: str) -> str:
        # Spark reads the extended form with seconds.
        extended = rf"regexp_replace(translate({text}, ', ', '.T'), r'^(\d{{4}})-?(\d\d)-?(\d\d)T(\d\d):?(\d\d):?', '$1-$2-$3T$4:$5:')"
        complete = rf"regexp_replace({extended}, r':(?!\d)', ':00')"
        form = DATE_TIME + OFFSET + ("?" if self.zone else "")
        time = rf"try_cast(CASE WHEN {text} RLIKE r'\A{form}\z' THEN {complete} END AS TIMESTAMP)"
        if not self.zone:
            return time
        in_zone = f"to_utc_timestamp({time}, '{self.zone}')"
        return (
            rf"CASE WHEN {text} RLIKE r'{OFFSET}\z' THEN {time} "
            f"WHEN from_utc_timestamp({in_zone}, '{self.zone}') = {time} THEN {in_zone} END"  # the zone has this time
        )

    def is_invalid(self, value: str) -> str:
        # With an offset, a time written with the year 0 or 9999 can fall into another year.
        first, end = (f"timestamp_seconds({second})" for second in (FIRST_SECOND, END_SECOND))
        other_year = f" OR {value} < {first} OR {value} >= {end}" if self._is_string else ""
        latest = f"coalesce(arrival_time, ingest_time) + INTERVAL {self.at_most_ahead}"
        return super().is_invalid(value) + other_year + (f" OR {value} > {latest}" if self.at_most_ahead else "")
