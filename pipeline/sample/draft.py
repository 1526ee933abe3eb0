"""Drafting a contract from a sample of records."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pipeline.contract.columns import RESERVED_COLUMNS
from pipeline.contract.fields import DATE_TIME, OFFSET, RFC3339
from pipeline.terminal.errors import PipelineError

MOST = 0.8  # the share of a field's values that must look alike to determine its format
MOST_NAMED = 0.5  # the same share if the field's name suggests that format, too
# Seconds since 1970 in these years may be times: 2001 to 2100.
FIRST_PLAUSIBLE, END_PLAUSIBLE = 978_307_200, 4_102_444_800
EPOCHS = {"epoch_s": 1, "epoch_ms": 10**3, "epoch_us": 10**6, "epoch_ns": 10**9}  # units per second
TIME_NAME = r"(?i:(^|_)at($|_)|time|date|seen|epoch|ts$)|[a-z]At$"
ID_NAME = r"(?i)(^|_|[a-z])(id|eui|addr|address|serial|imei|phone|key|code|version)$"
SWITCH_NAME = r"(?i)state|contact|occupan|motion|open|closed|alarm|switch|relay|leak|tamper|online|enabled|^(is|has)_"
SWITCHES = [("on", "off"), ("open", "closed"), ("yes", "no"), ("true", "false"), ("online", "offline"), ("high", "low")]
JSON_NUMBER = r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?"
HEADER = '''"""Drafted from {source}: {used}.

Read every line, above all those with a comment. Which fields must a reading have? Which values make no sense?
"""

from pipeline.contract import {kinds}

CONTRACT = Contract(
    fields=(
'''
FOOTER = """    ),
    rules={
        # "out_of_range": "temperature NOT BETWEEN -40 AND 80",
    },
)
"""


def draft_contract(records: list[bytes], source: str) -> str:
    """The text of a Python file with a contract for these records, which `source` names. Raises PipelineError if none is a JSON
    object.
    """
    objects = [json_object for record in records if (json_object := _object_of(record)) is not None]
    if not objects:
        raise PipelineError(f"{source} has no JSON object from which a contract could be drafted.")
    values: dict[tuple[str, ...], list[Any]] = {}
    for json_object in objects:
        for path, value in _leaves(json_object):
            values.setdefault(path, []).append(value)
    # A value in some records and an object in others is read as whichever is more common.
    groups = {path[:depth] for path in values for depth in range(1, len(path))}
    lines, kinds, columns, has_time = [], {"Contract"}, set(RESERVED_COLUMNS), False
    for path, found in values.items():
        if path in groups:
            lines.append(f"        # {'.'.join(path)}: an object in some records and a value in others")
            continue
        present = [value for value in found if value is not None and value != ""]
        if not present or isinstance(present[0], list) or any(not name or "." in name for name in path):
            why = (
                "never has a value"
                if not present
                else "an array"
                if isinstance(present[0], list)
                else "has a dot in its name"
            )
            lines.append(f"        # {'.'.join(path)}: {why}; kept in _rescued_data")
            continue
        kind, options, comment = _kind(path[-1], present)
        kinds.add(kind)
        name, column = ".".join(path), _column(path, columns)
        columns.add(column.lower())
        if column != "_".join(path):
            options = [f'column="{column}"', *options]
        if name in RESERVED_COLUMNS:
            comment = comment or f"the tables have a column {name} of their own"
        if kind == "Timestamp" and not has_time:
            options, has_time = [*options, 'at_most_ahead="1 day"'], True
        if len(present) < len(objects):
            options = [*options, "required=False"]
        line = f"        {kind}({', '.join([json.dumps(name, ensure_ascii=False), *options])}),"
        lines.append(f"{line}  # {comment}" if comment else line)
    used = f"{len(objects):,} of {len(records):,} records are JSON objects"
    return (
        HEADER.format(source=source, used=used, kinds=", ".join(sorted(kinds)))
        + "".join(f"{line}\n" for line in lines)
        + FOOTER
    )


def _object_of(record: bytes) -> dict[str, Any] | None:
    """Parses a record as a JSON object, skipping a prefix (`json_sql`). Returns None for anything else."""
    record = record[5:] if record[:1] == b"\0" else record
    try:
        value = json.loads(record.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, (*path, name))
        else:
            yield (*path, name), inner


def _column(path: tuple[str, ...], taken: set[str]) -> str:
    """A column for the field: the last of its names, or as many of them as tell it from the others."""
    for depth in range(1, len(path) + 1):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", "_".join(path[-depth:]))
        column = re.sub(r"\W+", "_", words).strip("_").lower() or "field"
        column = f"_{column}" if column[0].isdigit() else column
        if column not in taken:
            return column
    return next(name for number in range(2, 10**6) if (name := f"{column}_{number}") not in taken)


def _kind(name: str, values: list[Any]) -> tuple[str, list[str], str]:
    """Returns the kind of field that fits most of these values, its options, and a comment on any guesses."""
    kinds = Counter(map(_json_kind, values))
    if (kinds["number"] and kinds["numeric string"]) and not kinds["string"]:
        return *_numbers(name, values, quoted=True)[
            :2
        ], f"{kinds['numeric string']:,} of {len(values):,} values are in quotes"
    [(most, count)] = kinds.most_common(1)
    values = [value for value in values if _json_kind(value) == most]
    if most == "string":
        kind, options, comment = _strings(name, values)
    elif most == "boolean":
        kind, options, comment = "Boolean", [], ""
    else:
        kind, options, comment = _numbers(name, values, quoted=most == "numeric string")
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
    return "Number", of_quoted, "whole numbers; Integer if none ever has a fraction" if is_whole else ""


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
        found = {*values}
        for change in (str.lower, str.upper, str.title):
            true, false = map(change, pair)
            if found <= {true, false}:
                return "Boolean", [f'true=("{true}",)', f'false=("{false}",)'], "guessed from its values"
    return "Text", [], ""
