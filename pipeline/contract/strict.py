"""The strict method: SQL that reads a JSON object field by field and finds anything that is wrong with it.

`from_json` reads the first JSON value, ignores anything after it, and takes the last field if several have the same name. It
therefore gets the record in a form that reveals all of this:

- The record is in the array [RECORD, {"end": CHECKSUM}]. Anything after the object in RECORD breaks the array or changes its
  number of elements, and no record can contain its own SHA-256 to forge the end.
- RECORD, as a map of variants, contains each name as often as it occurs, and each value with its JSON type: STRING, BIGINT,
  DECIMAL(p,s), DOUBLE, BOOLEAN, OBJECT<…>, ARRAY<…>, or VOID for null.
- Anything that a variant can't hold, such as a name that occurs twice at a deeper level, makes the whole result null.
"""

import itertools

from pipeline.contract.contract import OVERSIZED, Contract
from pipeline.contract.fields import KEY, Elements, Field, Unquoted, json_text, sql_text

from pyspark.sql import Column
from pyspark.sql import functions as F

# A large record is read as a single variant, which is null if a name occurs twice at any depth. Reading it into a map would hold every
# repetition of a name and fill memory, and to find duplicates, Spark compares each name with all others that have the same hash.
IS_SMALL = "octet_length(_json) < 10000"
MAX_ELEMENTS = 400_000  # of an array of readings
MAX_NAMED_FIELDS = 20  # names of a record's unknown fields that are reported; it may have a million
BLANK = r"\A\p{IsWhite_Space}*\z"
# SQL: whether `text`, which is JSON, contains half of a surrogate pair as an escape. Escaped backslashes and whole
# pairs are removed first.
LONE_SURROGATE = (
    r"contains(text, r'\u') AND regexp_replace(text, r'\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..', '') "
    r"RLIKE r'\\u[dD][89a-fA-F]'"
)

IS_BROKEN_KEY = "coalesce(NOT is_valid_utf8(kafka_key::STRING), false)"
KEY_TEXT = f"CASE WHEN NOT {IS_BROKEN_KEY} THEN kafka_key::STRING END"
# Strings whose content is a number or a Boolean in JSON; numbers of more than 1,000 characters are malformed there.
QUOTED = r"\A(?=.{1,1000}\z)(?:-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+|true|false)\z"


def has_rest(contract: Contract) -> str:
    """SQL: whether a plain record has unknown fields."""
    return f"get(_parts, {len(contract.json_fields) + 1}) <> ''"


def slow_reading(contract: Contract) -> str:
    """SQL: the result of `record_reading`; for a plain record, whose values are known, only its unknown fields."""
    names = ", ".join(sql_text(field.name) for field in contract.json_fields)
    rest = f"map_filter(from_json(_json, 'MAP<STRING, VARIANT>'), (name, _) -> name NOT IN ({names}))"
    types = ", ".join(f"f{number}: {field.type}" for number, field in enumerate(contract.json_fields, 1))
    return _let(
        {"rest": f"CASE WHEN {has_rest(contract)} AND {IS_SMALL} THEN {rest} END"},
        f"CASE WHEN NOT {_has_repeated_name('rest')} THEN struct(CAST(NULL AS STRUCT<{types}>) AS value, CAST(NULL AS STRING) AS reason, "
        f"to_json(rest) AS rescued, slice(map_keys(rest), 1, {MAX_NAMED_FIELDS}) AS unknown) ELSE {record_reading(contract)} END",
    )


def _has_repeated_name(fields: str) -> str:
    """SQL: whether a map contains a name twice."""
    return f"size(array_distinct(map_keys({fields}))) < size({fields})"


def record_reading(contract: Contract) -> str:
    """SQL: the content of a record as a struct of `value` (f1, f2, … in the order of the fields read from it), `reason`, `rescued`,
    `unknown`.
    """
    # A record that is an array becomes the only field of an object.
    text, is_other = (
        ("concat('{\"[]\":', _json, '}')", " OR size(get(json, 0)) <> 1") if contract.array == "[]" else ("_json", "")
    )
    frame = f"concat('[', {text}, ',{{\"end\":\"', sha2(_json, 256), '\"}}]')"
    options = "map('allowSingleQuotes', 'false', 'allowNonNumericNumbers', 'false')"
    json = (
        f"CASE WHEN {IS_SMALL} THEN from_json({frame}, 'ARRAY<MAP<STRING, VARIANT>>', {options}) "
        f"ELSE try_variant_get(try_parse_json({frame}), '$', 'ARRAY<MAP<STRING, VARIANT>>') END"
    )
    form = {
        "empty_record": f"_json IS NULL OR _json RLIKE r'{BLANK}'",
        "invalid_encoding": "NOT is_valid_utf8(_json)",
        "malformed_json": "json IS NULL OR size(json) <> 2 OR coalesce(get(json, 1)['end']::STRING <> sha2(_json, 256), true) "
        f"OR get(json, 0) IS NULL OR seen.twice1 OR {LONE_SURROGATE.replace('text', '_json')}{is_other}",
    }
    twice = f"{IS_SMALL} AND {_has_repeated_name('get(json, 0)')}"
    return _object_reading(contract.record_fields, {"json": json}, "get(json, 0)", form, twice)


def element_reading(contract: Contract) -> str:
    """SQL: like `record_reading`, for the variant `_element` of a record whose JSON has been found to be valid."""
    json = "try_variant_get(_element, '$', 'MAP<STRING, VARIANT>')"
    form = {f"invalid_{contract.array}": "json IS NULL"}
    return _object_reading(contract.element_fields, {"json": json}, "json", form, "false")


def _object_reading(
    fields: tuple[Field, ...], levels: dict[str, str], root: str, form: dict[str, str], twice: str
) -> str:
    """SQL: see `record_reading`. `root`: the object as a map, given the values named by `levels`. `form`: reasons that come first, as
    in `first_reason`. `twice`: whether the object has a name twice.

    Spark analyses each level of `_let` again for each batch, so the number of levels is kept small.
    """
    read = [field for field in fields if field.name != KEY]
    # SQL of each object that contains fields, by its path: a map of variants.
    objects: dict[tuple[str, ...], str] = {(): root}
    for depth in range(1, max(len(field.path) for field in read)):
        paths = list(dict.fromkeys(field.path[:depth] for field in read if len(field.path) > depth))
        levels[f"depth{depth}"] = _struct(
            f=[f"try_variant_get({_in(objects, path)}, '$', 'MAP<STRING, VARIANT>')" for path in paths]
        )
        objects |= {path: f"depth{depth}.f{number}" for number, path in enumerate(paths, 1)}
    found = [_unquoted(field, _in(objects, field.path)) for field in read]
    rests = {path: f"seen.rest{number}" for number, path in enumerate(objects, 1)}
    # `text` is null for a field that is null or absent.
    levels["seen"] = _struct(
        text=[_text(field, variant) for field, variant in zip(read, found)],
        rest=[_unnamed(objects, read, path) for path in objects],
        twice=[twice],
    )
    levels["value"] = _struct(
        f=[
            f"CASE WHEN {_has_type(field, variant, text)} THEN {field.value(_marked(field, variant, text))} END"
            for field, variant, text in zip(read, found, map("seen.text{}".format, itertools.count(1)))
        ]
    )
    jsons = {path: f"outside.json{number}" for number, path in enumerate(objects, 1)}
    levels["outside"] = _struct(
        json=[f"CASE WHEN NOT seen.twice1 AND size({rest}) > 0 THEN to_json({rest}) END" for rest in rests.values()]
    )
    names = ", ".join(
        f"CASE WHEN {jsons[path]} IS NOT NULL THEN transform(slice(map_keys({rest}), 1, {MAX_NAMED_FIELDS}), "
        f"name -> concat({sql_text(''.join(f'{step}.' for step in path))}, name)) ELSE array() END"
        for path, rest in rests.items()
    )
    return _let(
        levels,
        f"struct(value, {first_reason(form | _wrong_fields(fields, objects))} AS reason, "
        f"{_rest_of(jsons, ())} AS rescued, "
        f"slice(concat({names}), 1, {MAX_NAMED_FIELDS}) AS unknown)",
    )


def _text(field: Field, variant: str) -> str:
    """SQL: the text of a variant; only the beginning of the array whose elements are read elsewhere."""
    text = f"try_variant_get({variant}, '$', 'STRING')"
    return (
        f"CASE WHEN {_is_string(variant)} THEN '\"' ELSE left({text}, 2) END" if isinstance(field, Elements) else text
    )


def _has_type(field: Field, variant: str, text: str) -> str:
    """SQL: whether a value, given as a variant and as `text`, has the JSON type of the field."""
    if field.json_types == ("STRING",):
        return _is_string(variant)
    if isinstance(field, Elements):
        return f"left({text}, 1) = '['"
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


def _wrong_fields(fields: tuple[Field, ...], objects: dict[tuple[str, ...], str]) -> dict[str, str]:
    """SQL for each reason that comes from a field, in the order of `contract.reasons`."""
    missing: dict[str, str] = {}
    invalid: dict[str, str] = {}
    oversized: dict[str, str] = {}
    numbers = itertools.count(1)
    for field in fields:
        if field.name == KEY:
            missing |= missing_key(fields)
            invalid[f"invalid_{KEY}"] = IS_BROKEN_KEY
            continue
        number = next(numbers)
        # The field's parent exists, but is not an object.
        astray = "".join(
            f" OR {objects[path]} IS NULL AND try_variant_get({_in(objects, path)}, '$', 'STRING') IS NOT NULL"
            for path in (field.path[:depth] for depth in range(1, len(field.path)))
        )
        if field.required:
            is_empty = "= '[]'" if isinstance(field, Elements) else f"RLIKE r'{BLANK}'"
            missing[f"missing_{field.name}"] = (
                f"(seen.text{number} IS NULL OR seen.text{number} {is_empty}) AND NOT (false{astray})"
            )
        invalid[f"invalid_{field.name}"] = (
            f"seen.text{number} IS NOT NULL AND ({field.is_invalid(f'value.f{number}')}){astray}"
        )
        if isinstance(field, Elements):  # millions of them would fill memory
            oversized[OVERSIZED] = (
                f"try_variant_get({_in(objects, field.path)}, '$[{MAX_ELEMENTS}]', 'VARIANT') IS NOT NULL"
            )
    return missing | invalid | oversized


def values_of(fields: tuple[Field, ...], reading: str) -> list[Column]:
    """The columns of the fields, from `_object_reading`'s result in the column `reading`."""
    numbers = itertools.count(1)
    return [
        F.expr(KEY_TEXT if field.name == KEY else f"{reading}.value.f{next(numbers)}").alias(field.column)
        for field in fields
        if not isinstance(field, Elements)
    ]


def missing_key(fields: tuple[Field, ...]) -> dict[str, str]:
    """SQL for the reason that a record lacks the message key that the contract requires; {} if it requires none."""
    is_required = any(field.name == KEY and field.required for field in fields)
    return {f"missing_{KEY}": f"kafka_key IS NULL OR kafka_key::STRING RLIKE r'{BLANK}'"} if is_required else {}


def _unnamed(objects: dict[tuple[str, ...], str], fields: list[Field], path: tuple[str, ...]) -> str:
    """SQL: the fields of an object that are outside the contract, as a map."""
    named = {field.path[len(path)] for field in fields if field.path[: len(path)] == path}
    return f"map_filter({objects[path]}, (name, _) -> name NOT IN ({', '.join(map(sql_text, sorted(named)))}))"


def _rest_of(jsons: dict[tuple[str, ...], str], path: tuple[str, ...]) -> str:
    """SQL: the fields of an object and its nested objects that are outside the contract, as JSON; null if there are none. `jsons`: those
    of each object itself, or null, by its path.
    """
    parts = [f"substring({jsons[path]}, 2, length({jsons[path]}) - 2)"]
    parts += [
        f"concat({sql_text(json_text(inner[-1]) + ':')}, {_rest_of(jsons, inner)})"
        for inner in jsons
        if inner and inner[:-1] == path
    ]
    below = ", ".join(json for inner, json in jsons.items() if inner[: len(path)] == path)
    return f"CASE WHEN coalesce({below}) IS NOT NULL THEN concat('{{', concat_ws(',', {', '.join(parts)}), '}}') END"


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


def first_reason(reasons: dict[str, str]) -> str:
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
