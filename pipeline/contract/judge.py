"""Judging records by a contract: a strict method for all of them, and a fast one for plain records.

A record consists of the bytes of a message or a line (`json_sql`). It is valid if it is one JSON object (RFC 8259, UTF-8, no
duplicate names) that has each field of the contract with a value of the right kind, and no rule rejects it. Nothing is
coerced: unless the field says so, 7 is not "7", true is not 1, and 1.0 is not an integer. Fields outside the contract are
allowed, and kept as JSON. If the contract names an array, each of its elements is a reading (pipeline/contract/elements.py).
"""

import itertools
import re

from pipeline.contract.columns import ELEMENT
from pipeline.contract.contract import Contract
from pipeline.contract.elements import Read, read_elements
from pipeline.contract.fields import KEY
from pipeline.contract.plain import plain_parts
from pipeline.contract.private import attempt
from pipeline.contract.strict import (
    IS_BROKEN_KEY,
    IS_SMALL,
    KEY_TEXT,
    first_reason,
    has_rest,
    missing_key,
    slow_reading,
)
from pipeline.contract.times import Timestamp

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

# Java matches a repeated group, as in `(a|b)+`, by recursing once per repetition. Its stack (spark/session.py) holds
# four times this number. An overflow would end the JVM, again at each start.
MAX_PATTERN_TEXT = 8000  # characters


def json_sql(raw: str) -> str:
    """SQL: the JSON text of a record, from its bytes.

    It may have a prefix: a zero byte and the four bytes of a schema id, as written by Confluent's serializers
    (https://docs.confluent.io/platform/current/schema-registry/fundamentals/serdes-develop/index.html#wire-format), or the byte order
    mark of UTF-8.
    """
    has_schema_id = f"startswith({raw}, X'00') AND octet_length({raw}) > 5"
    return (
        f"CASE WHEN {has_schema_id} THEN substring({raw}, 6) WHEN startswith({raw}, X'EFBBBF') THEN substring({raw}, 4) "
        f"ELSE {raw} END::STRING"
    )


def parse(records: DataFrame, contract: Contract) -> DataFrame:
    """Reads each record according to the contract, and determines why it is rejected, if it is.

    In: `raw` (binary: the record as it arrived, or null) and `ingest_time` (timestamp), among other columns. An existing
    `reject_reason` is kept. Times must not be too far ahead of `arrival_time` (timestamp) if there is one, or else of
    `ingest_time`. Out: the same columns; the contract's columns (null without a valid value); `reject_reason` (string: the
    first of `contract.reasons` that applies, null for a valid record); `_rescued_data` (string: the fields outside the
    contract as a JSON object, or null); `_unknown_fields` (array of strings: up to 20 of their names). If the contract names an
    array, there is a row for each reading, and `read_elements` adds two columns.
    """
    others = [f"`{column}`" for column in records.columns if column != "reject_reason"]
    given = "reject_reason, " if "reject_reason" in records.columns else ""
    if "arrival_time" not in records.columns:
        records = records.withColumn("arrival_time", F.lit(None).cast("timestamp"))
    records = records.withColumn("_json", F.expr(json_sql("raw")))
    if contract.array:
        others += [*ELEMENT, "_record"]
        read = read_elements(records, contract, given)
    else:
        read = _read_records(records, contract)
    # A rule that fails on a value, for example because an interval becomes too long, does not stop the stream.
    broken = [
        F.when(attempt(records.sparkSession, _computable(condition, contract)), reason)
        for reason, condition in contract.conditions.items()
    ]
    return read.rows.select(
        *others,
        *(f"`{column}`" for column in contract.columns),
        F.coalesce(F.expr(f"coalesce({given}{read.reason})"), *broken).alias("reject_reason"),
        F.expr(read.rescued).alias("_rescued_data"),
        F.expr(read.unknown).alias("_unknown_fields"),
    )


def _read_records(records: DataFrame, contract: Contract) -> Read:
    values, invalid = {}, missing_key(contract.fields)
    numbers = itertools.count(1)
    for field in contract.fields:
        if field.name == KEY:
            values[field.column] = KEY_TEXT
            invalid[f"invalid_{KEY}"] = IS_BROKEN_KEY
            continue
        number = next(numbers)
        part = f"_parts[{number}]" if field.required else f"nullif(_parts[{number}], '')"
        values[field.column] = f"coalesce({field.value(part)}, _strict.value.f{number})"
        if isinstance(field, Timestamp):  # the only kind that can be plain but invalid
            invalid[f"invalid_{field.name}"] = f"_parts[{number}] <> '' AND ({field.is_invalid(f'`{field.column}`')})"
    # A record that is not plain is left whole. It may contain separators, but it can't begin with both "{" and a
    # separator.
    is_plain = "_parts[0] = '' AND startswith(_json, '{')"
    in_order, any_order = plain_parts(contract)
    rows = (
        records.withColumn("_parts", F.when(F.expr(IS_SMALL), in_order))
        .withColumn("_parts", F.expr(f"CASE WHEN {is_plain} THEN _parts END"))
        .withColumn("_parts", F.coalesce("_parts", F.when(F.expr(IS_SMALL), any_order)))
        .withColumn("_parts", F.expr(f"CASE WHEN {is_plain} THEN _parts END"))
        .withColumn(
            "_strict", F.expr(f"CASE WHEN _parts IS NULL OR {has_rest(contract)} THEN {slow_reading(contract)} END")
        )
        .select(
            *(f"`{column}`" for column in records.columns),
            "_parts",
            "_strict",
            *(F.expr(value).alias(column) for column, value in values.items()),
        )
    )
    return Read(rows, f"_strict.reason, {first_reason(invalid)}", "_strict.rescued", "_strict.unknown")


def _computable(condition: str, contract: Contract) -> str:
    """SQL: the condition of a rule; null if it would match a pattern against too long a string (`MAX_PATTERN_TEXT`)."""
    texts = [
        field.column
        for field in contract.fields
        if field.type == "STRING" and field.column.lower() in condition.lower()
    ]
    if not texts or not re.search(r"(?i)\b(r?like|ilike|regexp\w*|split|similar)\b", condition):
        return condition
    too_long = " OR ".join(f"length(`{column}`) > {MAX_PATTERN_TEXT}" for column in texts)
    return f"(CASE WHEN {too_long} THEN NULL ELSE {condition} END)"
