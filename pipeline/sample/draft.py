"""Drafting a contract from a sample of records."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.contract.columns import ELEMENT_COLUMNS, RESERVED_COLUMNS
from pipeline.contract.fields import KEY
from pipeline.contract.times import DATE_TIME, OFFSET, RFC3339
from pipeline.terminal.errors import PipelineError

MOST = 0.8  # the share of a field's values that must look alike to determine its format
MOST_NAMED = 0.5  # the same share if the field's name suggests that format, too
# Seconds since 1970 in these years may be times: 2001 to 2100.
FIRST_PLAUSIBLE, END_PLAUSIBLE = 978_307_200, 4_102_444_800
EPOCHS = {"epoch_s": 1, "epoch_ms": 10**3, "epoch_us": 10**6, "epoch_ns": 10**9}  # units per second
TIME_NAME = r"(?i:(^|_)at($|_)|time|date|seen|epoch|ts$)|[a-z]At$"
ID_NAME = r"(?i)(^|_|[a-z])(id|eui|addr|address|serial|imei|phone|key|code|version)$"
SWITCH_NAME = r"(?i)state|contact|occupan|motion|open|closed|alarm|switch|relay|leak|tamper|online|enabled|^(is|has)_"
AHEAD = ', at_most_ahead="1 day"'
SWITCHES = [("on", "off"), ("open", "closed"), ("yes", "no"), ("true", "false"), ("online", "offline"), ("high", "low")]
# Names of arrays that probably hold readings, unlike those with details about one reading.
READINGS_NAME = (
    r"(?i)(reading|measure\w*|metric|sample|value|record|event|item|point|sensor|device|batch)(s|es)?$|(^|_)data$|^e$"
)
JSON_NUMBER = r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?"
HEADER = '''"""Drafted from {source}: {used}.

Read every line, above all those with a comment. Which fields must a reading have? Which values make no sense? Is a Number an Integer,
because it never has a fraction?
"""

from pipeline.contract import {kinds}

CONTRACT = Contract(
    fields=(
'''
FOOTER = """    ),
    rules={
        # "out_of_range": "{number} NOT BETWEEN -40 AND 80",
    },
)
"""


def draft_contract(records: list[bytes], source: str, keys: Sequence[bytes | None] = ()) -> str:
    """The text of a Python file with a contract for these records, which `source` names. `keys`: those of the messages. Raises
    PipelineError if no record is a JSON object, or an array of objects.
    """
    values = [value for record in records if isinstance(value := _json_of(record), dict) or _objects_in(value)]
    if not values:
        raise PipelineError(f"{source} has no JSON object from which a contract could be drafted.")
    draft = _Draft()
    if texts := [key.decode(errors="replace") for key in keys if key is not None]:
        example = json.dumps(texts[0], ensure_ascii=False)
        draft.lines = [
            f'        # Text("{KEY}"),  # {len(texts):,} of {len(keys):,} messages have a key, such as {example}'
        ]
    if 2 * sum(isinstance(value, list) for value in values) > len(values):
        draft.add([element for value in values if isinstance(value, list) for element in _objects_in(value)], "[].")
        used = "arrays"
    else:
        draft.add([value for value in values if isinstance(value, dict)])
        used = "objects"
    used = f"{len(values):,} of {len(records):,} records are JSON {used}"
    return (
        HEADER.format(source=source, used=used, kinds=", ".join(sorted(draft.kinds)))
        + "".join(f"{line}\n" for line in draft.lines)
        + FOOTER.replace("{number}", draft.number or "value")
    )


class _Draft:
    """The `lines` of a contract's fields, and the `kinds` that they use."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.kinds, self.columns, self.number = {"Contract"}, {*RESERVED_COLUMNS, *ELEMENT_COLUMNS}, ""
        self.most_times = 0  # of the values of a Timestamp

    def add(self, objects: list[dict[str, Any]], prefix: str = "") -> None:
        """Adds the fields of `objects`, which are the records or, with a `prefix` such as "readings[].", the elements of their arrays."""
        values: dict[tuple[str, ...], list[Any]] = {}
        for json_object in objects:
            for path, value in _leaves(json_object):
                values.setdefault(path, []).append(value)
        # A value in some records and an object in others is read as whichever is more common.
        groups = {path[:depth] for path in values for depth in range(1, len(path))}
        arrays = {path: [each for value in found for each in _objects_in(value)] for path, found in values.items()}
        likely = {
            path: elements
            for path, elements in arrays.items()
            if re.search(READINGS_NAME, path[-1])
            and sum(map(bool, map(_objects_in, values[path]))) >= MOST_NAMED * len(objects)
        }
        readings = None if prefix else max(likely, key=lambda path: len(likely[path]), default=None)
        for path, found in values.items():
            name = f"{prefix}{'.'.join(path)}"
            present = [value for value in found if value is not None and value != ""]
            if path in groups:
                self.lines.append(f"        # {name}: an object in some records and a value in others")
            elif path == readings and not any("." in step or "[]" in step for step in path):
                self.lines.append(
                    f"        # {name}: each element is a reading, and becomes a row; guessed from its name"
                )
                self.add(arrays[path], f"{name}[].")
            elif arrays[path]:
                way_in = (
                    "kept in _rescued_data" if prefix else f'kept in _rescued_data; "{name}[].…" would make each a row'
                )
                self.lines.append(f"        # {name}: an array of objects; {way_in}")
            elif why := _why_not(path, present):
                self.lines.append(f"        # {name}: {why}; kept in _rescued_data")
            else:
                self._add_field(name, path, present, len(objects))

    def _add_field(self, name: str, path: tuple[str, ...], present: list[Any], objects: int) -> None:
        kind, options, comment = _kind(path[-1], present)
        self.kinds.add(kind)
        column = _column(path, self.columns)
        self.columns.add(column.lower())
        if column != "_".join(path):
            options = [f'column="{column}"', *options]
        if name in RESERVED_COLUMNS:
            comment = comment or f"the tables have a column {name} of their own"
        if len(present) < objects:
            options = [*options, "required=False"]
            if len(present) >= MOST * objects:
                comment = comment or f"{len(present):,} of {objects:,} have it"
        if kind == "Number" and not self.number:
            self.number = column
        place = len(self.lines)
        if kind == "Timestamp" and len(present) > self.most_times:
            # The first Timestamp of a contract is the time of a reading.
            place, self.most_times = 0, len(present)
            self.lines = [line.replace(AHEAD, "") for line in self.lines]
            options = [*options, AHEAD.removeprefix(", ")]
        line = f"        {kind}({', '.join([json.dumps(name, ensure_ascii=False), *options])}),"
        self.lines.insert(place, f"{line}  # {comment}" if comment else line)


def _why_not(path: tuple[str, ...], present: list[Any]) -> str:
    """Why there can be no field at `path`, whose values are `present`; "" if there can be one."""
    if not present:
        return "never has a value"
    if isinstance(present[0], list):
        return "an array"
    return "has a dot or brackets in its name" if any(not name or "." in name or "[]" in name for name in path) else ""


def _json_of(record: bytes) -> Any:
    """Parses a record, skipping a prefix (`json_sql`). Returns None if it is not JSON."""
    record = record[5:] if record[:1] == b"\0" else record
    try:
        return json.loads(record.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None


def _objects_in(value: Any) -> list[dict[str, Any]]:
    """The objects among the elements of an array."""
    return [element for element in value if isinstance(element, dict)] if isinstance(value, list) else []


def _leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, (*path, name))
        else:
            yield (*path, name), inner


def _column(path: tuple[str, ...], taken: set[str]) -> str:
    """A column for the field: the last of its names, or as many of them as tell it from the others."""
    for depth in range(1, len(path) + 1):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z]{2}|[A-Z][a-z])", "_", "_".join(path[-depth:]))
        column = re.sub(r"\W+", "_", words).strip("_").lower() or "field"
        column = f"_{column}" if column[0].isdigit() else column
        if column not in taken:
            return column
    return next(name for number in range(2, 10**6) if (name := f"{column}_{number}") not in taken)


def _kind(name: str, values: list[Any]) -> tuple[str, list[str], str]:
    """Returns the kind of field that fits most of these values, its options, and a comment on any guesses."""
    kinds = Counter(map(_json_kind, values))
    in_quotes = ""
    if kinds["number"] and kinds["numeric string"] and kinds["number"] + kinds["numeric string"] > kinds["string"]:
        in_quotes = f"{kinds['numeric string']:,} of {len(values):,} values are in quotes"
        kinds["numeric string"] += kinds.pop("number")
    [(most, count)] = kinds.most_common(1)
    values = [value for value in values if _json_kind(value) == most or in_quotes and _json_kind(value) == "number"]
    if most == "string":
        kind, options, comment = _strings(name, values)
    elif most == "boolean":
        kind, options, comment = "Boolean", [], ""
    else:
        kind, options, comment = _numbers(name, values, quoted=most == "numeric string")
        comment = in_quotes or comment
    if others := sum(kinds.values()) - count:
        comment = f"{others:,} of {sum(kinds.values()):,} values are of another kind, and would be rejected; {comment}".rstrip(
            "; "
        )
    return kind, options, comment


def _json_kind(value: Any) -> str:
    if isinstance(value, str):
        return "numeric string" if re.fullmatch(JSON_NUMBER, value) else "string"
    return {bool: "boolean", list: "array"}.get(type(value), "number")


def _numbers(name: str, values: list[Any], quoted: bool) -> tuple[str, list[str], str]:
    if quoted and re.search(ID_NAME, name) and all(isinstance(value, str) for value in values):
        return "Text", [], "digits in a string; guessed from its name"
    numbers = [json.loads(value) if isinstance(value, str) else value for value in values]
    is_whole = all(isinstance(number, int) for number in numbers)
    of_quoted = ["quoted=True"] if quoted else []
    for form, per_second in EPOCHS.items():
        times = [number for number in numbers if FIRST_PLAUSIBLE <= number / per_second < END_PLAUSIBLE]
        is_named = re.search(TIME_NAME, name)
        if len(times) >= (MOST_NAMED if is_named else MOST) * len(numbers) and (is_whole or form == "epoch_s"):
            others = len(numbers) - len(times)
            comment = f"{others:,} of {len(numbers):,} values are not plausible times" if others else ""
            return (
                "Timestamp",
                [f'format="{form}"', *of_quoted],
                comment or ("" if is_named else "guessed from its values"),
            )
    if not quoted and {*numbers} <= {0, 1} and is_whole and re.search(SWITCH_NAME, name):
        return "Boolean", ["true=(1,)", "false=(0,)"], "guessed from its name"
    if is_whole and (re.search(ID_NAME, name) or max(map(abs, numbers)) >= 2**53):
        return "Integer", of_quoted, ""
    return "Number", of_quoted, ""


def _strings(name: str, values: list[str]) -> tuple[str, list[str], str]:
    def most_are(form: str) -> bool:
        return sum(bool(re.fullmatch(form, value)) for value in values) >= MOST * len(values)

    if most_are(RFC3339):
        return "Timestamp", [], ""
    if most_are(DATE_TIME + OFFSET):
        return "Timestamp", ['format="iso8601"'], ""
    if most_are(f"{DATE_TIME}(?:{OFFSET})?"):
        return "Timestamp", ['format="iso8601"', 'zone="Etc/UTC"'], "which time zone are its clocks in?"
    for pair in SWITCHES:
        changes = [change for change in (str.lower, str.upper, str.title) if {*map(change, pair)} & {*values}]
        true, false = ([*dict.fromkeys(change(word) for change in changes)] for word in pair)
        if {*values} <= {*true, *false}:
            return "Boolean", [f"true={_tuple(true)}", f"false={_tuple(false)}"], "guessed from its values"
    return "Text", [], ""


def _tuple(words: list[str]) -> str:
    return f"({', '.join(map(json.dumps, words))}{',' * (len(words) == 1)})"
