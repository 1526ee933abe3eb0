"""Reporting how a contract judges a sample."""

import json
from contextlib import suppress
from functools import reduce
from typing import Any

from pipeline.contract.contract import Contract
from pipeline.contract.fields import Elements
from pipeline.contract.judge import parse
from pipeline.readers.printing import show, show_lines
from pipeline.terminal.messages import say

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

SHOWN_ROWS = 5  # accepted records
SHOWN_CHARACTERS = 100  # of a rejected record or value


def report(records: DataFrame, contract: Contract) -> None:
    """Prints how many of the records are accepted, why the others are rejected, the fields outside the contract, and some rows."""
    judged = parse(records, contract).cache()
    found = with_examples(judged, contract, "reject_reason")
    accepted = sum(count for reason, count, _ in found if reason is None)
    total = sum(count for _, count, _ in found)
    say(
        f"{total:,} {'readings' if contract.array else 'records'}: {accepted:,} accepted, {total - accepted:,} rejected"
    )
    if rejected := [line for line in found if line[0]]:
        say("")
        show_lines(records.sparkSession, ("reject_reason", "records", "example"), rejected)
    unknown = judged.where("reject_reason IS NULL").select(F.explode("_unknown_fields").alias("name"))
    if names := [f"{row.name} ({row['count']:,})" for row in unknown.groupBy("name").count().sort("name").collect()]:
        say(f"\nFields outside the contract, kept in _rescued_data: {', '.join(names)}")
    if accepted:
        say("\nThe first accepted records:\n")
        first_rows = judged.where("reject_reason IS NULL")
        if contract.array:
            first_rows = first_rows.orderBy("_record", "element")
        show(first_rows.select(*(f"`{name}`" for name in contract.columns)).limit(SHOWN_ROWS), SHOWN_ROWS)


def with_examples(judged: DataFrame, contract: Contract, *columns: str) -> list[tuple[Any, ...]]:
    """Groups the result of `parse` by these columns, the last of which is a reject_reason. Returns for each group its values, the
    number of readings, and, if they are rejected, an example; the largest group first.
    """
    record = F.struct("_record", "element") if contract.array else F.struct("raw", F.lit(None).alias("element"))
    figures = F.count("*").alias("readings"), F.first(record).alias("first")
    groups = judged.groupBy(*columns).agg(*figures).orderBy(F.desc("readings"), *columns).collect()
    raws = {}
    if contract.array:  # only the first row of a record has all of it
        is_first = F.col("_record").isin([row.first["_record"] for row in groups]) & F.col("raw").isNotNull()
        raws = {row["_record"]: row.raw for row in judged.where(is_first).select("_record", "raw").collect()}
    found = []
    for *values, count, first in groups:
        raw = (raws.get(first["_record"]) if contract.array else first.raw) or b""
        found.append((*values, count, values[-1] and _example(values[-1], raw, first.element, contract)))
    return found


def _example(reason: str, record: bytes, element: int | None, contract: Contract) -> str:
    """Explains why the record, or this element of it, was rejected, by quoting the invalid value, the rule or the record."""
    raw = record.decode(errors="replace")
    with suppress(KeyError, TypeError, ValueError):  # not JSON, or not of the expected form
        if element is not None:
            begin, names = ("[", ()) if contract.array == "[]" else ("{", Elements(contract.array).path)
            elements = reduce(dict.__getitem__, names, json.loads(raw[raw.index(begin) :]))
            raw = json.dumps(elements[element], ensure_ascii=False)
    field = next((field for field in contract.json_fields if reason == f"invalid_{field.name}"), None)
    if field:
        try:
            value = reduce(dict.__getitem__, field.path, json.loads(raw[raw.index("{") :]))
        except (KeyError, TypeError, ValueError):  # a parent of the field is not an object
            return _cut(f"{raw}")
        return f"{_cut(json.dumps(value, ensure_ascii=False))} is not {field.expected}"
    if reason in contract.rules:
        return f"{' '.join(contract.rules[reason].split())}: {_cut(raw)}"
    return _cut(raw)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
