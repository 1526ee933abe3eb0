"""What a reading is and when it is valid: the one definition behind both streams, the simulator and the tests.

A record is the bytes of one message or one line. It is a valid reading if it is one JSON object (RFC 8259, UTF-8, no
name twice) with these fields and breaks none of `RULES`; other fields than these are allowed and not looked at:

    timestamp   string   RFC 3339: date, "T", time with seconds, any fraction (kept to the microsecond), "Z" or an offset
    device_id   string   not blank
    building    string   not blank
    type        string   a key of SENSOR_TYPES
    value       number   finite, within the range of its type
    unit        string   the unit of its type
    floor       integer  written without fraction or exponent, 32 bits; may be missing or null
"""

from typing import NamedTuple

from pyspark.sql import DataFrame
from pyspark.sql import functions as F


class SensorType(NamedTuple):
    unit: str
    low: float  # the sanity range in that unit, both ends inclusive
    high: float
    typical: tuple[float, float]  # where the simulator starts


SENSOR_TYPES = {
    "temperature": SensorType("°C", -40, 120, typical=(18, 26)),
    "humidity": SensorType("%", 0, 100, typical=(30, 60)),
    "co2": SensorType("ppm", 0, 10_000, typical=(400, 1200)),
}

# The columns of a valid reading in both tables; those that say where it came from follow them.
READING_COLUMNS = ("device_id STRING, building STRING, floor INT, type STRING, value DOUBLE, unit STRING, "
                   "event_time TIMESTAMP, ingest_time TIMESTAMP")

# RFC 3339, less its lower-case "t" and "z"; the short forms +01 and +0100 of ISO 8601 pass too.
TIMESTAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d(?::?\d\d)?)"
BLANK = r"\A\p{IsWhite_Space}*\z"
# SQL: whether `text`, which is JSON, has half of a surrogate pair as an escape. What stands for two characters is taken
# out first, an escaped backslash and a whole pair.
LONE_SURROGATE = (r"contains(text, r'\u') AND regexp_replace(text, r'\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..', '') "
                  r"RLIKE r'\\u[dD][89a-fA-F]'")

# A plain record, what nearly all are: an object of the fields of a reading and no others, each with a value of its JSON type
# and without an escape. A string does not begin with white space, so it is not blank, and ends below U+FFFD, as which Java
# sees what is not UTF-8. One pass of PLAIN takes out the values: the groups of FIELDS twice, the second time for a seventh
# field, which is a group too. No quantifier gives back what it has taken: it would do so in vain.
_SPACE = r"[ \t\r\n]*+"
_STRING = r'"((?!\p{IsWhite_Space})[ !#-\[\]-\x{fffc}]++)"'
FIELDS = {
    "timestamp": f'"({TIMESTAMP})"',
    "device_id": _STRING,
    "building": _STRING,
    "floor": r"(-?(?:0|[1-9]\d{0,8}+))",
    "type": _STRING,
    "value": r"(-?(?:0|[1-9]\d{0,14}+)(?:\.\d{1,15}+)?+)",
    "unit": _STRING,
}
_FIELD = _SPACE + '"(?:' + "|".join(f'{name}"{_SPACE}:{_SPACE}{value}' for name, value in FIELDS.items()) + ")" + _SPACE
PLAIN = rf"\A\{{(?:(?:(?<=\A\{{)|(?<!\A\{{),){_FIELD}){{6}}(,{_FIELD})?+\}}{_SPACE}\z"
_SEPARATOR = "\x01"  # which no JSON has outside an escape


def _is_missing(field: str, string: str) -> str:
    return (f"coalesce(json_type.{field}, 'VOID') = 'VOID' "
            f"OR json_type.{field} = 'STRING' AND {string} RLIKE r'{BLANK}'")


def _for_its_type(condition: str) -> str:
    """SQL that holds where `condition`, filled with the SensorType of the reading's own type, holds."""
    return " OR ".join(f"type = '{name}' AND {condition.format(**sensor_type._asdict())}"
                       for name, sensor_type in SENSOR_TYPES.items())


# Why a record is rejected, and when, as SQL over `raw`, `text`, `ingest_time` and the values of `_STRICT_READING`; the first
# that holds is the reason. A plain record breaks none of FORM.
FORM = {
    "empty_record": f"raw IS NULL OR text RLIKE r'{BLANK}'",
    "invalid_encoding": "NOT is_valid_utf8(text)",
    "malformed_json": "json IS NULL OR size(json) <> 2 OR coalesce(get(json, 1)['end']::STRING <> checksum, true) "
                      "OR fields IS NULL OR size(array_distinct(map_keys(fields))) < size(fields) "
                      f"OR {LONE_SURROGATE}",
    "missing_device_id": _is_missing("device_id", "reading.device_id"),
    "missing_building": _is_missing("building", "reading.building"),
    "missing_type": _is_missing("type", "reading.type"),
    "missing_unit": _is_missing("unit", "reading.unit"),
    "missing_value": _is_missing("value", "try_cast(fields['value'] AS STRING)"),
    "missing_timestamp": _is_missing("timestamp", "reading.timestamp"),
    "invalid_device_id": "json_type.device_id <> 'STRING'",
    "invalid_building": "json_type.building <> 'STRING'",
    "invalid_type": "json_type.type <> 'STRING'",
    "invalid_unit": "json_type.unit <> 'STRING'",
    "invalid_value": "reading.value IS NULL OR isnan(reading.value) OR abs(reading.value) = double('Infinity')",
    "invalid_floor": "json_type.floor <> 'VOID' AND reading.floor IS NULL",
    "invalid_timestamp": "json_type.timestamp <> 'STRING'",
}
CONTENT = {
    # A day ahead is allowed to devices whose clock has the wrong zone.
    "invalid_timestamp": "event_time IS NULL OR event_time > ingest_time + INTERVAL 1 DAY",
    "unknown_type": f"type NOT IN {tuple(SENSOR_TYPES)}",
    "wrong_unit": _for_its_type("unit <> '{unit}'"),
    "out_of_range": _for_its_type("value NOT BETWEEN {low} AND {high}"),
}
RULES = FORM | CONTENT

# How a record that is not plain is read, each value by those before it. `from_json` reads the first JSON value and ignores
# what follows, makes strings of numbers and objects, and takes the last of equal names. So it reads such a record twice, the
# second time as `json`, which sees all of that:
# - It is the array [RECORD, {"end": CHECKSUM}]. Whatever follows the object in RECORD breaks the array or changes its
#   number of elements, and no record can hold its own SHA-256 to forge the end.
# - `fields`, the record as a map of variants, has every name as often as it stands there, and each value with its JSON
#   type. `json_type` names those: STRING, BIGINT, DECIMAL(p,s), DOUBLE, BOOLEAN, OBJECT<…>, ARRAY<…>, VOID for null;
#   it is null for an absent field.
# - What a variant can't hold makes all null, such as a name twice further in.
_STRICT = "map('allowSingleQuotes', 'false', 'allowNonNumericNumbers', 'false')"
_STRICT_READING = {
    "text": "raw::STRING",
    "reading": "from_json(text, 'device_id STRING, building STRING, floor INT, type STRING, value DOUBLE, unit STRING, "
               f"timestamp STRING', {_STRICT})",
    "checksum": "sha2(raw, 256)",
    "json": f"""from_json(concat('[', text, ',{{"end":"', checksum, '"}}]'), 'ARRAY<MAP<STRING, VARIANT>>', {_STRICT})""",
    "fields": "get(json, 0)",
    "json_type": "struct(" + ", ".join(f"schema_of_variant(fields['{name}']) AS {name}" for name in FIELDS) + ")",
}
# The columns of a reading, from the `parts` of a plain record or from `strict`.
_COLUMNS = {
    "device_id": "coalesce(parts[2], strict.reading.device_id)",
    "building": "coalesce(parts[3], strict.reading.building)",
    "floor": "coalesce(try_cast(parts[4] AS INT), strict.reading.floor)",
    "type": "coalesce(parts[5], strict.reading.type)",
    "value": "coalesce(try_cast(parts[6] AS DOUBLE), strict.reading.value)",
    "unit": "coalesce(parts[7], strict.reading.unit)",
    "event_time": "try_cast(coalesce(parts[1], CASE WHEN strict.reading.timestamp "
                  rf"RLIKE r'\A{TIMESTAMP}\z' THEN strict.reading.timestamp END) AS TIMESTAMP)",
}


def with_reject_reason(records: DataFrame) -> DataFrame:
    """Reads each record as a reading and adds `reject_reason`: the first of `RULES` that it breaks, null for a valid one.

    In: `raw` (binary: the record as it came, or null) and `ingest_time` (timestamp), among other columns; where there is
    a `reject_reason` already, it stays.
    Out: the same columns, the other columns of `READING_COLUMNS` (null where the record has no such value) and
    `reject_reason` (string).
    """
    origin = [column for column in records.columns if column != "reject_reason"]
    given = "reject_reason, " if "reject_reason" in records.columns else ""
    parts = F.split(F.regexp_replace(F.col("raw").cast("string"), PLAIN, _replacement()), _SEPARATOR)
    strict = _let(_STRICT_READING, f"struct(reading, {_first(FORM)} AS broken)")
    return (records
            .withColumn("parts", parts)
            .withColumn("parts", F.expr(f"CASE WHEN {_is_plain()} THEN parts END"))
            .withColumn("strict", F.expr(f"CASE WHEN parts IS NULL THEN {strict} END"))
            .select(*records.columns, "strict.broken", *(F.expr(sql).alias(name) for name, sql in _COLUMNS.items()))
            .select(*origin, *_COLUMNS, F.expr(f"coalesce({given}broken, {_first(CONTENT)})").alias("reject_reason")))


def _replacement() -> str:
    """What PLAIN makes of a plain record: nothing, the values of FIELDS, and the seventh field, with _SEPARATOR between."""
    groups = [f"${number}${number + len(FIELDS) + 1}" for number in range(1, len(FIELDS) + 1)]
    return _SEPARATOR.join(["", *groups, f"${len(FIELDS) + 1}"])


def _is_plain() -> str:
    """SQL: whether `parts` are those of a plain record."""
    numbers = {name: number for number, name in enumerate(FIELDS, 1)}
    # What PLAIN does not match stays as it is. It may have separators, but can't begin with "{" and with one of them.
    return " AND ".join([
        f"size(parts) = {len(FIELDS) + 2} AND parts[0] = '' AND startswith(raw::STRING, '{{')",
        *(f"parts[{number}] <> ''" for name, number in numbers.items() if name != "floor"),
        # As many fields as values: none is there twice.
        f"(parts[{numbers['floor']}] = '') = (parts[{len(FIELDS) + 1}] = '')"])


def _first(rules: dict[str, str]) -> str:
    """SQL for the name of the first of the rules that holds, or null."""
    return "CASE " + " ".join(f"WHEN {is_broken} THEN '{reason}'" for reason, is_broken in rules.items()) + " END"


def _let(values: dict[str, str], body: str) -> str:
    """SQL of `body` with names for `values`, each of which is evaluated once: SQL has no other way to say that."""
    for name, value in reversed(values.items()):
        body = f"transform(array({value}), {name} -> {body})[0]"
    return body
