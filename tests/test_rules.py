"""The contract of readings.py as a table of records and the reason that each is rejected for (None: it is valid)."""

import hashlib
import json
from datetime import datetime, timezone

from pipeline.contract.judge import parse
from pipeline.simulator import Simulator

import pytest
from pyspark.sql import functions as F

from readings import CONTRACT, SENSOR_TYPES

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
    """A valid reading as JSON, with `fields` instead of its own; a field that is `...` is left out."""
    return json.dumps(
        {name: value for name, value in (VALID | fields).items() if value is not ...}, ensure_ascii=False
    ).encode()


def literally(field: str, text: str) -> bytes:
    """A valid reading with `text` in the place of the field's JSON value."""
    return reading(**{field: "@@"}).replace(b'"@@"', text.encode())


V = reading()
CASES = [
    # valid ones
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
    (reading(timestamp="2026-11-21T12:00:00Z"), None),  # a day ahead, not more
    (reading(timestamp="0001-01-01T00:00:00Z"), None),
    (json.dumps(dict(reversed(VALID.items())), ensure_ascii=False, separators=(",", ":")).encode(), None),
    (reading(building="Ä", device_id="\u00a0 a"), None),
    # what could pass for plain
    (V[:-1] + b",}", "malformed_json"),
    (b"{," + V[1:], "malformed_json"),
    (V.replace(b", ", b" ", 1), "malformed_json"),
    (b"\x01" + b"\x01".join([b"2026-11-20T10:00:00Z", b"a", b"A", b"2", b"co2", b"1", b"ppm", b"x"]), "malformed_json"),
    (reading(floor=...)[:-1] + b', "type": "temperature"}', "malformed_json"),
    (reading(unit=...)[:-1] + b', "type": "temperature"}', "malformed_json"),
    (literally("value", "021.5"), "malformed_json"),
    (literally("floor", "02"), "malformed_json"),
    # no record, no text, no JSON object
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
    (b"\xef\xbb\xbf" + V, "malformed_json"),  # a byte order mark
    (V.replace(b'"', b"'"), "malformed_json"),
    (V[:-1] + b",}", "malformed_json"),
    (V[:-1] + b"/* x */}", "malformed_json"),
    (literally("value", "NaN"), "malformed_json"),
    (literally("value", "Infinity"), "malformed_json"),
    (literally("value", "021.5"), "malformed_json"),
    (literally("value", "+21.5"), "malformed_json"),
    (literally("value", ".5"), "malformed_json"),
    (literally("device_id", '"a\tb"'), "malformed_json"),  # control characters have to be escaped
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
    # missing fields, in the order of the contract
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
    # fields of the wrong kind
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
    # timestamps
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
    # what the values say
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
    # As microseconds: Python's datetime does not reach as far back as the timestamps that are allowed.
    return judged.withColumn("event_micros", F.unix_micros("event_time")).drop("event_time").orderBy("number").collect()


@pytest.fixture(scope="module")
def reasons(spark):
    return [row.reject_reason for row in judge(spark, [record for record, _ in CASES])]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number][1]}")
def test_a_record_is_rejected_for_the_first_rule_that_it_breaks(reasons, number):
    record, reason = CASES[number]
    assert reasons[number] == reason, record


def test_every_reason_has_a_case():
    assert {reason for _, reason in CASES} - {None} == set(CONTRACT.reasons)


def test_the_simulator_breaks_every_rule(spark):
    broken = {reason: break_rule(VALID) for reason, break_rule in Simulator(CONTRACT, SENSOR_TYPES).breaks.items()}
    assert [row.reject_reason for row in judge(spark, list(broken.values()))] == list(CONTRACT.reasons)


def test_a_valid_reading_arrives_with_the_values_that_were_sent(spark):
    [row] = judge(
        spark, [reading(timestamp="2026-11-20T11:00:00.123456+01:00", device_id="Gerät 🌡", value=21.123456789)]
    )
    assert (row.device_id, row.building, row.floor, row.type, row.value, row.unit) == (
        "Gerät 🌡",
        "A",
        2,
        "temperature",
        21.123456789,
        "°C",
    )
    sent = datetime(2026, 11, 20, 10, 0, 0, 123456, tzinfo=timezone.utc)
    assert row.event_micros == int(sent.timestamp()) * 1_000_000 + 123456


def test_a_missing_floor_is_null(spark):
    assert [row.floor for row in judge(spark, [reading(floor=...), reading(floor=None)])] == [None, None]
