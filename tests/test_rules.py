"""The contract of readings.py, tested with a table of records and the reason to reject each (None: it is valid)."""

import json
from datetime import datetime, timezone

from pipeline.simulator import Simulator

import pytest

from helpers.records import CASES, VALID, judge, reading
from readings import CONTRACT, SENSOR_TYPES


@pytest.fixture(scope="module")
def reasons(spark):
    return [row.reject_reason for row in judge(spark, [record for record, _ in CASES])]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{number}-{CASES[number][1]}")
def test_a_record_is_rejected_for_the_first_rule_that_it_breaks(reasons, number):
    record, reason = CASES[number]
    assert reasons[number] == reason, record


def test_every_reason_has_a_case():
    assert {reason for _, reason in CASES} - {None} == set(CONTRACT.reasons)


def test_the_simulator_breaks_the_rules_of_other_sensor_types_too():
    types = SENSOR_TYPES | {"pressure": SENSOR_TYPES["co2"]._replace(unit="K", high=1e9)}
    breaks = Simulator(CONTRACT, types).breaks
    broken = {name: json.loads(breaks[name](VALID)) for name in ("unknown_type", "wrong_unit", "out_of_range")}
    assert broken["unknown_type"]["type"] not in types and broken["out_of_range"]["value"] > 1e9
    assert broken["wrong_unit"]["unit"] not in {each.unit for each in types.values()}


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
