"""Judging records by a contract: a strict method for all of them, and a fast one for plain records.

A record consists of the bytes of a message or a line (`json_sql`). It is valid if it is one JSON object (RFC 8259, UTF-8, no
duplicate names) that has each field of the contract with a value of the right kind, and no rule rejects it. Nothing is
coerced: unless the field says so, 7 is not "7", true is not 1, and 1.0 is not an integer. Fields outside the contract are
allowed, and kept as JSON.
"""

import itertools
import re

from pipeline.contract.contract import Contract
from pipeline.contract.fields import KEY, Field, Timestamp, Unquoted, sql_text
from pipeline.contract.plain import plain_parts
from pipeline.contract.private import attempt

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

# Large records are first read as a single variant, which is null if a name occurs twice at any depth. A map would hold
# every repetition of a name and fill memory, and to find duplicates, Spark compares each name with all others that have
# the same hash.
IS_SMALL = "octet_length(_json) < 10000"
MAX_NAMED_FIELDS = 20  # names of a record's unknown fields that are reported; it may have a million
BLANK = r"\A\p{IsWhite_Space}*\z"
# SQL: whether `text`, which is JSON, contains half of a surrogate pair as an escape. Escaped backslashes and whole
# pairs are removed first.
LONE_SURROGATE = (
    r"contains(text, r'\u') AND regexp_replace(text, r'\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..', '') "
    r"RLIKE r'\\u[dD][89a-fA-F]'"
)

# Java matches a repeated group, as in `(a|b)+`, by recursing once per repetition. Its stack (spark/session.py) holds
# four times this number. An overflow would end the JVM, again at each start.
MAX_PATTERN_TEXT = 8000  # characters

IS_BROKEN_KEY = "coalesce(NOT is_valid_utf8(kafka_key::STRING), false)"
NOTHING = "CAST(map() AS MAP<STRING, VARIANT>)"
# Strings whose content is a number or a Boolean in JSON; numbers of more than 1,000 characters are malformed there.
QUOTED = r"\A(?=.{1,1000}\z)(?:-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+|true|false)\z"


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
    contract as a JSON object, or null); `_unknown_fields` (array of strings: up to MAX_NAMED_FIELDS of their names).
    """
    others = [f"`{column}`" for column in records.columns if column != "reject_reason"]
    given = "reject_reason, " if "reject_reason" in records.columns else ""
    if "arrival_time" not in records.columns:
        records = records.withColumn("arrival_time", F.lit(None).cast("timestamp"))
    values, invalid = {}, _missing_key(contract)
    numbers = itertools.count(1)
    for field in contract.fields:
        if field.name == KEY:
            values[field.column] = F.expr(f"CASE WHEN NOT {IS_BROKEN_KEY} THEN kafka_key::STRING END").alias(
                field.column
            )
            invalid[f"invalid_{KEY}"] = IS_BROKEN_KEY
            continue
        number = next(numbers)
        part = f"_parts[{number}]" if field.required else f"nullif(_parts[{number}], '')"
        values[field.column] = F.expr(f"coalesce({field.value(part)}, _strict.value.f{number})").alias(field.column)
        if isinstance(field, Timestamp):  # the only kind that can be plain but invalid
            invalid[f"invalid_{field.name}"] = f"_parts[{number}] <> '' AND ({field.is_invalid(f'`{field.column}`')})"
    # A rule that fails on a value, for example because an interval becomes too long, does not stop the stream.
    broken = [
        F.when(attempt(records.sparkSession, _computable(condition, contract)), reason)
        for reason, condition in contract.conditions.items()
    ]
    reason = F.coalesce(F.expr(f"coalesce({given}_strict.reason, {_first(invalid)})"), *broken)
    # A record that is not plain is left whole. It may contain separators, but it can't begin with both "{" and a
    # separator.
    is_plain = "_parts[0] = '' AND startswith(_json, '{')"
    in_order, any_order = plain_parts(contract)
    return (
        records.withColumn("_json", F.expr(json_sql("raw")))
        .withColumn("_parts", F.when(F.expr(IS_SMALL), in_order))
        .withColumn("_parts", F.expr(f"CASE WHEN {is_plain} THEN _parts END"))
        .withColumn("_parts", F.coalesce("_parts", F.when(F.expr(IS_SMALL), any_order)))
        .withColumn("_parts", F.expr(f"CASE WHEN {is_plain} THEN _parts END"))
        .withColumn(
            "_strict", F.expr(f"CASE WHEN _parts IS NULL OR {_has_rest(contract)} THEN {_slow_reading(contract)} END")
        )
        .select(*(f"`{column}`" for column in records.columns), "_parts", "_strict", *values.values())
        .select(
            *others,
            *(f"`{column}`" for column in values),
            reason.alias("reject_reason"),
            F.col("_strict.rescued").alias("_rescued_data"),
            F.col("_strict.unknown").alias("_unknown_fields"),
        )
    )


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


def _has_rest(contract: Contract) -> str:
    """SQL: whether a plain record has unknown fields."""
    return f"get(_parts, {len(contract.json_fields) + 1}) <> ''"


def _slow_reading(contract: Contract) -> str:
    """SQL: the result of `_strict_reading`; for a plain record, whose values are known, only its unknown fields."""
    names = ", ".join(sql_text(field.name) for field in contract.json_fields)
    rest = f"map_filter(from_json(_json, 'MAP<STRING, VARIANT>'), (name, _) -> name NOT IN ({names}))"
    types = ", ".join(f"f{number}: {field.type}" for number, field in enumerate(contract.json_fields, 1))
    return _let(
        {"rest": f"CASE WHEN {_has_rest(contract)} AND {IS_SMALL} THEN {rest} END"},
        f"CASE WHEN NOT {_has_repeated_name('rest')} THEN struct(CAST(NULL AS STRUCT<{types}>) AS value, CAST(NULL AS STRING) AS reason, "
        f"to_json(rest) AS rescued, slice(map_keys(rest), 1, {MAX_NAMED_FIELDS}) AS unknown) ELSE {_strict_reading(contract)} END",
    )


def _has_repeated_name(fields: str) -> str:
    """SQL: whether a map contains a name twice."""
    return f"size(array_distinct(map_keys({fields}))) < size({fields})"


# All other records are read by `from_json`, which reads the first JSON value, ignores anything after it, and takes the
# last field if several have the same name. It therefore gets the record in a form that reveals all of this:
# - The record is in the array [RECORD, {"end": CHECKSUM}]. Anything after the object in RECORD breaks the array or
#   changes its number of elements, and no record can contain its own SHA-256 to forge the end.
# - RECORD, as a map of variants, contains each name as often as it occurs, and each value with its JSON type: STRING,
#   BIGINT, DECIMAL(p,s), DOUBLE, BOOLEAN, OBJECT<…>, ARRAY<…>, or VOID for null.
# - Anything that a variant can't hold, such as a name that occurs twice at a deeper level, makes the whole result null.


def _strict_reading(contract: Contract) -> str:
    """SQL: the content of a record as a struct of `value` (f1, f2, … in the fields' order), `reason`, `rescued`, `unknown`.

    Spark analyses each level of `_let` again for each batch, so the number of levels is kept small.
    """
    # SQL of each object that contains fields of the contract, by its path: a map of variants.
    objects: dict[tuple[str, ...], str] = {(): "get(json, 0)"}
    levels = {
        "json": f"CASE WHEN {IS_SMALL} OR try_parse_json(_json) IS NOT NULL THEN "
        "from_json(concat('[', _json, ',{\"end\":\"', sha2(_json, 256), '\"}]'), "
        "'ARRAY<MAP<STRING, VARIANT>>', map('allowSingleQuotes', 'false', 'allowNonNumericNumbers', 'false')) END"
    }
    for depth in range(1, max(len(field.path) for field in contract.json_fields)):
        paths = list(dict.fromkeys(field.path[:depth] for field in contract.json_fields if len(field.path) > depth))
        levels[f"depth{depth}"] = _struct(
            f=[f"try_variant_get({_in(objects, path)}, '$', 'MAP<STRING, VARIANT>')" for path in paths]
        )
        objects |= {path: f"depth{depth}.f{number}" for number, path in enumerate(paths, 1)}
    found = [_unquoted(field, _in(objects, field.path)) for field in contract.json_fields]
    rests = {path: f"seen.rest{number}" for number, path in enumerate(objects, 1)}
    # `text` is null for a field that is null or absent.
    levels["seen"] = _struct(
        text=[f"try_variant_get({variant}, '$', 'STRING')" for variant in found],
        rest=[_unnamed(objects, contract, path) for path in objects],
        twice=[f"{IS_SMALL} AND {_has_repeated_name('get(json, 0)')}"],
    )
    levels["value"] = _struct(
        f=[
            f"CASE WHEN {_has_type(field, variant, text)} THEN {field.value(_marked(field, variant, text))} END"
            for field, variant, text in zip(contract.json_fields, found, map("seen.text{}".format, itertools.count(1)))
        ]
    )
    names = ", ".join(
        f"transform(slice(coalesce(map_keys({rest}), array()), 1, {MAX_NAMED_FIELDS}), "
        f"name -> concat({sql_text(''.join(f'{step}.' for step in path))}, name))"
        for path, rest in rests.items()
    )
    return _let(
        levels,
        f"struct(value, {_first(_form(contract, objects))} AS reason, "
        f"CASE WHEN NOT seen.twice1 THEN nullif(to_json({_rest_of(rests, ())}), '{{}}') END AS rescued, "
        f"slice(concat({names}), 1, {MAX_NAMED_FIELDS}) AS unknown)",
    )


def _has_type(field: Field, variant: str, text: str) -> str:
    """SQL: whether a value, given as a variant and as `text`, has the JSON type of the field."""
    if field.json_types == ("STRING",):
        return _is_string(variant)
    # schema_of_variant takes quadratic time for an array of objects, so it is not called for arrays and objects.
    is_other = (
        f"left({text}, 1) NOT IN ('{{', '[') AND "
        f"substring_index(schema_of_variant({variant}), '(', 1) IN ({', '.join(map(sql_text, field.json_types))})"
    )
    return f"({_is_string(variant)} OR {is_other})" if "STRING" in field.json_types else is_other


def _is_string(variant: str) -> str:
    return f"try_variant_get({variant}, '$', 'BINARY') IS NOT NULL"  # nothing else can be read as BINARY


def _unquoted(field: Field, variant: str) -> str:
    """SQL: the variant of a field, without the quotes that the field allows."""
    if not (isinstance(field, Unquoted) and field.quoted):
        return variant
    text = f"try_variant_get({variant}, '$', 'STRING')"
    return (
        f"CASE WHEN {_is_string(variant)} AND {text} RLIKE r'{QUOTED}' THEN try_parse_json({text}) ELSE {variant} END"
    )


def _marked(field: Field, variant: str, text: str) -> str:
    """SQL: the text that `field.value` takes."""
    return f"concat(CASE WHEN {_is_string(variant)} THEN '\"' ELSE '' END, {text})" if field.marks_strings else text


def _form(contract: Contract, objects: dict[tuple[str, ...], str]) -> dict[str, str]:
    """SQL for each reason except the rules, in the order of `contract.reasons`."""
    form = {
        "empty_record": f"_json IS NULL OR _json RLIKE r'{BLANK}'",
        "invalid_encoding": "NOT is_valid_utf8(_json)",
        "malformed_json": "json IS NULL OR size(json) <> 2 OR coalesce(get(json, 1)['end']::STRING <> sha2(_json, 256), true) "
        f"OR get(json, 0) IS NULL OR seen.twice1 OR {LONE_SURROGATE.replace('text', '_json')}",
    }
    missing: dict[str, str] = {}
    invalid: dict[str, str] = {}
    numbers = itertools.count(1)
    for field in contract.fields:
        if field.name == KEY:
            missing |= _missing_key(contract)
            invalid[f"invalid_{KEY}"] = IS_BROKEN_KEY
            continue
        number = next(numbers)
        # The field's parent exists, but is not an object.
        astray = "".join(
            f" OR {objects[path]} IS NULL AND try_variant_get({_in(objects, path)}, '$', 'STRING') IS NOT NULL"
            for path in (field.path[:depth] for depth in range(1, len(field.path)))
        )
        if field.required:
            missing[f"missing_{field.name}"] = (
                f"(seen.text{number} IS NULL OR seen.text{number} RLIKE r'{BLANK}') AND NOT (false{astray})"
            )
        invalid[f"invalid_{field.name}"] = (
            f"seen.text{number} IS NOT NULL AND ({field.is_invalid(f'value.f{number}')}){astray}"
        )
    return form | missing | invalid


def _missing_key(contract: Contract) -> dict[str, str]:
    """SQL for the reason that a record lacks the message key that the contract requires; {} if it requires none."""
    is_required = any(field.name == KEY and field.required for field in contract.fields)
    return {f"missing_{KEY}": f"kafka_key IS NULL OR kafka_key::STRING RLIKE r'{BLANK}'"} if is_required else {}


def _unnamed(objects: dict[tuple[str, ...], str], contract: Contract, path: tuple[str, ...]) -> str:
    """SQL: the fields of an object that are outside the contract, as a map."""
    named = {field.path[len(path)] for field in contract.json_fields if field.path[: len(path)] == path}
    return f"map_filter({objects[path]}, (name, _) -> name NOT IN ({', '.join(map(sql_text, sorted(named)))}))"


def _rest_of(rests: dict[tuple[str, ...], str], path: tuple[str, ...]) -> str:
    """SQL: the fields of an object and its nested objects that are outside the contract, as a map."""
    parts = [f"coalesce({rests[path]}, {NOTHING})"]
    for inner in rests:
        if inner and inner[:-1] == path:
            rest = _rest_of(rests, inner)
            parts.append(
                f"CASE WHEN size({rest}) > 0 THEN map({sql_text(inner[-1])}, to_variant_object({rest})) ELSE {NOTHING} END"
            )
    return f"map_concat({', '.join(parts)})" if len(parts) > 1 else parts[0]


def _in(objects: dict[tuple[str, ...], str], path: tuple[str, ...]) -> str:
    """SQL: the value at `path`, as a variant."""
    return f"{objects[path[:-1]]}[{sql_text(path[-1])}]"


def _struct(**values: list[str]) -> str:
    """SQL for a struct: the values of each name, numbered from 1."""
    return (
        "struct("
        + ", ".join(
            f"{value} AS {name}{number}" for name, several in values.items() for number, value in enumerate(several, 1)
        )
        + ")"
    )


def _first(reasons: dict[str, str]) -> str:
    """SQL: the name of the first reason that applies, or null."""
    return (
        "CASE " + " ".join(f"WHEN {holds} THEN {sql_text(reason)}" for reason, holds in reasons.items()) + " END"
        if reasons
        else "NULL"
    )


def _let(values: dict[str, str], body: str) -> str:
    """SQL for `body` with names for `values`, so that each value is evaluated once. SQL has no other way to express this."""
    for name, value in reversed(values.items()):
        body = f"transform(array({value}), {name} -> {body})[0]"
    return body
