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

from functools import reduce
from typing import NamedTuple

from pyspark.sql import Column, DataFrame
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

# A field of a plain record, as `_is_plain` says. A string does not begin with white space, so it is not blank, and ends
# below U+FFFD, as which Java sees what is not UTF-8. No quantifier gives back what it has taken: it would do so in vain.
_SPACE = r"[ \t\r\n]*+"
_FIELD = _SPACE + "(?:" + "|".join(f'"{name}"{_SPACE}:{_SPACE}{value}' for name, value in {
    "(?:device_id|building|type|unit)": r'"(?!\p{IsWhite_Space})[ !#-\[\]-\x{fffc}]++"',
    "timestamp": f'"{TIMESTAMP}"',
    "value": r"-?\d{1,15}+(?:\.\d{1,15}+)?+",
    "floor": r"-?\d{1,9}+"}.items()) + ")" + _SPACE


def _is_missing(field: str, string: str) -> str:
    return (f"coalesce(json_type.{field}, 'VOID') = 'VOID' "
            f"OR json_type.{field} = 'STRING' AND {string} RLIKE r'{BLANK}'")


def _for_its_type(condition: str) -> str:
    """SQL that holds where `condition`, filled with the SensorType of the reading's own type, holds."""
    return " OR ".join(f"reading.type = '{name}' AND {condition.format(**sensor_type._asdict())}"
                       for name, sensor_type in SENSOR_TYPES.items())


# Why a record is rejected, and when, as SQL over the columns of `_parse`; the first that holds is the reason. A plain
# record breaks none of FORM.
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
}
CONTENT = {
    # A day ahead is allowed to devices whose clock has the wrong zone.
    "invalid_timestamp": "json_type.timestamp <> 'STRING' OR event_time IS NULL "
                         "OR event_time > ingest_time + INTERVAL 1 DAY",
    "unknown_type": f"reading.type NOT IN {tuple(SENSOR_TYPES)}",
    "wrong_unit": _for_its_type("reading.unit <> '{unit}'"),
    "out_of_range": _for_its_type("reading.value NOT BETWEEN {low} AND {high}"),
}
RULES = FORM | CONTENT


def with_reject_reason(records: DataFrame) -> DataFrame:
    """Reads each record as a reading and adds `reject_reason`: the first of `RULES` that it breaks, null for a valid one.

    In: `raw` (binary: the record as it came, or null) and `ingest_time` (timestamp), among other columns; where there is
    a `reject_reason` already, it stays.
    Out: the same columns, the other columns of `READING_COLUMNS` (null where the record has no such value) and
    `reject_reason` (string).
    """
    origin = [column for column in records.columns if column != "reject_reason"]
    given = [F.col("reject_reason")] if "reject_reason" in records.columns else []
    form, content = (F.coalesce(*[F.when(F.expr(is_broken), F.lit(reason)) for reason, is_broken in rules.items()])
                     for rules in (FORM, CONTENT))
    return _parse(records).select(
        *origin,
        *[f"reading.{field}" for field in ("device_id", "building", "floor", "type", "value", "unit")],
        "event_time",
        F.coalesce(*given, F.when(~F.col("is_plain"), form), content).alias("reject_reason"))


def _parse(records: DataFrame) -> DataFrame:
    """Adds `text`, `reading`, `is_plain`, `checksum`, `json`, `fields`, `json_type` and `event_time`.

    `from_json` reads the first JSON value and ignores what follows, makes strings of numbers and objects, and takes the
    last of equal names. So a record that is not plain is read a second time, as `json`, which sees all of that:
    - It is the array [RECORD, {"end": CHECKSUM}]. Whatever follows the object in RECORD breaks the array or changes its
      number of elements, and no record can hold its own SHA-256 to forge the end.
    - `fields`, the record as a map of variants, has every name as often as it stands there, and each value with its JSON
      type. `json_type` names those: STRING, BIGINT, DECIMAL(p,s), DOUBLE, BOOLEAN, OBJECT<…>, ARRAY<…>, VOID for null;
      it is null for an absent field.
    - What a variant can't hold makes all null, such as a name twice further in.
    """
    strict = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false"}
    checksum = F.when(~F.col("is_plain"), F.sha2("raw", 256))
    framed = F.concat(F.lit("["), "text", F.lit(',{"end":"'), "checksum", F.lit('"}]'))
    json_types = [F.schema_of_variant(F.col("fields")[field]).alias(field)
                  for field in ("device_id", "building", "floor", "type", "value", "unit", "timestamp")]
    timestamp = F.col("reading.timestamp")
    iso_timestamp = F.when(F.col("is_plain") | timestamp.rlike(rf"\A{TIMESTAMP}\z"), timestamp)
    return (records
            .select("*", F.col("raw").cast("string").alias("text"))
            .select("*", F.from_json("text", "device_id STRING, building STRING, floor INT, type STRING, value DOUBLE, "
                                     "unit STRING, timestamp STRING", strict).alias("reading"))
            .select("*", _is_plain().alias("is_plain"))
            .select("*", checksum.alias("checksum"))
            .select("*", F.from_json(framed, "ARRAY<MAP<STRING, VARIANT>>", strict).alias("json"))
            .select("*", F.get("json", F.lit(0)).alias("fields"))
            .select("*", F.struct(*json_types).alias("json_type"), iso_timestamp.try_cast("timestamp").alias("event_time")))


def _is_plain() -> Column:
    """Whether `text` is an object of the fields of a reading and no others, each there once, with a value of its JSON type
    and without an escape, and nothing around it: what nearly all records are, and quick to see.

    The pattern counts the fields; as each that is needed is there, none is there twice.
    """
    needed = [F.col(f"reading.{field}").isNotNull()
              for field in ("device_id", "building", "type", "value", "unit", "timestamp")]
    six, seven = (F.col("text").rlike(rf"\A{_SPACE}\{{{_FIELD}(?:,{_FIELD}){{{others}}}\}}{_SPACE}\z") for others in (5, 6))
    is_plain = reduce(Column.__and__, needed) & F.when(F.col("reading.floor").isNull(), six).otherwise(seven)
    return F.coalesce(is_plain, F.lit(False))
