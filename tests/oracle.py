"""What is right, in plain Python and on its own: which records are valid readings, and with which values.

It shares nothing with common/readings.py but the prose of its docstring. It says only whether a record is valid, not for
which reason it is rejected.
"""

import json
import math
import re
from datetime import date

SENSORS = {"temperature": ("°C", -40, 120), "humidity": ("%", 0, 100), "co2": ("ppm", 0, 10_000)}
WHITE_SPACE = " \t\n\r\x0b\x0c\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b)))
DAY = 86_400_000_000


class Invalid(Exception):
    pass


def unique(pairs: list[tuple]) -> dict:
    if len({name for name, _ in pairs}) < len(pairs):
        raise Invalid("a name twice")
    return dict(pairs)


def no_constant(name: str):
    raise Invalid(name)


class Integer(int):
    """A number without fraction and exponent."""


def depth_of(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(bracket, 0)
        deepest = max(deepest, depth)
    return deepest


def parse(raw: bytes | None) -> dict:
    if raw is None:
        raise Invalid("null")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Invalid("not UTF-8")
    if depth_of(text) > 990:
        raise Invalid("deeper than JSON readers go")
    try:
        reading = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_int=str_to_number)
    except (ValueError, RecursionError):
        raise Invalid("no JSON")
    if not isinstance(reading, dict):
        raise Invalid("no object")
    if re.search("[\ud800-\udfff]", json.dumps(reading, ensure_ascii=False, default=str)):
        raise Invalid("a lone surrogate")
    return reading


def str_to_number(digits: str) -> Integer | float:
    return Integer(digits) if len(digits) < 30 else float(digits)


def text_of(reading: dict, field: str) -> str:
    value = reading.get(field)
    if not isinstance(value, str) or not value.strip(WHITE_SPACE):
        raise Invalid(field)
    return value


def micros_of(timestamp: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time, at any year from 0 on."""
    found = re.fullmatch(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(\.[0-9]+)?"
                         r"(Z|[+-][0-9]{2}(?::?[0-9]{2})?)", timestamp)
    if not found:
        raise Invalid("timestamp")
    year, month, day, hour, minute, second = map(int, found.groups()[:6])
    zone = 0
    if found[8] != "Z":
        hours, minutes = int(found[8][1:3]), int(found[8][3:].strip(":") or 0)
        zone = (hours * 60 + minutes) * (-1 if found[8][0] == "-" else 1)
        if minutes > 59 or abs(zone) > 18 * 60:  # the largest offset that Java's ZoneOffset has
            raise Invalid("zone")
    if hour > 23 or minute > 59 or second > 59:
        raise Invalid("time")
    try:  # the calendar repeats every 400 years, and Python's begins with the year 1
        days = date(year + 400, month, day).toordinal() - date(2370, 1, 1).toordinal()
    except ValueError:
        raise Invalid("date")
    fraction = int((found[7] or ".")[1:7].ljust(6, "0"))
    return ((days * 24 + hour) * 60 + minute - zone) * 60_000_000 + second * 1_000_000 + fraction


def judge(raw: bytes | None, arrival_micros: int) -> tuple | None:
    """(device_id, building, floor, type, value, unit, event time in microseconds) of a valid reading; None of another."""
    try:
        reading = parse(raw)
        device_id, building, sensor_type, unit, timestamp = (
            text_of(reading, field) for field in ("device_id", "building", "type", "unit", "timestamp"))
        value, floor = reading.get("value"), reading.get("floor")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(float(value)):
            raise Invalid("value")
        if floor is not None and (not isinstance(floor, Integer) or not -2**31 <= floor < 2**31):
            raise Invalid("floor")
        micros = micros_of(timestamp)
        if micros > arrival_micros + DAY or sensor_type not in SENSORS:
            raise Invalid("timestamp or type")
        its_unit, low, high = SENSORS[sensor_type]
        if unit != its_unit or not low <= float(value) <= high:
            raise Invalid("unit or value")
        return device_id, building, floor and int(floor), sensor_type, float(value), unit, micros
    except Invalid:
        return None
