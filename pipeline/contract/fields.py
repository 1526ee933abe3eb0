"""The kinds of fields in a contract: their JSON, and the SQL that turns it into the value of a column."""

import json
import re
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any

from pipeline.contract.columns import RESERVED_COLUMNS

KEY = "@key"  # the name of a field that stands for the key of a Kafka message


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

    `name`: its name in the record. A dotted path such as "device.id" reaches into nested objects. "readings[].value" reads
    a field from each element of an array, and every element is a separate reading; write "[].value" if the record itself is
    the array. `column`: its column in the table, by default the name (for an element, the part after "[].") with "_"
    instead of ".". `required`: whether a record without the field (absent, null, or a blank string) is rejected.
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
