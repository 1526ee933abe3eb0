"""Contracts of any kind: how their records are read, which ones are refused, and what a change does to the tables."""

import functools
import itertools
import json
import operator
import random
import time
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.contract.contract import Contract, load_contract
from pipeline.contract.fields import Boolean, ContractError, Integer, Number, Text
from pipeline.contract.judge import parse
from pipeline.contract.times import Timestamp
from pipeline.simulator import Simulator
from pipeline.streaming.start import check_start
from pipeline.terminal.errors import PipelineError

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kafka import KafkaProducer
from pyspark.sql import functions as F

from helpers import oracle
from helpers.files import put
from helpers.processes import REPOSITORY
from helpers.records import ARRIVAL, ARRIVAL_MICROS, JSON, mutate, reading
from helpers.streams import bronze_writer
from helpers.topics import tables
from readings import SENSOR_TYPES

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"

# --- How records are read

KINDS = [
    Text,
    Boolean,
    Number,
    Integer,
    lambda name, **options: Integer(name, bits=32, **options),
    Timestamp,
    lambda name, **options: Timestamp(name, at_most_ahead="10 minutes", **options),
    *[
        lambda name, form=form, **options: Timestamp(name, format=form, at_most_ahead="1 day", **options)
        for form in ("rfc3339", "epoch_s", "epoch_ms", "epoch_us", "epoch_ns")
    ],
    *[
        lambda name, kind=kind, **options: kind(name, quoted=True, **options)
        for kind in (Boolean, Number, Integer, functools.partial(Timestamp, format="epoch_s"))
    ],
    *[
        lambda name, values=values, **options: Boolean(name, true=values[0], false=values[1], **options)
        for values in ((("ON", 1), ("OFF", 0)), ((True, "1", "a b", "on (auto)"), (1, "\\", 'so "so"', "größe", "🙂")))
    ],
    lambda name, **options: Timestamp(name, format="iso8601", **options),
    *[
        lambda name, zone=zone, **options: Timestamp(name, format="iso8601", zone=zone, **options)
        for zone in ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu")
    ],
]
NAMES = [
    "a",
    "b",
    "a b",
    "größe",
    "it's",
    'say "so"',
    "back\\slash",
    "$1",
    "SELECT",
    "n.a",
    "n.b.c",
    "n.b.d",
    "o.x y",
    "o.'q'",
    "text",
    "json",
    "value",
    "type",
    "seen",
    "{",
    "\\E",
    "\\Q",
    "`",
    "%s",
    "A",
]
VALUES = {
    Text: st.text(min_size=1, max_size=8) | st.sampled_from(["", " ", "\u3000", "x", "7", "true", "{}", "\x00", "😀"]),
    Boolean: st.booleans(),
    Number: st.floats(allow_nan=False)
    | st.integers(-(10**20), 10**20)
    | st.sampled_from([0, -0.0, 1e300, 0.1, 10**15, 10**40]),
    Integer: st.integers(-(2**64), 2**64)
    | st.sampled_from([0, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 10**18]),
    "rfc3339": st.sampled_from(
        [
            "2026-11-20T10:00:00Z",
            "2026-11-20T12:30:00.5+00:20",
            "2026-11-20T12:10:00.000001Z",
            "0000-01-01T00:00:00Z",
            "9999-12-31T23:59:59.999999Z",
            "0000-01-01T10:00:00+14:00",
            "9999-12-31T10:00:00-14:00",
            "2026-11-20",
            "1763632800",
        ]
    ),
    "epoch_s": st.integers(-62167219201, 253402300800)
    | st.floats(1.7e9, 1.8e9)
    | st.sampled_from(
        [0, 1795176000, 1795262400, 1795262400.000001, 1763632800.123456789, -0.0000001, 1e9, 253402300799.9999999]
    ),
    "epoch_ms": st.integers(-62167219200001, 253402300800000)
    | st.sampled_from([0, 1795262400000, 1795262400001, 1.5, 1e12]),
    "epoch_us": st.integers(-62167219200000001, 253402300800000000)
    | st.sampled_from([0, -1, 1795262400000000, 1795262400000001, 1.5, 1e15, 2**63]),
    "epoch_ns": st.integers(-(2**63) - 1, 2**63)
    | st.sampled_from([0, -1, -1000, -1001, 999, 1795262400000000000, 1795262400000001000, 1.5, 1e18]),
    "iso8601": st.builds(
        lambda time, form, fraction, offset: time.strftime(form) + (fraction if "S" in form else "") + offset,
        st.datetimes(datetime(1950, 1, 1), datetime(2036, 1, 1))
        | st.builds(
            # Around the changes to and from daylight saving time in the four zones.
            lambda day, minutes: day + timedelta(minutes=minutes),
            st.sampled_from(
                [
                    datetime(2026, *day)
                    for day in ((3, 8), (3, 29), (4, 5), (10, 4), (10, 25), (11, 1), (3, 28), (10, 3))
                ]
            ),
            st.integers(0, 300),
        ),
        st.sampled_from(
            [
                "%Y-%m-%dT%H:%M:%S",
                "%Y-%m-%d %H:%M:%S",
                "%Y-%m-%dT%H:%M",
                "%Y-%m-%d %H:%M",
                "%Y%m%dT%H%M%S",
                "%Y%m%dT%H%M",
            ]
            + ["%Y-%m-%dT%H%M", "%Y%m%dT%H:%M:%S", "%Y%m%d %H%M", "%Y-%m-%d", "%d.%m.%Y %H:%M"]
        ),
        st.sampled_from(["", "", ".5", ",25", ".1234567", ",", ".5Z"]),
        st.sampled_from(["", "", "", "Z", "+02:00", "-0330", "+01", " +0100", "z", "+25:00"]),
    )
    | st.sampled_from(
        [
            "0000-01-01T00:00",
            "9999-12-31T23:59:59,9999999",
            "2026-02-30T08:00",
            "2026-11-20T24:00:00",
            "\u0662026-11-20T08:00",
        ]
    ),
}


def quoted(values: st.SearchStrategy) -> st.SearchStrategy:
    """Values, and strings that hold values or nearly do."""
    texts = st.builds(
        lambda value, form: form.format(json.dumps(value)),
        values,
        st.sampled_from(["{}"] * 5 + [" {}", "+{}", "{}.", "0{}", "{},5"]),
    )
    return values | texts | st.sampled_from(["NaN", "Infinity", "1e999", "null", "0x1F", "1" * 1001, "", "{}", "TRUE"])


@st.composite
def contracts(draw) -> Contract:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=7, unique=True))
    fields = tuple(
        draw(st.sampled_from(KINDS))(name, column=f"c{number}", required=draw(st.booleans()))
        for number, name in enumerate(names)
    )
    return Contract(fields)


@st.composite
def records(draw, contract: Contract) -> bytes:
    """Mostly valid records with the fields in any order, some with extra, missing or mistyped fields."""
    record: dict = {}
    for field in draw(st.permutations(contract.fields)) if draw(st.integers(0, 3)) == 0 else contract.fields:
        if draw(st.integers(0, 15)) == 0:
            continue
        values = VALUES[field.format if isinstance(field, Timestamp) else type(field)]
        if getattr(field, "quoted", False):
            values = quoted(values)
        if isinstance(field, Boolean) and field.true:
            values = st.sampled_from([*field.true, *field.false, "on", "1", 1, 1.0, True, "0", ""])
        value = draw(JSON) if draw(st.integers(0, 15)) == 0 else draw(values)
        place = record
        for name in field.path[:-1]:
            if not isinstance(place.get(name), dict):
                place[name] = draw(st.sampled_from([{}, {}, {}, {"more": 1}, {"a": {}}]))
            place = place[name]
        place[field.path[-1]] = value
    if draw(st.integers(0, 5)) == 0:
        record |= draw(st.dictionaries(st.sampled_from(["n", "o", "new", "a"]) | st.text(max_size=3), JSON, max_size=2))
    text = json.dumps(
        record, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    )
    prefix = draw(
        st.sampled_from([b""] * 20 + [b"\xef\xbb\xbf", b"\x00\x00\x00\x00\xff", b"\x00\x00", b" \xef\xbb\xbf"])
    )
    raw = prefix + text.encode("utf-8", "surrogatepass")
    return mutate(raw, random.Random(draw(st.integers()))) if draw(st.integers(0, 15)) == 0 else raw


def read(spark, contract: Contract, raws: list[bytes | None]) -> list:
    rows = spark.createDataFrame(list(enumerate(raws)), "number INT, raw BINARY").withColumn(
        "ingest_time", F.lit(ARRIVAL).cast("timestamp")
    )
    times = {field.column: F.unix_micros(field.column) for field in contract.fields if isinstance(field, Timestamp)}
    return parse(rows, contract).withColumns(times).orderBy("number").collect()


@settings(
    max_examples=30,
    database=None,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_records_of_any_contract_are_read_as_plain_python_reads_them(spark, data):
    contract = data.draw(contracts())
    raws = data.draw(st.lists(records(contract), min_size=60, max_size=60)) + [None, b"", b"{}"]
    for raw, row in zip(raws, read(spark, contract, raws), strict=True):
        reason, values, rest = oracle.read(contract, raw, ARRIVAL_MICROS)
        assert row.reject_reason == reason, (contract, raw)
        if not reason:
            assert repr({column: row[column] for column in contract.columns}) == repr(values), (contract, raw)
            assert json.loads(row["_rescued_data"] or "{}") == rest, (contract, raw)


KIND_CASES = [  # the field, its JSON text in the record, the expected reason or value
    (Integer("x"), "7", 7),
    (Integer("x"), "-0", 0),
    (Integer("x"), "9223372036854775807", 2**63 - 1),
    (Integer("x"), "9223372036854775808", "invalid_x"),
    (Integer("x"), "1.0", "invalid_x"),
    (Integer("x"), "1e2", "invalid_x"),
    (Integer("x"), '"7"', "invalid_x"),
    (Integer("x"), "true", "invalid_x"),
    (Integer("x"), "[7]", "invalid_x"),
    (Integer("x", bits=32), "2147483647", 2**31 - 1),
    (Integer("x", bits=32), "2147483648", "invalid_x"),
    (Number("x"), "7", 7.0),
    (Number("x"), "1e2", 100.0),
    (Number("x"), "1e999", "invalid_x"),
    (Number("x"), "NaN", "malformed_json"),
    (Number("x"), '"7"', "invalid_x"),
    (Number("x"), "false", "invalid_x"),
    (Number("x"), "{}", "invalid_x"),
    (Boolean("x"), "true", True),
    (Boolean("x"), "1", "invalid_x"),
    (Boolean("x"), '"true"', "invalid_x"),
    (Boolean("x"), "null", "missing_x"),
    (Boolean("x"), '" "', "missing_x"),
    (Boolean("x", required=False), '" "', "invalid_x"),
    (Text("x"), '"7"', "7"),
    (Text("x"), "7", "invalid_x"),
    (Text("x"), '"\u00a0"', "missing_x"),
    (Text("x", required=False), '""', ""),
    (Text("x", required=False), "null", None),
    (Timestamp("x"), '"1970-01-01T00:00:00.000001Z"', 1),
    (Timestamp("x"), "0", "invalid_x"),
    (Timestamp("x", format="epoch_s"), "1.5", 1_500_000),
    (Timestamp("x", format="epoch_s"), "1e2", 100_000_000),
    (Timestamp("x", format="epoch_s"), "-1.0000009", -1_000_001),
    (Timestamp("x", format="epoch_s"), '"1"', "invalid_x"),
    (Timestamp("x", format="epoch_s"), "253402300800", "invalid_x"),
    (Timestamp("x", format="epoch_s"), "1e300", "invalid_x"),
    (Timestamp("x", format="epoch_ms"), "1763632800123", 1_763_632_800_123_000),
    (Timestamp("x", format="epoch_ms"), "1.0", "invalid_x"),
    (Timestamp("x", format="epoch_ms"), "9223372036854775807", "invalid_x"),
    (Timestamp("x", format="epoch_ms", at_most_ahead="10 minutes"), "1795176600000", 1_795_176_600_000_000),
    (Timestamp("x", format="epoch_ms", at_most_ahead="10 minutes"), "1795176600001", "invalid_x"),
    # -0 is 0.
    *[(Number("x"), zero, 0.0) for zero in ("-0", "-0.0", "-0.000", "-0e0", "-0E+5", "-1e-999", "0")],
    (Integer("x", bits=32), "-0", 0),
    *[(Timestamp("x", format=form), "-0", 0) for form in ("epoch_s", "epoch_ms")],
    # Jackson's limits.
    (Number("x"), "1" * 1000, "invalid_x"),
    (Number("x"), "1" * 1001, "malformed_json"),
    (Number("x"), "0." + "1" * 1000, 1 / 9),
    (Number("x"), "1." + "1" * 1001, "malformed_json"),
    # Values in strings.
    *[
        (Number("x", quoted=True), *case)
        for case in (
            ('"21.5"', 21.5),
            ("21.5", 21.5),
            ('"-0"', 0.0),
            ('"1e2"', 100.0),
            ('"1e-999999999"', 0.0),
            ('"1e999999999"', "invalid_x"),
            ('"\\u0031"', 1.0),
            ('""', "missing_x"),
            ("null", "missing_x"),
            *[
                (f'"{text}"', "invalid_x")
                for text in (
                    "21,5",
                    "NaN",
                    " 7",
                    "7 ",
                    "+7",
                    "07",
                    ".5",
                    "5.",
                    "0x7",
                    "1" * 1001,
                    "true",
                    "null",
                    "{}",
                    "[7]",
                )
            ],
        )
    ],
    (Integer("x", quoted=True), '"9223372036854775807"', 2**63 - 1),
    (Integer("x", quoted=True), '"9223372036854775808"', "invalid_x"),
    (Integer("x", quoted=True), '"7.0"', "invalid_x"),
    (Boolean("x", quoted=True), '"true"', True),
    (Boolean("x", quoted=True), '"True"', "invalid_x"),
    (Boolean("x", quoted=True), '"1"', "invalid_x"),
    (Timestamp("x", format="epoch_s", quoted=True), '"1.5"', 1_500_000),
    (Timestamp("x", format="epoch_ns", quoted=True), '"1679912468340000999"', 1_679_912_468_340_000),
    *[
        (Boolean("x", true=("ON", 1), false=("OFF", 0)), *case)
        for case in (
            ('"ON"', True),
            ("1", True),
            ('"OFF"', False),
            ("0", False),
            ("-0", False),
            *[
                (text, "invalid_x")
                for text in ('"1"', '"0"', '"on"', "1.0", "2", "true", '"\\"ON"', '"ON\\""', "[1]", '{"a":1}')
            ],
        )
    ],
    # Other formats of times.
    (Timestamp("x", format="epoch_us"), "1679912468340000", 1_679_912_468_340_000),
    (Timestamp("x", format="epoch_ns"), "1679912468340000999", 1_679_912_468_340_000),
    (Timestamp("x", format="epoch_ns"), "-1", -1),
    (Timestamp("x", format="epoch_ns"), "-9223372036854775808", -9_223_372_036_854_776),
    (Timestamp("x", format="epoch_ns"), "9223372036854775808", "invalid_x"),
    *[
        (Timestamp("x", format="iso8601"), f'"{text}"', 1_763_625_600_000_000)
        for text in (
            "2025-11-20T08:00:00Z",
            "2025-11-20 08:00:00+00:00",
            "2025-11-20T08:00Z",
            "20251120T080000Z",
            "20251120T0800Z",
            "2025-11-20T09:00+01",
            "20251120T0830+0030",
            "2025-11-20 08:00:00,0000009Z",
        )
    ],
    *[
        (Timestamp("x", format="iso8601"), f'"{text}"', "invalid_x")
        for text in (
            "2025-11-20T08:00:00",
            "2025-11-20",
            "20251120 080000Z",
            "2025-1120T08:00Z",
            "2025-11-20T0800Z",
            "2025-11-20T08:00.5Z",
            "2025-11-20  08:00Z",
            "2025-11-20T08:00:00.Z",
            "2025-11-20T08:00:00 Z",
            "2025-11-20T08Z",
            "2025-W47-4T08:00Z",
            "x",
            "",
        )
        if text
    ],
    *[
        (Timestamp("x", format="iso8601", zone="Europe/Berlin"), f'"{text}"', right)
        for text, right in (
            ("2026-10-25T02:30:00", 1_792_888_200_000_000),  # twice that night; the first
            ("2026-10-25T02:30:00+01:00", 1_792_891_800_000_000),
            ("2026-03-29T02:30:00", "invalid_x"),  # not at all that night
            ("2026-03-29T03:00", 1_774_746_000_000_000),
            ("20260329T015959,999999", 1_774_745_999_999_999),
        )
    ],
    # The years 0 to 9999 in UTC.
    *[
        (Timestamp("x"), f'"{text}"', "invalid_x")
        for text in (
            "0000-01-01T00:00:00+14:00",
            "0000-01-01T00:00:59.999999+00:01",
            "9999-12-31T23:59:59-14:00",
            "9999-12-31T23:59:00-00:01",
        )
    ],
    (Timestamp("x"), '"0000-01-01T00:00:00-00:00"', oracle.FIRST_MICROS),
    (Timestamp("x"), '"0000-01-01T14:00:00+14:00"', oracle.FIRST_MICROS),
    (Timestamp("x"), '"9999-12-31T23:59:59.9999999Z"', oracle.END_MICROS - 1),
    (Timestamp("x"), '"9999-12-31T09:59:59.999999-14:00"', oracle.END_MICROS - 1),
    (Timestamp("x", format="epoch_s"), "-62167219200", oracle.FIRST_MICROS),
    (Timestamp("x", format="epoch_s"), "-62167219200.000001", "invalid_x"),
    (Timestamp("x", format="epoch_s"), "253402300799.9999999", oracle.END_MICROS - 1),
    (Timestamp("x", format="epoch_ms"), "-62167219200001", "invalid_x"),
    (Timestamp("x", format="epoch_ms"), "253402300799999", oracle.END_MICROS - 1000),
    (Timestamp("x", format="epoch_ms"), "253402300800000", "invalid_x"),
]


@pytest.mark.parametrize("escape", [False, True], ids=["plain", "strict"])
def test_a_value_is_of_its_fields_kind_or_the_record_is_rejected(spark, escape):
    name = r"\u0078" if escape else "x"
    for kind in dict.fromkeys(field for field, _, _ in KIND_CASES):
        cases = [(text, right) for field, text, right in KIND_CASES if field == kind]
        rows = read(spark, Contract((kind,)), [f'{{"{name}": {text}}}'.encode() for text, _ in cases])
        for (text, right), row in zip(cases, rows, strict=True):
            assert str(row.reject_reason or row.x) == str(right), (kind, text)  # by str, which tells -0.0 from 0.0


def test_a_time_is_ahead_of_its_arrival_where_that_is_known_and_else_of_its_batch(spark):
    contract = Contract((Timestamp("x", format="epoch_s", at_most_ahead="10 minutes"),))
    arrivals = [
        (b'{"x": 1795176601}', None),
        (b'{"x": 1795176600}', None),
        (b'{"x": 1795176600}', "2026-11-20T11:00:00Z"),
        (b'{"\\u0078": 1795176600}', "2026-11-20T11:00:00Z"),
        (b'{"x": 1795180200}', "2026-11-20T13:00:00Z"),
        (b'{"\\u0078": 1795180201}', "2026-11-20T13:00:00Z"),
    ]
    rows = spark.createDataFrame(arrivals, "raw BINARY, arrival STRING").selectExpr(
        "raw", "CAST(arrival AS TIMESTAMP) AS arrival_time", f"TIMESTAMP '{ARRIVAL}' AS ingest_time"
    )
    reasons = [row.reject_reason for row in parse(rows, contract).collect()]
    assert reasons == ["invalid_x", None, "invalid_x", "invalid_x", None, "invalid_x"]


def test_a_plain_record_has_the_same_values_in_any_order_and_among_unknown_fields(spark):
    contract = Contract(
        (Text("t", required=False), Integer("i", required=False), Number("x"), Boolean("b", required=False))
    )
    pairs = ['"t":"7"', '"i":11', '"x":2.5', '"b":true']
    raws = []
    for order in itertools.permutations(pairs):
        for count, extra in itertools.product(
            (2, 3, 4), ([], ['"T":1.50'], ['"u":"é"', '"v":null'], ['"u":1', '"u":1'], ['"x":1'])
        ):
            for place in range(count + 1):
                raws.append(f"{{{','.join((*order[:place], *extra, *order[place:count]))}}}".encode())
    raws = list(dict.fromkeys(raws))
    for raw, row in zip(raws, read(spark, contract, raws), strict=True):
        reason, values, rest = oracle.read(contract, raw, ARRIVAL_MICROS)
        assert row.reject_reason == reason, raw
        if not reason:
            assert ({column: row[column] for column in contract.columns}, json.loads(row["_rescued_data"] or "{}")) == (
                values,
                rest,
            ), raw
            assert list(row["_unknown_fields"] or []) == list(rest), raw


NESTED = Contract(
    (Text("device.id"), Text("device.model", required=False), Number("device.at.lat", required=False), Number("value"))
)


@pytest.mark.parametrize(
    "record, reason, rest, unknown",
    [
        ({"device": {"id": "a"}, "value": 1}, None, None, []),
        (
            {"device": {"id": "a", "fw": "2", "at": {"lat": 1.5, "lon": 2}}, "value": 1, "rssi": -7},
            None,
            {"rssi": -7, "device": {"fw": "2", "at": {"lon": 2}}},
            ["device.at.lon", "device.fw", "rssi"],
        ),
        ({"device": {"id": "a", "at": None}, "value": 1, "a": None}, None, {"a": None}, ["a"]),
        ({"value": 1}, "missing_device.id", None, []),
        ({"device": None, "value": "x"}, "missing_device.id", None, []),
        ({"device": "a", "value": 1}, "invalid_device.id", None, []),
        ({"device": {"id": {"id": "a"}}, "value": 1}, "invalid_device.id", None, []),
        ({"device": {"id": "a", "at": [1]}, "value": 1}, "invalid_device.at.lat", None, []),
        ({"device": "a"}, "missing_value", None, []),
        ({"device": {"id": 7, "model": 8}, "value": "x"}, "invalid_device.id", None, []),
    ],
)
def test_fields_of_nested_objects_are_read_and_what_is_unknown_is_kept(spark, record, reason, rest, unknown):
    [row] = read(spark, NESTED, [json.dumps(record).encode()])
    assert row.reject_reason == reason
    assert (json.loads(row["_rescued_data"]) if row["_rescued_data"] else None, sorted(row["_unknown_fields"])) == (
        rest,
        unknown,
    )


def test_a_contract_of_a_hundred_fields_is_read(spark):
    contract = Contract(tuple(Number(f"n{number}", required=number % 2 == 0) for number in range(100)))
    record = {f"n{number}": number for number in range(100)}
    rows = read(
        spark,
        contract,
        [
            json.dumps(record).encode(),
            json.dumps(dict(reversed(record.items()))).encode(),
            json.dumps(record | {"n98": None}).encode(),
            json.dumps(record | {"n99": None}).encode(),
        ],
    )
    assert [row.reject_reason for row in rows] == [None, None, "missing_n98", None]
    assert [(row.n1, row.n99) for row in rows if not row.reject_reason] == [(1, 99), (1, 99), (1, None)]


def test_the_simulator_makes_valid_records_of_contracts_whose_fields_have_the_names_of_its_own_with_other_kinds():
    kinds = (Text, Boolean, Number, Integer, Timestamp)
    for kind in kinds:
        contract = Contract(
            tuple(kind(name) for name in ("device_id", "building", "floor", "type", "unit", "value", "usual", "exact"))
        )
        for sensor_types in ({}, SENSOR_TYPES):
            for _, record in itertools.islice(Simulator(contract, sensor_types).messages(3, seed=1), 20):
                assert oracle.read(contract, record, time.time_ns() // 1000)[0] is None, record


def test_the_device_in_a_record_is_the_key_of_its_message():
    for file, path in (("readings.py", ["device_id"]), ("examples/zigbee2mqtt.py", ["device", "friendlyName"])):
        for key, record in itertools.islice(Simulator.of(f"{REPOSITORY}/{file}").messages(12), 30):
            assert functools.reduce(operator.getitem, path, json.loads(record)) == key


# --- Contracts that are refused


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("", "has no CONTRACT"),
        ("CONTRACT = 7", "has no CONTRACT"),
        ("CONTRACT = Contract(", "is not valid Python on line 2"),
        ("CONTRACT = Contract((Text('a', bits=3),))", "fails on line 2: TypeError"),
        ("import nowhere", "fails on line 2: ModuleNotFoundError"),
        ("from common.contract import Text", 'Write "from pipeline.contract import …" instead'),
        ("CONTRACT = Contract(())", "it needs at least one field, of one of the kinds"),
        ("CONTRACT = Contract(('a',))", "it needs at least one field, of one of the kinds"),
        ("CONTRACT = Contract((Text('a'), Number('a', column='b')))", "the field a appears twice"),
        ("CONTRACT = Contract((Text('a'), Number('A')))", "the fields a and A share a column, A"),
        ("CONTRACT = Contract((Text('a.b'), Number('a_b')))", "the fields a.b and a_b share a column, a_b"),
        ("CONTRACT = Contract((Text('a'), Number('a.b')))", "the field a is a single value, so a.b can't be inside it"),
        (
            "CONTRACT = Contract((Number('a.b.c'), Text('a.b')))",
            "the field a.b is a single value, so a.b.c can't be inside it",
        ),
        ("CONTRACT = Contract((Text('a b'),))", "the field a b can't have the column 'a b'"),
        (
            "CONTRACT = Contract((Text('offset'),))",
            "the field offset can't have the column offset, which is reserved",
        ),
        ("CONTRACT = Contract((Text('t', column='Ingest_Time'),))", "the field t can't have the column Ingest_Time"),
        ("CONTRACT = Contract((Text('_rescued_data'),))", "the field _rescued_data can't have the column"),
        ("CONTRACT = Contract((Text('.a'),))", "the field '.a' needs a name"),
        ("CONTRACT = Contract((Text(''),))", "the field '' needs a name"),
        ("CONTRACT = Contract((Integer('a', bits=16),))", "the field a has bits=16"),
        (
            "CONTRACT = Contract((Timestamp('a', format='iso'),))",
            "the field a has format='iso', which must be one of rfc3339",
        ),
        ("CONTRACT = Contract((Timestamp('a', at_most_ahead='soon'),))", "the field a has at_most_ahead='soon'"),
        (
            "CONTRACT = Contract((Text('a'),), {'missing_a': 'true'})",
            "the rule missing_a has the name of an existing reason",
        ),
        (
            "CONTRACT = Contract((Text('a'),), {'unreadable_file': 'true'})",
            "the rule unreadable_file has the name of an existing",
        ),
        ("CONTRACT = Contract((Text('a'),), {'r': 7})", "the rule 'r' must be a name and its SQL"),
        (
            "CONTRACT = Contract((Timestamp('a', quoted=True),))",
            "the field a can't be quoted: rfc3339 is a string already",
        ),
        (
            "CONTRACT = Contract((Timestamp('a', zone='UTC'),))",
            "the field a has zone='UTC', which must be a time zone such as",
        ),
        ("CONTRACT = Contract((Timestamp('a', format='iso8601', zone=\"'\"),))", "which must be a time zone such as"),
        ("CONTRACT = Contract((Boolean('a', true=('ON',)),))", "the field a needs both true=(…) and false=(…)"),
        (
            "CONTRACT = Contract((Boolean('a', true='ON', false='OFF'),))",
            "the field a needs both true=(…) and false=(…)",
        ),
        (
            "CONTRACT = Contract((Boolean('a', true=(1.0,), false=(0,)),))",
            "the field a needs both true=(…) and false=(…)",
        ),
        (
            "CONTRACT = Contract((Boolean('a', true=(1, 2), false=(2,)),))",
            "the field a takes 2 for both true and false",
        ),
        ("CONTRACT = Contract((Boolean('a', true=(' ',), false=(2,)),))", "the field a can't take a blank string"),
        (
            "CONTRACT = Contract((Boolean('a', true=('1',), false=(1,), quoted=True),))",
            "the field a can't be quoted: list",
        ),
        ("CONTRACT = Contract((Boolean('a', true=(2**63,), false=(0,)),))", f"can't take {2**63}, which does not fit"),
        ("CONTRACT = Contract((Text('@key'),))", "it needs at least one field besides @key"),
        *(
            (f"CONTRACT = Contract(tuple(map(Text, {names})))", complaint)
            for names, complaint in [
                (["a[]"], "the field a[] needs a name with at most one array and a name after it"),
                (["a[].b[].c"], "the field a[].b[].c needs a name with at most one array"),
                ([".[].x"], "the field .[].x needs a name with at most one array"),
                (["a[].x", "b[].y"], "it has fields in two arrays, a[] and b[]; it can have only one array"),
                (["[].x", "g"], "the field g is outside the array [], which is the whole record"),
                (["r", "r[].x"], "the field r is a single value, so r[] can't be inside it"),
                (["r.a", "r[].x"], "the field r[] is an array, so r.a can't be inside it"),
                (["r[].x", "r[].x.y"], "the field r[].x is a single value, so r[].x.y can't be inside it"),
                (["r[].x", "x"], "the fields r[].x and x share a column, x"),
                (
                    ["r[].element"],
                    "a field has the column element, which is reserved for the tables of a contract with an",
                ),
            ]
        ),
        ("CONTRACT = Contract((Number('@key'),))", "the field @key is the key of a Kafka message, which is a Text"),
    ],
)
def test_a_contract_that_cannot_be_is_one_sentence(tmp_path, source, complaint):
    file = tmp_path / "mine.py"
    file.write_text(f"from pipeline.contract import *\n{source}\n")
    with pytest.raises(PipelineError) as refused:
        load_contract(str(file))
    assert str(file) in str(refused.value) and complaint in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("zone", ["Europe/Nowhere", "europe/berlin", "PST"])
def test_a_zone_that_java_does_not_know_is_one_sentence(spark, zone):
    with pytest.raises(ContractError, match=f"the field a has an unknown zone, {zone}"):
        Contract((Timestamp("a", format="iso8601", zone=zone),)).check(spark)


def test_a_contract_with_the_message_key_is_refused_for_files(run_here, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from pipeline.contract import *\nCONTRACT = Contract((Text('@key'), Number('n')))\n")
    run = run_here(BRONZE, "--readings", file, "--table", tmp_path / "t", "--checkpoint", tmp_path / "c", "--once")
    assert (
        run.returncode == 1 and f"error: Invalid contract in {file}: the field @key is the key of a Kafka" in run.stderr
    )
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("escape", [False, True], ids=["plain", "strict"])
def test_the_message_key_is_a_field_like_any_other(spark, escape):
    record = b'{"\\u006e":1}' if escape else b'{"n":1}'
    early = Timestamp("t", required=False)
    contracts = [
        Contract((Text("@key"), Number("n"))),
        Contract((Number("n"), Text("@key", column="topic_path", required=False), early)),
    ]
    cases = [
        (b"zigbee2mqtt/kitchen", record, None, None),
        (None, record, "missing_@key", None),
        (b" ", record, "missing_@key", None),
        (b"\xff", record, "invalid_@key", "invalid_@key"),
        (b"a", b'{"n":"x"}', "invalid_n", "invalid_n"),
        (None, b"{}", "missing_@key", "missing_n"),
        (b"\xff", b'{"n":1,"t":"x"}', "invalid_@key", "invalid_@key"),
        (None, b"{", "malformed_json", "malformed_json"),
    ]
    rows = spark.createDataFrame([case[:2] for case in cases], "kafka_key BINARY, raw BINARY").withColumn(
        "ingest_time", F.lit(ARRIVAL).cast("timestamp")
    )
    for number, contract in enumerate(contracts):
        assert [row.reject_reason for row in parse(rows, contract).collect()] == [case[2 + number] for case in cases]
    row = parse(rows, contracts[0]).first()
    assert (row.key, bytes(row.kafka_key), row.n) == ("zigbee2mqtt/kitchen", b"zigbee2mqtt/kitchen", 1)
    assert [row.topic_path for row in parse(rows, contracts[1]).collect()][:3] == ["zigbee2mqtt/kitchen", None, " "]


def test_a_contract_that_is_not_there_is_one_sentence(tmp_path):
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(PipelineError, match=f"There is no contract file {path}"):
            load_contract(str(path))


@pytest.mark.parametrize(
    "sql",
    [
        "colour = 'red'",
        "a b c",
        "",
        "a",
        "sum(n) > 1",
        "explode(array(1))",
        "rand() > 0.5",
        "n + 1",
        "raw IS NULL",
        "ingest_time < now()",
        "n < unix_timestamp()",
        "a > CAST(current_date AS STRING)",
        "ingest_time < TIMESTAMP 'today'",
        "ingest_time < CAST('yesterday ' AS DATE)",
        "a = uuid()",
        "a) OR (n",
        "n > 1 /* too much",
        "true THEN 'r' WHEN n > 1",
    ],
)
def test_a_rule_that_cannot_be_is_one_sentence(spark, sql):
    with pytest.raises(ContractError, match="the rule r ") as refused:
        Contract((Text("a"), Number("n")), {"r": sql}).check(spark)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "sql",
    [
        "ingest_time > 'now'",
        "ingest_time > ' NOW '",
        "ingest_time > to_date('today')",
        "ingest_time > to_timestamp('now')",
        "ingest_time > CAST(trim('today') AS DATE)",
        "ingest_time > CAST('no' || 'w' AS TIMESTAMP)",
        "'now'::timestamp > ingest_time",
        "ingest_time > DATE 'today'",
        r"ingest_time > DATE /**/ 'toda\u0079'",
        "ingest_time > TIMESTAMP_NTZ 'now'",
        "now() > '2026'",
        "ingest_time > try_to_timestamp('now')",
        "ingest_time > try_to_date('now')",
        "datediff('today', ingest_time) > 1",
        "transform(array(1), x -> timestamp('tomorrow'))[0] > ingest_time",
        "ingest_time BETWEEN '2026' AND 'today'",
        "year('now') > n",
        "date_format('now', 'y') = a",
        "a = input_file_name()",
        "spark_partition_id() = n",
        "a = current_user()",
        "reflect('java.util.UUID', 'randomUUID') = a",
        "hex(aes_encrypt(a, '0000111122223333')) = a",
        "uniform(1, 10) > n",
        "shuffle(array(n, 1))[0] = 1",
        "monotonically_increasing_id() = n",
        "current_time() > TIME '10:00'",
        "ingest_time > curdate()",
    ],
)
def test_a_rule_that_may_differ_for_the_same_record_is_refused(spark, sql):
    with pytest.raises(ContractError, match=r"the rule r \(.*\) can give different results when a batch is repeated"):
        Contract((Text("a"), Number("n")), {"r": sql}).check(spark)
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"


@pytest.mark.parametrize(
    "sql",
    [
        "n IN (SELECT id FROM range(3))",
        "EXISTS (SELECT 1)",
        "n > (SELECT max(id) FROM range(3))",
        "n > 1 OR a NOT IN (SELECT path FROM delta.`/nowhere`)",
        "window(ingest_time, '1 hour').start > ingest_time",
        "session_window(ingest_time, '1 s').end IS NULL",
    ],
)
def test_a_rule_that_asks_more_than_the_record_is_refused(spark, sql):
    with pytest.raises(ContractError, match=r"the rule r (\(.*\) depends on more than the record|is not a condition)"):
        Contract((Text("a"), Number("n")), {"r": sql}).check(spark)


@pytest.mark.parametrize(
    "sql",
    [
        "t > '2026-01-01'",
        "t > DATE '2026-11-28'",
        "t > current",
        "t > TIMESTAMP '2026-11-28 00:00:00'",
        "t > 'epoch'",
        "n > 1 -- too 'now'",
        "t > TIMESTAMP '2026-11-28 00:00:00Z' AND t < TIMESTAMP '2027-01-01 00:00:00'",
        "t > TIMESTAMP_NTZ '2026-11-28 00:00:00'",
        "a = 'now' AND t > DATE '2026-11-28'",
        "a = 'DATE \\'today\\''",
        "n > 1 --",
        "/* in °C */ n > 1",
        "n > 1\n OR n < 0 -- x\n",
        "dayofweek(t) = 1 AND t > make_date(2026, 1, 1)",
        "version() = a",
    ],
)
def test_a_rule_with_constant_times_or_comments_is_taken(spark, sql):
    Contract((Text("a"), Number("n"), Timestamp("t"), Timestamp("current")), {"r": sql}).check(spark)


def test_rules_that_end_with_a_comment_run_as_they_are_checked(spark):
    contract = Contract(
        (Number("n"),), {"low": "n < 0 -- the sensor is broken", "high": "n > 1 OR\n n > 2 --", "odd": "n = 1"}
    )
    contract.check(spark)
    rows = read(spark, contract, [b'{"n": -1}', b'{"n": 2}', b'{"n": 1}', b'{"n": 0.5}'])
    assert [row.reject_reason for row in rows] == ["low", "high", "odd", None]


def test_a_rule_may_use_all_columns_and_the_time_of_arrival(spark):
    contract = Contract(
        (Timestamp("t"), Number("n", required=False)), {"old": "t < ingest_time - INTERVAL 1 DAY", "low": "n < 0"}
    )
    contract.check(spark)
    rows = read(
        spark,
        contract,
        [
            b'{"t": "2026-11-18T00:00:00Z", "n": -1}',
            b'{"t": "2026-11-20T00:00:00Z", "n": -1}',
            b'{"t": "2026-11-20T00:00:00Z"}',
        ],
    )
    assert [row.reject_reason for row in rows] == ["old", "low", None]


@pytest.mark.parametrize("script", [BRONZE, CONSUMER])
def test_a_script_refuses_a_contract_before_it_writes(script, tmp_path, broker, silver, run_here):
    topic, options = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    source = topic if script == CONSUMER else ["--input", tmp_path]
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from pipeline.contract import *\nCONTRACT = Contract((Text('a'),), {'red': 'colour = 1'})\n")
    run = run_here(script, *source, *options[4:], "--readings", wrong, "--once")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and not run.stdout
    assert run.stderr.startswith(
        f"error: Invalid contract in {wrong}: the rule red is not a condition on a, ingest_time: "
    )
    assert not (tmp_path / "silver").exists() and not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    "rule, record",
    [
        ("n + 1 > 100", {"n": 2**31 - 1}),
        ("1 / n > 3", {"n": 0}),
        ("CAST(a AS INT) > 5", {"a": "x"}),
        ("CAST(a AS DATE) > '2026'", {"a": "x"}),
        ("split(a, '-')[3] = 'x'", {"a": "x"}),
        ("to_timestamp(a) > ingest_time", {"a": "yesterday"}),
        ("timestamp_millis(l) > ingest_time", {"l": 2**62}),
        ("timestamp_seconds(l) > ingest_time OR timestamp_seconds(l) IS NULL", {"l": -(2**62)}),
        ("ingest_time - l * INTERVAL 1 HOUR > '2020'", {"l": 2**62}),
        ("timestampadd(YEAR, n, ingest_time) > '3000'", {"n": 2**31 - 1}),
        ("parse_json(a) IS NOT NULL", {"a": "{"}),
        ("url_decode(a) = 'x'", {"a": "%zz"}),
        ("'x' RLIKE a", {"a": "("}),
        ("exists(array(l), x -> timestamp_millis(x) IS NULL)", {"l": 2**62}),
    ],
)
def test_a_rule_that_cannot_be_computed_does_not_hold_and_stops_nothing(spark, rule, record):
    fields = (Text("a", required=False), Integer("n", required=False, bits=32), Integer("l", required=False))
    contract = Contract(fields, {"odd": rule, "short": "a = 'x' AND l IS NULL"})
    contract.check(spark)
    texts = [json.dumps(record), json.dumps(record).replace('"a"', r'"\u0061"').replace('"l"', r'"\u006c"')]
    for row in read(spark, contract, [text.encode() for text in texts]):
        assert row.reject_reason == ("short" if record.get("a") == "x" else None)


def test_a_pattern_and_a_long_text_end_no_jvm(spark):
    """Java matches repeated groups recursively: 50,000 characters would overflow its stack."""
    contract = Contract((Text("a"), Text("b")), {"odd": "NOT a RLIKE '^([a-z0-9]|-)+$'", "long": "length(b) > 60000"})
    texts = ["x" * 8000, "x" * 7999 + "!", "x" * 8001, "x" * 50_000, "x" * 1_000_000 + "!"]
    rows = read(spark, contract, [json.dumps({"a": text, "b": "x" * 50_000}).encode() for text in texts])
    assert [row.reject_reason for row in rows] == [None, "odd", None, None, None]
    [row] = read(spark, contract, [json.dumps({"a": "x", "b": "x" * 60_001}).encode()])
    assert row.reject_reason == "long"


def test_a_rule_may_speak_of_now_and_not_ask_for_it(spark):
    rules = {"a": "mode = 'right now' OR mode = 'today'", "b": "now > 3", "c": '`now` < 0 OR mode = "now()"'}
    contract = Contract((Text("mode"), Number("now")), rules)
    contract.check(spark)
    [row] = read(spark, contract, [b'{"mode": "x", "now": 4}'])
    assert row.reject_reason == "b"


# --- Tables when the contract changes


def one_line_more(tmp_path: Path, line: str) -> Path:
    """A copy of readings.py with `line` added after the line of the floor."""
    file = tmp_path / "my readings.py"
    text, floor = (
        (REPOSITORY / "readings.py").read_text(encoding="utf-8"),
        '        Integer("floor", required=False, bits=32),\n',
    )
    assert floor in text
    file.write_text(text.replace(floor, floor + line), encoding="utf-8")
    return file


def test_an_optional_field_is_one_line_by_both_roads(spark, broker, silver, tmp_path, run_here):
    topic, kafka = silver
    folder = tmp_path / "input"
    folder.mkdir()
    files = ["--input", folder, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "bronze_checkpoint"]
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0

    def send(name: str, *records: bytes) -> list:
        """Sends the records through Kafka and as a file, and reads them. Returns the runs of both streams."""
        put(folder, name, *records)
        with KafkaProducer(bootstrap_servers=broker) as producer:
            for record in records:
                producer.send(topic[3], record)
        return [
            run_here(script, *options, "--once", *readings) for script, options in ((BRONZE, files), (CONSUMER, kafka))
        ]

    readings: list = []
    for run in send("1.json", reading(value=1), reading(value=2, battery=90, rssi=-70)):
        assert run.returncode == 0 and "1 with fields unknown to the contract: battery, rssi\n" in run.stdout, run
    readings = ["--readings", one_line_more(tmp_path, '        Number("battery", required=False),\n')]
    for run in send("2.json", reading(value=3, battery=80.5), reading(value=4), reading(value=5, battery="full")):
        assert run.returncode == 0 and "battery DOUBLE" in run.stdout and "(invalid_battery 1)" in run.stdout, run
    for options in (files, kafka):
        accepted, rejected = tables(spark, options)
        rows = accepted.select("value", "floor", "battery", "_rescued_data").orderBy("value").collect()
        assert [tuple(row) for row in rows] == [
            (1, 2, None, None),
            (2, 2, None, '{"battery":90,"rssi":-70}'),
            (3, 2, 80.5, None),
            (4, 2, None, None),
        ]
        assert [row.reject_reason for row in rejected.collect()] == ["invalid_battery"]


OLD, NEW = Contract((Number("a"),)), Contract((Number("a"), Number("b", required=False)))


def begin(spark, folder: Path, contract: Contract, done: int):
    """A writer, as set up by the start of a stream whose checkpoint has `done` batches done and the next one begun."""
    checkpoint = folder / "checkpoint"
    for name in ("commits", "offsets"):
        (checkpoint / name).mkdir(parents=True, exist_ok=True)
    for number in range(done + 1):
        (checkpoint / "offsets" / str(number)).write_text(f'v1\n{{}}\n{{"logOffset":{number}}}')
    for number in range(done):
        (checkpoint / "commits" / str(number)).write_text("v1\n{}")
    (checkpoint / "metadata").write_text('{"id": "test"}')
    writer = bronze_writer(spark, folder / "bronze", contract)
    writer.start = check_start(spark, writer.source, writer.tables, contract, str(checkpoint))
    return writer


def batch_of(spark, *raws: str):
    return spark.createDataFrame([(raw.encode(),) for raw in raws], "raw BINARY").selectExpr(
        "raw", "'f' AS source_file", f"timestamp '{ARRIVAL}' AS ingest_time"
    )


def test_a_table_that_was_killed_while_it_gained_a_column_goes_on(spark, tmp_path, monkeypatch):
    begin(spark, tmp_path, OLD, 0).write(batch_of(spark, '{"a": 1}'), 0, "test")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.streaming.start.set_properties", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begin(spark, tmp_path, NEW, 1)
    begin(spark, tmp_path, NEW, 1).write(batch_of(spark, '{"a": 2, "b": 3}'), 1, "test")
    rows = spark.read.format("delta").load(str(tmp_path / "bronze")).select("a", "b").orderBy("a").collect()
    assert [tuple(row) for row in rows] == [(1, None), (2, 3)]


def test_a_batch_that_is_half_written_by_one_contract_is_not_finished_by_another(spark, tmp_path):
    begin(spark, tmp_path, OLD, 0).write(batch_of(spark, '{"a": 1}'), 0, "test")
    begin(spark, tmp_path, OLD, 1).write(batch_of(spark, '{"a": 2}'), 1, "test")
    with pytest.raises(PipelineError, match="was begun with a different contract .*. Run the stream once as before"):
        begin(spark, tmp_path, NEW, 1)
    begin(spark, tmp_path, OLD, 1).write(batch_of(spark, '{"a": 2}'), 1, "test")
    begin(spark, tmp_path, NEW, 2)


def test_a_field_that_is_dropped_stays_a_column_and_comes_back(spark, tmp_path):
    begin(spark, tmp_path, NEW, 0).write(batch_of(spark, '{"a": 1, "b": 1}'), 0, "test")
    begin(spark, tmp_path, OLD, 1).write(batch_of(spark, '{"a": 2, "b": 2}'), 1, "test")
    begin(spark, tmp_path, NEW, 2).write(batch_of(spark, '{"a": 3, "b": 3}'), 2, "test")
    rows = (
        spark.read.format("delta")
        .load(str(tmp_path / "bronze"))
        .select("a", "b", "_rescued_data")
        .orderBy("a")
        .collect()
    )
    assert [tuple(row) for row in rows] == [(1, 1, None), (2, None, '{"b":2}'), (3, 3, None)]


def test_a_field_of_another_type_is_refused_and_nothing_is_changed(spark, tmp_path):
    begin(spark, tmp_path, OLD, 0).write(batch_of(spark, '{"a": 1}'), 0, "test")
    with pytest.raises(PipelineError, match="The column a of .* is DOUBLE, but the contract says STRING. Name another"):
        begin(spark, tmp_path, Contract((Text("a"), Text("new"))), 1)
    assert "new" not in spark.read.format("delta").load(str(tmp_path / "bronze")).columns
    begin(spark, tmp_path, Contract((Number("a", required=False), Text("a2", required=False))), 1)


def test_a_column_whose_name_differs_in_capitals_alone_is_the_same_one(spark, tmp_path):
    begin(spark, tmp_path, OLD, 0).write(batch_of(spark, '{"a": 1}'), 0, "test")
    renamed = Contract((Number("A"),))
    begin(spark, tmp_path, renamed, 1).write(batch_of(spark, '{"A": 2}'), 1, "test")
    assert sorted(row.a for row in spark.read.format("delta").load(str(tmp_path / "bronze")).select("a").collect()) == [
        1,
        2,
    ]


# --- Real-world contracts


def test_the_contract_of_the_docs_can_be(spark, tmp_path):
    docs = (REPOSITORY / "docs" / "readings.md").read_text(encoding="utf-8")
    file = tmp_path / "docs.py"
    file.write_text(docs.split("```python\n")[1].split("```")[0], encoding="utf-8")
    contract = load_contract(str(file))
    contract.check(spark)
    rows = read(
        spark,
        contract,
        [
            b'{"ts": 1795176000000, "device": {"id": "a"}, "temperature": 151}',
            b'{"ts": 1795176000000, "device": {"id": "a"}, "rssi": 1.0}',
            b'{"ts": 0, "device": {"id": "a"}}',
        ],
    )
    assert [row.reject_reason for row in rows] == ["too_hot", "invalid_rssi", "too_old"]


# An uplink as described in https://www.thethingsindustries.com/docs/integrations/data-formats/, without the parts that
# a sensor does not need.
UPLINK = Contract(
    (
        Text("end_device_ids.device_id"),
        Text("end_device_ids.application_ids.application_id", column="application"),
        Timestamp("received_at", at_most_ahead="10 minutes"),
        Integer("uplink_message.f_port", column="port", required=False, bits=32),
        Integer("uplink_message.f_cnt", column="counter"),
        Number("uplink_message.decoded_payload.temperature", column="temperature"),
    ),
    {"too_cold": "temperature < -50"},
)


def uplink(temperature: object, **message: object) -> str:
    return json.dumps(
        {
            "end_device_ids": {
                "device_id": "dev1",
                "application_ids": {"application_id": "app1"},
                "dev_addr": "00BCB929",
            },
            "correlation_ids": ["as:up:01E0WZ"],
            "received_at": "2026-11-20T11:15:45.787121551Z",
            "uplink_message": {
                "f_port": 1,
                "f_cnt": 42,
                "decoded_payload": {"temperature": temperature, "luminosity": 0.64},
            }
            | message,
        }
    )


def test_an_uplink_of_the_things_stack_is_read_and_its_contract_may_grow(spark, tmp_path):
    sent = batch_of(
        spark, uplink(21.5), uplink(-70), uplink("cold"), uplink(3, f_cnt=None), uplink(4, decoded_payload="AQ==")
    )
    report = begin(spark, tmp_path, UPLINK, 0).write(sent, 0, "test")
    assert report.rows == {
        None: 1,
        "too_cold": 1,
        "invalid_uplink_message.decoded_payload.temperature": 2,
        "missing_uplink_message.f_cnt": 1,
    }
    assert report.unknown == ["correlation_ids", "end_device_ids.dev_addr", "uplink_message.decoded_payload.luminosity"]
    luminosity = Number("uplink_message.decoded_payload.luminosity", column="luminosity", required=False)
    begin(spark, tmp_path, Contract((*UPLINK.fields, luminosity), UPLINK.rules), 1).write(
        batch_of(spark, uplink(22)), 1, "test"
    )
    rows = (
        spark.read.format("delta")
        .load(str(tmp_path / "bronze"))
        .selectExpr(
            "end_device_ids_device_id",
            "application",
            "unix_micros(received_at)",
            "port",
            "counter",
            "temperature",
            "luminosity",
        )
        .orderBy("temperature")
    )
    same = ("dev1", "app1", 1795173345787121, 1, 42)
    assert [tuple(row) for row in rows.collect()] == [(*same, 21.5, None), (*same, 22.0, 0.64)]
    rejected = spark.read.format("delta").load(str(tmp_path / "bronze_quarantine"))
    assert sorted(row.raw.decode() for row in rejected.collect()) == sorted(
        [uplink(-70), uplink("cold"), uplink(3, f_cnt=None), uplink(4, decoded_payload="AQ==")]
    )


EXAMPLES = {  # how many records are accepted, why the others are not, and a row of the table
    "zigbee2mqtt": (
        4,
        ["invalid_last_seen", "missing_device.friendlyName", "percentage_out_of_range"],
        "device, unix_millis(last_seen), temperature, contact, linkquality",
        ("living room", 1763625600123, 21.43, None, 120),
    ),
    "tasmota": (
        6,
        ["invalid_Time", "malformed_json", "no_clock", "wrong_unit"],
        "mqtt_topic, string(event_time), is_on, temperature",
        ("tele/greenhouse/SENSOR", "2025-10-26 00:30:00", None, 9.1),
    ),
    "shelly": (
        5,
        ["invalid_params.switch:0.apower", "missing_method", "missing_params.ts", "no_status", "out_of_range"],
        "device, string(event_time), is_on, power, temperature",
        ("shellyplus1pm-a8032ab1c2d4", "2025-11-20 08:01:43", None, 0.0, 41.3),
    ),
    "things_stack": (
        5,
        [
            "invalid_received_at",
            "invalid_uplink_message.decoded_payload.temperature",
            "missing_uplink_message.decoded_payload.temperature",
        ]
        + ["missing_uplink_message.f_port", "out_of_range"],
        "device, application, string(event_time), port, counter, temperature, humidity, battery",
        ("cellar-2", "house", "2025-11-20 08:04:31.404518", 2, None, 12.5, 70.0, 3.58),
    ),
    "telegraf": (
        9,
        [
            "invalid_metrics[].fields.temperature",
            "malformed_json",
            "missing_metrics[]",
            "missing_metrics[]",
            "no_values",
        ]
        + ["out_of_range"],
        "host, sensor, string(event_time), measurement, temperature, humidity, battery, element",
        ("gw-barn", None, "2025-11-20 08:00:30", "climate", -3.4, None, None, 2),
    ),
    "senml": (
        9,
        ["invalid_[]", "invalid_[].v", "malformed_json", "missing_[]", "missing_[].t", "no_value", "unresolved"],
        "sensor, unit, string(event_time), value, is_on, text, element",
        ("urn:dev:mac:0024befffe804ff1:door", None, "2025-11-20 08:00:11", None, True, None, 0),
    ),
    "chirpstack": (
        5,
        ["invalid_object.temperature", "missing_deviceInfo.devEui", "no_clock", "no_values", "out_of_range"],
        "device, name, application, string(event_time), counter, port, temperature, moisture",
        ("0101010101010100", "field 1", "soil", "2025-11-20 08:04:15", 4, 1, 8.1, 29.9),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_reads_its_sample_from_files_and_from_kafka(spark, broker, silver, tmp_path, run_here, name):
    count, reasons, columns, row = EXAMPLES[name]
    topic, kafka = silver
    folder = REPOSITORY / "examples" / name
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    with KafkaProducer(bootstrap_servers=broker) as producer:
        for record in (folder / "sample.jsonl").read_bytes().splitlines():
            producer.send(topic[3], record, key=b"tele/greenhouse/SENSOR")
    files = ["--input", folder, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "bronze_checkpoint"]
    for script, options in ((BRONZE, files), (CONSUMER, kafka)):
        run = run_here(script, *options, "--readings", f"{folder}.py", "--once")
        if name == "tasmota" and script == BRONZE:
            assert run.returncode == 1 and "the field @key is the key of a Kafka message" in run.stderr
            continue
        assert run.returncode == 0, run.stderr
        accepted, rejected = tables(spark, options)
        assert sorted(found.reject_reason for found in rejected.collect()) == reasons
        rows = [tuple(found) for found in accepted.selectExpr(*columns.split(", ")).collect()]
        assert len(rows) == count and row in rows
