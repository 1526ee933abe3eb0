"""Valid and invalid records for the built-in contract."""

import hashlib
import json
import random
import struct

from pipeline.contract.judge import parse

from hypothesis import strategies as st
from pyspark.sql import functions as F

from helpers import oracle
from readings import CONTRACT

ARRIVAL = "2026-11-20T12:00:00Z"
VALID = {
    "timestamp": "2026-11-20T10:00:00Z",
    "device_id": "sensor-001",
    "building": "A",
    "floor": 2,
    "type": "temperature",
    "value": 21.5,
    "unit": "°C",
}


def reading(**fields) -> bytes:
    """A valid reading as JSON, with `fields` replacing its own. A field given as `...` is left out."""
    return json.dumps(
        {name: value for name, value in (VALID | fields).items() if value is not ...}, ensure_ascii=False
    ).encode()


def literally(field: str, text: str) -> bytes:
    """A valid reading in which `text` replaces the JSON value of a field."""
    return reading(**{field: "@@"}).replace(b'"@@"', text.encode())


V = reading()
CASES = [
    # Valid records.
    (V, None),
    (b" \t\r\n" + V + b" \r\n", None),
    (reading(floor=...), None),
    (reading(floor=None), None),
    (reading(floor=-2), None),
    (reading(firmware="1.2", more={"a": [1, {"b": None}]}), None),
    (reading(value=21), None),
    (literally("value", "2.15e1"), None),
    (literally("value", "-0.0"), None),
    (reading(value=-40), None),
    (reading(value=120), None),
    (reading(type="humidity", unit="%", value=0), None),
    (reading(type="humidity", unit="%", value=100), None),
    (reading(type="co2", unit="ppm", value=10_000), None),
    (json.dumps(VALID).encode(), None),  # "°" as an escape
    (reading(device_id="7"), None),
    (reading(device_id="true"), None),
    (reading(device_id='{"a":1}'), None),
    (reading(device_id="Gerät 🌡"), None),
    (literally("device_id", r'"\ud83d\ude00"'), None),
    (reading(building="B\\u0041\x00\n"), None),
    (reading(timestamp="2026-11-20T10:00:00.123456Z"), None),
    (reading(timestamp="2026-11-20T10:00:00.123456789Z"), None),
    (reading(timestamp="2026-11-20T15:30:00+05:30"), None),
    (reading(timestamp="2026-11-20T15:30:00+0530"), None),
    (reading(timestamp="2026-11-20T11:00:00+01"), None),
    (reading(timestamp="2026-11-21T12:00:00Z"), None),  # exactly one day ahead
    (reading(timestamp="0001-01-01T00:00:00Z"), "no_clock"),
    (reading(timestamp="1970-01-01T00:30:00Z"), "no_clock"),
    (reading(timestamp="2000-12-31T23:59:59.999999Z", type="x"), "no_clock"),
    (reading(timestamp="2001-01-01T00:00:00Z"), None),
    (b"\xef\xbb\xbf" + reading(), None),
    (b"\xef\xbb\xbf\xef\xbb\xbf" + reading(), "malformed_json"),
    (b" \xef\xbb\xbf" + reading(), "malformed_json"),
    (b"\xef\xbb\xbf", "empty_record"),
    (b"\x00\x00\x01\x86\xa0" + reading(), None),  # the schema id 100000, whose last byte is not valid UTF-8
    (b"\x00\x00\x00\x00\x0a" + reading(unknown=[1]), None),
    (b"\x00\x00\x00\x00\x01 ", "empty_record"),
    (b"\x00\x00\x00\x00\x01", "malformed_json"),
    (b"\x00\x00\x00\x00\x01" + reading(value="x"), "invalid_value"),
    (b"\x00\x00\x00\x00" + reading(), "malformed_json"),
    (b"\x00\x00\x00\x00\x01\x00\x00\x00\x00\x01" + reading(), "malformed_json"),
    (json.dumps(dict(reversed(VALID.items())), ensure_ascii=False, separators=(",", ":")).encode(), None),
    (reading(building="Ä", device_id="\u00a0 a"), None),
    # Records that could be mistaken for plain ones.
    (V[:-1] + b",}", "malformed_json"),
    (b"{," + V[1:], "malformed_json"),
    (V.replace(b", ", b" ", 1), "malformed_json"),
    (b"\x01" + b"\x01".join([b"2026-11-20T10:00:00Z", b"a", b"A", b"2", b"co2", b"1", b"ppm", b"x"]), "malformed_json"),
    (reading(floor=...)[:-1] + b', "type": "temperature"}', "malformed_json"),
    (reading(unit=...)[:-1] + b', "type": "temperature"}', "malformed_json"),
    (literally("value", "021.5"), "malformed_json"),
    (literally("floor", "02"), "malformed_json"),
    # Records that are empty, not text, or not a JSON object.
    (None, "empty_record"),
    (b"", "empty_record"),
    (b" \r\n\t", "empty_record"),
    ("\u3000\u00a0".encode(), "empty_record"),
    (b"\xff\xfe", "invalid_encoding"),
    (V[:-1] + b',"note":"\xe9"}', "invalid_encoding"),
    (b"{", "malformed_json"),
    (V[:-1], "malformed_json"),
    (V + b"x", "malformed_json"),
    (V + b"}", "malformed_json"),
    (V + V, "malformed_json"),
    (V + b"," + V, "malformed_json"),
    (V + b"\n" + V, "malformed_json"),
    (V + b',"end":"x"', "malformed_json"),
    (V + b',{"end":"x"}', "malformed_json"),
    (V + b',{"end":"x"}]', "malformed_json"),
    (V + b',{"end":"' + hashlib.sha256(V).hexdigest().encode() + b'"}]', "malformed_json"),
    (V + b"],[" + V, "malformed_json"),
    (V + b"]", "malformed_json"),
    (b"]", "malformed_json"),
    (V + b" null", "malformed_json"),
    (V + b",", "malformed_json"),
    (b"[" + V + b"]", "malformed_json"),
    (b"7", "malformed_json"),
    (b"null", "malformed_json"),
    (b'"text"', "malformed_json"),
    (V.replace(b'"', b"'"), "malformed_json"),
    (V[:-1] + b",}", "malformed_json"),
    (V[:-1] + b"/* x */}", "malformed_json"),
    (literally("value", "NaN"), "malformed_json"),
    (literally("value", "Infinity"), "malformed_json"),
    (literally("value", "021.5"), "malformed_json"),
    (literally("value", "+21.5"), "malformed_json"),
    (literally("value", ".5"), "malformed_json"),
    (literally("device_id", '"a\tb"'), "malformed_json"),  # control characters must be escaped
    (literally("device_id", r'"\ud800"'), "malformed_json"),
    (literally("device_id", r'"\ude00\ud83d"'), "malformed_json"),
    (V[:-1] + b',"note":"\\udfff"}', "malformed_json"),
    (V[:-1] + b',"note\\uD800":1}', "malformed_json"),
    (V[:-1] + b',"note":"\\\\\\ud83d\\ude00\\ude00"}', "malformed_json"),
    (V[:-1] + b',"note":"\\\\ud83d \\uD83D\\uDE00"}', None),
    (V[:-1] + b',"value":22}', "malformed_json"),
    (V[:-1] + b',"note":1,"note":1}', "malformed_json"),
    (V[:-1] + b',"more":{"a":1,"a":2}}', "malformed_json"),
    (V[:-1] + b',"more":' + b"[" * 2000 + b"]" * 2000 + b"}", "malformed_json"),
    # Missing fields, in the order of the contract.
    (b"{}", "missing_timestamp"),
    (reading(device_id=...), "missing_device_id"),
    (reading(device_id=None), "missing_device_id"),
    (reading(device_id=""), "missing_device_id"),
    (reading(device_id=" \t\u00a0\u3000"), "missing_device_id"),
    (reading(building=""), "missing_building"),
    (reading(type=None), "missing_type"),
    (reading(unit=...), "missing_unit"),
    (reading(value=...), "missing_value"),
    (reading(value=None), "missing_value"),
    (reading(value=""), "missing_value"),
    (reading(value="  "), "missing_value"),
    (reading(timestamp=...), "missing_timestamp"),
    (reading(timestamp=""), "missing_timestamp"),
    (reading(timestamp="now", value=None, device_id=7, unit=None), "missing_value"),
    # Fields of the wrong type.
    (reading(device_id=7), "invalid_device_id"),
    (reading(device_id=True), "invalid_device_id"),
    (reading(device_id=["sensor-001"]), "invalid_device_id"),
    (reading(device_id=[]), "invalid_device_id"),
    (reading(building={"name": "A"}), "invalid_building"),
    (reading(type=1.5), "invalid_type"),
    (reading(unit=False), "invalid_unit"),
    (reading(value="21.5"), "invalid_value"),
    (reading(value="NaN"), "invalid_value"),
    (reading(value="Infinity"), "invalid_value"),
    (reading(value=True), "invalid_value"),
    (reading(value=[21.5]), "invalid_value"),
    (literally("value", "1e999"), "invalid_value"),
    (literally("value", "-1e999"), "invalid_value"),
    (reading(floor=2.5), "invalid_floor"),
    (reading(floor=2.0), "invalid_floor"),
    (literally("floor", "2e0"), "invalid_floor"),
    (reading(floor="2"), "invalid_floor"),
    (reading(floor=""), "invalid_floor"),
    (reading(floor=2**31), "invalid_floor"),
    (reading(floor=[]), "invalid_floor"),
    # Timestamps.
    (reading(timestamp="2026-11-20T10:00:00"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20 10:00:00Z"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20T10:00Z"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20"), "invalid_timestamp"),
    (reading(timestamp="T10:00:00Z"), "invalid_timestamp"),
    (reading(timestamp="2026-02-30T10:00:00Z"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20T24:00:00Z"), "invalid_timestamp"),
    (reading(timestamp="2016-12-31T23:59:60Z"), "invalid_timestamp"),  # a leap second
    (reading(timestamp="2026-11-20T10:00:00 Europe/Berlin"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20T10:00:00+25:00"), "invalid_timestamp"),
    (reading(timestamp="2026-11-20T10:00:00Z\n"), "invalid_timestamp"),
    (reading(timestamp="12026-11-20T10:00:00Z"), "invalid_timestamp"),
    (reading(timestamp="now"), "invalid_timestamp"),
    (reading(timestamp=1763632800), "invalid_timestamp"),
    (reading(timestamp="1763632800"), "invalid_timestamp"),
    (reading(timestamp="2026-11-21T12:00:00.000001Z"), "invalid_timestamp"),
    (reading(timestamp="2026-11-21T13:00:00Z", type="pressure"), "invalid_timestamp"),
    # The rules for the values.
    (reading(type="pressure"), "unknown_type"),
    (reading(type="Temperature"), "unknown_type"),
    (reading(type=" temperature"), "unknown_type"),
    (reading(unit="K"), "wrong_unit"),
    (reading(unit="%"), "wrong_unit"),
    (reading(unit="°c", value=1e6), "wrong_unit"),
    (reading(value=-40.01), "out_of_range"),
    (reading(value=120.01), "out_of_range"),
    (literally("value", "9" * 400), "invalid_value"),
    (reading(value=10**30), "out_of_range"),
    (reading(type="humidity", unit="%", value=100.5), "out_of_range"),
    (reading(type="co2", unit="ppm", value=-1), "out_of_range"),
]


def judge(spark, records: list[bytes | None]) -> list:
    rows = spark.createDataFrame(list(enumerate(records)), "number INT, raw BINARY").repartition(2)
    judged = parse(rows.withColumn("ingest_time", F.lit(ARRIVAL).cast("timestamp")), CONTRACT)
    # In microseconds, because Python's datetime does not reach back to the earliest valid timestamps.
    return judged.withColumn("event_micros", F.unix_micros("event_time")).drop("event_time").orderBy("number").collect()


ARRIVAL_MICROS = oracle.micros_of(ARRIVAL)

FRAGMENTS = [
    fragment.encode("utf-8", "surrogatepass")
    for fragment in (
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "\\",
        "null",
        "true",
        "NaN",
        "Infinity",
        "-Infinity",
        "-",
        "+",
        ".",
        "e",
        "E",
        "0",
        "00",
        "1e999",
        "-1e-999",
        "9" * 400,
        "0." + "1" * 400,
        "1E+2",
        "2147483648",
        "-2147483649",
        "9007199254740993",
        "4.9e-324",
        "1.7976931348623157e308",
        "0x10",
        "1_000",
        "1763632800",
        "1763632800000",
        '"value":1',
        ',"value":2',
        ',"device_id":"x"',
        '"end":"',
        ',{"end":"x"}]',
        "/* c */",
        "//",
        "#",
        "'",
        "\x00",
        "\x01",
        "\x1b[2J",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
        "\u202e",
        "\\u0000",
        "\\u0041",
        "\\ud800",
        "\\ude00",
        "\\ud83d\\ude00",
        "\\uD83D\\u0041",
        "\\x41",
        "\\/",
        "\\",
        "\\u12",
        "\ud800",
        "é",
        "°",
        "🌡",
        "\u00a0",
        "\u3000",
        "2016-12-31T23:59:60Z",
        "2026-02-29T10:00:00Z",
        "2024-02-29T10:00:00Z",
        "2026-13-01T10:00:00Z",
        "2026-11-20T24:00:00Z",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "2026-11-20T10:00:00.9999999Z",
        "1582-10-10T00:00:00Z",
        "2026-11-20T10:00:00+18:00",
        "2026-11-20T10:00:00-18:01",
        "2026-11-20T10:00:00+05:60",
        "2026-11-20t10:00:00z",
        "２０２６-11-20T10:00:00Z",
        "[" * 50,
        "]" * 50,
        '{"a":' * 50,
        "}" * 50,
        "[" * 1100,
        "temperature",
        "°C",
        "%",
        "ppm",
        " ",
        "\t",
        "\n",
    )
]
FRAGMENTS += [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xef\xbb\xbf", b"\xfe\xff"]


def mutate(record: bytes, rng: random.Random) -> bytes:
    """The record with one to three changes to its bytes, fields or values."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, kind = rng.randrange(len(record) + 1), rng.randrange(8)
        fragment = rng.choice(FRAGMENTS)
        if kind == 0:
            record = record[:place] + fragment + record[place:]
        elif kind == 1:
            record = record[:place] + fragment + record[place + len(fragment) :]
        elif kind == 2:
            record = record[:place] + record[place + rng.randrange(1, 6) :]
        elif kind == 3:
            record = record[:place] + bytes([rng.randrange(256)]) + record[place + 1 :]
        elif kind == 4:
            record = record[:place] + record[rng.randrange(len(record) + 1) :]
        elif kind == 5:  # another value of a field
            field = rng.choice(list(VALID)).encode()
            head, name, tail = record.partition(b'"' + field + b'": ')
            value, separator, rest = tail.partition(b", ")
            quoted = rng.choice((fragment, b'"' + fragment + b'"'))
            record = head + name + (quoted if name else b"") + separator + rest
        elif kind == 6:  # a number with all its digits
            number = struct.unpack("d", rng.randbytes(8))[0]
            record = record.replace(
                b'"value": 2', b'"value": ' + repr(rng.choice((number, rng.uniform(-41, 121)))).encode(), 1
            )
        else:
            record = (
                record[:-1] + b', "' + rng.choice((b"value", b"note", b"", fragment)) + b'": ' + fragment + record[-1:]
            )
    return record


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text()
    | st.sampled_from(
        ["temperature", "humidity", "co2", "°C", "%", "ppm", "2026-11-20T10:00:00Z", "A", 21.5, 50, "50"]
    ),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
