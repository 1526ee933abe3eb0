"""An independent reference in plain Python for how a record is read under a contract, and which values it has.

It shares the field types and their parameters with the code under test, but none of the code that reads records.
"""

import json
import math
import re
from datetime import date, datetime, timedelta, timezone
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from zoneinfo import ZoneInfo

from pipeline.contract.contract import Contract
from pipeline.contract.fields import Boolean, Field, Integer, Number, Text
from pipeline.contract.times import Timestamp

SENSORS = {"temperature": ("°C", -40, 120), "humidity": ("%", 0, 100), "co2": ("ppm", 0, 10_000)}
WHITE_SPACE = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
DAY = 86_400_000_000
AHEAD = {"1 day": DAY, "1 hour": 3_600_000_000, "10 minutes": 600_000_000}
FIRST_MICROS, END_MICROS = -62_167_219_200_000_000, 253_402_300_800_000_000


class Invalid(Exception):
    pass


def unique(pairs: list[tuple]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Invalid("a name twice")
    if any(len(name) > 50_000 for name, _ in pairs):
        raise Invalid("a long name")
    return dict(pairs)


def no_constant(name: str):
    raise Invalid(name)


class Whole(int):
    """A number without fraction or exponent."""


class Real(float):
    """Any other number, along with its text."""

    text: str


def real(text: str) -> Real:
    if len(text) > 1001:  # including the point or the "e"
        raise Invalid("a long number")
    number = Real(text)
    number.text = text
    return number


def depth_of(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
        deepest = max(deepest, depth)
    return deepest


def json_of(raw: bytes) -> bytes:
    """The JSON of a record, without the prefix of Confluent's serializers or a byte order mark."""
    return raw[5:] if raw[:1] == b"\0" and len(raw) > 5 else raw.removeprefix(b"\xef\xbb\xbf")


def parse(raw: bytes | None):
    if raw is None:
        raise Invalid("null")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Invalid("not UTF-8") from None
    if depth_of(text) > 990:
        raise Invalid("deeper than JSON readers go")
    try:
        reading = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=no_constant,
            parse_float=real,
            parse_int=lambda digits: Whole(digits) if len(digits) < 300 else real(digits),
        )
    except (ValueError, RecursionError):
        raise Invalid("no JSON") from None
    if re.search("[\ud800-\udfff]", json.dumps(reading, ensure_ascii=False, default=str)):
        raise Invalid("a lone surrogate")
    return reading


def micros_of(timestamp: str) -> int:
    """An RFC 3339 time in microseconds since 1970, for any year from 0 on."""
    found = re.fullmatch(
        r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]+)?"
        r"(Z|[+-][0-9]{2}(?::?[0-9]{2})?)",
        timestamp,
    )
    if not found:
        raise Invalid("timestamp")
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    zone = 0
    if found[8] != "Z":
        hours, minutes = int(found[8][1:3]), int(found[8][3:].strip(":") or 0)
        zone = (hours * 60 + minutes) * (-1 if found[8][0] == "-" else 1)
        if minutes > 59 or abs(zone) > 18 * 60:  # the largest offset of Java's ZoneOffset
            raise Invalid("zone")
    if hour > 23 or minute > 59 or second > 59:
        raise Invalid("time")
    cycles, year = divmod(year, 400)  # after 400 years, or 146,097 days, the calendar repeats
    try:
        days = date(year + 400, month, day).toordinal() + (cycles - 1) * 146_097 - date(1970, 1, 1).toordinal()
    except ValueError:
        raise Invalid("date") from None
    fraction = int((found[7] or ".")[1:7].ljust(6, "0"))
    micros = ((days * 24 + hour) * 60 + minute - zone) * 60_000_000 + second * 1_000_000 + fraction
    if not FIRST_MICROS <= micros < END_MICROS:  # in UTC
        raise Invalid("year")
    return micros


def micros_in_zone(text: str, zone: str) -> int:
    """An ISO 8601 time in microseconds since 1970; `zone` is that of a time without an offset."""
    extended = r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?"
    basic = r"(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(?:(\d\d)(?:[.,](\d+))?)?"
    offset = r"(Z|[+-]\d\d(?::?\d\d)?)?"
    found = re.fullmatch(extended + offset, text, re.ASCII) or re.fullmatch(basic + offset, text, re.ASCII)
    if not found:
        raise Invalid("timestamp")
    year, month, day, hour, minute, second, fraction, written = found.groups()
    rfc3339 = f"{year}-{month}-{day}T{hour}:{minute}:{second or '00'}.{fraction or '0'}"
    if written:
        return micros_of(rfc3339 + written)
    if not zone:
        raise Invalid("no zone")
    local = micros_of(rfc3339 + "Z")
    # The calendar repeats after 400 years, and datetime has no year 0.
    cycle = timedelta(days=146_097 if local < -(5 * 10**16) else -146_097 if local > 10**17 else 0)
    clock = datetime(1970, 1, 1) + (timedelta(microseconds=local) + cycle)
    utc = clock.replace(tzinfo=ZoneInfo(zone)).astimezone(timezone.utc)
    if utc.astimezone(ZoneInfo(zone)).replace(tzinfo=None) != clock:
        raise Invalid("skipped")
    micros = local + (utc.replace(tzinfo=None) - clock) // timedelta(microseconds=1)
    if not FIRST_MICROS <= micros < END_MICROS:
        raise Invalid("year")
    return micros


class Astray(Exception):
    """A value on the path to a field is not an object."""


def find(record: dict, path: str):
    """The value at this path, or None if the record lacks it."""
    *way, last = path.split(".")
    for name in way:
        record = record.get(name)
        if record is None:
            return None
        if not isinstance(record, dict):
            raise Astray
    return record.get(last)


def is_blank(value) -> bool:
    return isinstance(value, str) and not value.strip(WHITE_SPACE)


def read_value(field: Field, value, arrival_micros: int):
    """The value as stored in the table, with times in microseconds. Raises Invalid if it is not of the field's type."""
    if isinstance(field, Boolean) and field.true:
        for result, names in ((True, field.true), (False, field.false)):
            for name in names:
                if value == name and isinstance(value, str) == isinstance(name, str):
                    if isinstance(value, bool) == isinstance(name, bool) and not isinstance(value, Real):
                        return result
        raise Invalid(field.name)
    if getattr(field, "quoted", False) and isinstance(value, str):
        if not re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false", value) or len(value) > 1000:
            raise Invalid("not such a string")
        value = parse(b'{"value":%s}' % value.encode())["value"]
    if isinstance(field, Boolean) and isinstance(value, bool) or isinstance(field, Text) and isinstance(value, str):
        return value
    if isinstance(field, Number) and isinstance(value, (Whole, Real)) and math.isfinite(float(value)):
        return float(value) + 0.0  # turns -0.0 into 0
    if (
        isinstance(field, Integer)
        and isinstance(value, Whole)
        and -(2 ** (field.bits - 1)) <= value < 2 ** (field.bits - 1)
    ):
        return int(value)
    if isinstance(field, Timestamp):
        micros = read_time(field, value)
        if field.at_most_ahead and micros > arrival_micros + AHEAD[field.at_most_ahead]:
            raise Invalid("ahead")
        return micros
    raise Invalid(field.name)


def read_time(field: Timestamp, value) -> int:
    form = field.format
    if form == "rfc3339" and isinstance(value, str):
        return micros_of(value)
    if form == "iso8601" and isinstance(value, str):
        return micros_in_zone(value, field.zone)
    if form in ("epoch_ms", "epoch_us", "epoch_ns") and isinstance(value, Whole) and -(2**63) <= value < 2**63:
        micros = int(value) * 1000 if form == "epoch_ms" else int(value) if form == "epoch_us" else int(value) // 1000
    elif form == "epoch_s" and isinstance(value, (Whole, Real)) and math.isfinite(value):
        exact = Decimal(getattr(value, "text", int(value)))
        digits, scale = len(exact.as_tuple().digits), -exact.as_tuple().exponent
        if isinstance(value, Real) and (set(value.text) & set("eE") or digits > 38 or scale > 38):
            exact = Decimal(repr(float(value)))  # such numbers are read as doubles first
        if abs(exact) >= 10**12:
            raise Invalid("far")
        exact = exact.quantize(Decimal("1e-12"), ROUND_HALF_UP)
        micros = int((exact * 10**6).to_integral_value(ROUND_FLOOR))
        if not FIRST_MICROS <= exact * 10**6 < END_MICROS:
            raise Invalid("year")
    else:
        raise Invalid("no time")
    if not FIRST_MICROS <= micros < END_MICROS:
        raise Invalid("year")
    return micros


def leftover(record: dict, paths: list[list[str]]) -> dict:
    """Everything in the record that is not at one of the paths."""
    rest = {}
    for name, value in record.items():
        inner = [path[1:] for path in paths if path[0] == name]
        if not inner:
            rest[name] = as_rescued(value)
        elif all(inner) and isinstance(value, dict) and (of_it := leftover(value, inner)):
            rest[name] = of_it
    return rest


def as_rescued(value):
    """The value as stored in `_rescued_data`: numbers of more than 38 digits as doubles, infinite ones as strings."""
    if isinstance(value, Whole) and abs(value) >= 10**38:
        value = float(value)
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: as_rescued(inner) for name, inner in value.items()}
    return [as_rescued(inner) for inner in value] if isinstance(value, list) else value


def read(contract: Contract, raw: bytes | None, arrival_micros: int) -> tuple[str | None, dict | None, dict | None]:
    """Reads a record without applying the contract's rules. Returns the reason to reject it or None, its values by
    column, and the fields outside the contract.
    """
    reason, record = read_json(raw)
    if not reason and not isinstance(record, dict):
        reason = "malformed_json"
    if reason:
        return reason, None, None
    reason, values = read_fields(contract.fields, record, arrival_micros)
    if reason:
        return reason, None, None
    return None, values, leftover(record, [field.name.split(".") for field in contract.fields])


def read_readings(contract: Contract, raw: bytes | None, arrival_micros: int) -> list[tuple]:
    """Reads a record with an array, like `read`. Returns (position, reason, values, rest) of each element, or of the whole record,
    whose position is None.
    """
    reason, record = read_json(raw)
    if reason:
        return [(None, reason, None, None)]
    array = contract.array[:-2]
    if not array:
        record = {"": record}
    elif not isinstance(record, dict):
        return [(None, "malformed_json", None, None)]
    outside = [field for field in contract.fields if not field.name.startswith(f"{array}[].")]
    *way, last = array.split(".")
    missing, invalid, place = [], [], record
    for name in way:
        place = place.get(name) if isinstance(place, dict) else place
    elements = place.get(last) if isinstance(place, dict) else place
    if elements is None or isinstance(place, dict) and elements == []:
        missing = [f"missing_{contract.array}"]
    elif not isinstance(elements, list) or not isinstance(place, dict):
        invalid = [f"invalid_{contract.array}"]
    reason, values = read_fields(outside, record, arrival_micros)
    of_fields = [reason] if reason else []
    # All that is missing comes before all that is invalid, and the array after the fields.
    wrong = sorted([*of_fields, *missing, *invalid], key=lambda each: each.startswith("invalid"))
    if wrong:
        return [(None, wrong[0], None, None)]
    rest = leftover(record, [*(field.name.split(".") for field in outside), array.split(".")])
    inside = [(field, field.name.removeprefix(f"{array}[].")) for field in contract.fields if field not in outside]
    rows = []
    for position, element in enumerate(elements):
        of_element: dict | None = None
        if not isinstance(element, dict):
            reason = f"invalid_{contract.array}"
        else:
            reason, of_element = read_fields([field for field, _ in inside], element, arrival_micros, f"{array}[].")
        if reason:
            rows.append((position, reason, None, None))
            continue
        unknown = leftover(element, [name.split(".") for _, name in inside])
        here = ({array: unknown} if array else unknown) if unknown else {}
        rows.append((position, None, values | of_element, (rest if position == 0 else {}) | here))
    return rows


def read_json(raw: bytes | None) -> tuple[str | None, object]:
    """The reason why a record is not JSON, or None, and its JSON value."""
    raw = raw and json_of(raw)
    if raw is None or is_blank(raw.decode(errors="replace")):
        return "empty_record", None
    try:
        raw.decode()
    except UnicodeDecodeError:
        return "invalid_encoding", None
    try:
        return None, parse(raw)
    except Invalid:
        return "malformed_json", None


def read_fields(fields, record: dict, arrival_micros: int, prefix: str = "") -> tuple[str | None, dict]:
    """The first reason that comes from a field, or None, and the values by column. `prefix`: of the fields' names."""
    values, missing, invalid = {}, [], []
    for field in fields:
        try:
            value = find(record, field.name.removeprefix(prefix))
            if field.required and (value is None or is_blank(value)):
                missing.append(field.name)
            values[field.column] = None if value is None else read_value(field, value, arrival_micros)
        except (Invalid, Astray):
            invalid.append(field.name)
    if missing:
        return f"missing_{missing[0]}", values
    return (f"invalid_{invalid[0]}" if invalid else None), values


def break_rule(reading: dict) -> str | None:
    """The rule of readings.py that the values break, or None."""
    if reading["event_time"] < 978_307_200_000_000:
        return "no_clock"
    if reading["type"] not in SENSORS:
        return "unknown_type"
    unit, low, high = SENSORS[reading["type"]]
    if reading["unit"] != unit:
        return "wrong_unit"
    return None if low <= reading["value"] <= high else "out_of_range"
