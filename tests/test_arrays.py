"""Records with an array of readings: each element is a row or is listed in the quarantine, exactly once, from files and from Kafka."""

import json
import random
import time
from collections import Counter
from pathlib import Path

from pipeline.contract.contract import INCONSISTENT, Contract, load_contract
from pipeline.contract.fields import Boolean, Integer, Number, Text
from pipeline.contract.judge import parse
from pipeline.contract.strict import MAX_ELEMENTS
from pipeline.contract.times import Timestamp
from pipeline.delta.tables import silver_tables
from pipeline.kafka.source import KafkaSource
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.start import Start
from pipeline.streaming.writer import TableWriter

import pytest
from pyspark.sql import functions as F

from helpers import oracle
from helpers.files import put
from helpers.records import ARRIVAL, ARRIVAL_MICROS, mutate
from helpers.streams import GivenRecords
from helpers.topics import tables, world_of

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"
GATEWAY = """
from pipeline.contract import Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("gateway"),
        Timestamp("readings[].ts", column="event_time", format="epoch_s", at_most_ahead="1 day"),
        Text("readings[].id", column="device_id"),
        Number("readings[].t", column="temperature"),
    ),
    rules={"too_hot": "temperature > 60"},
)
"""
CONTRACTS = {
    "readings[]": Contract(
        (
            Text("gateway"),
            Timestamp("readings[].ts", format="epoch_s", at_most_ahead="1 day"),
            Text("readings[].id"),
            Number("readings[].t", quoted=True, required=False),
        )
    ),
    "[]": Contract((Text("[].n"), Number("[].v", required=False), Boolean("[].vb", true=("ON",), false=("OFF",)))),
    "deep": Contract(
        (
            Integer("a.x", required=False),
            Timestamp("time", format="iso8601", zone="Europe/Berlin"),
            Number("a.b.list[].value.now"),
            Integer("a.b.list[].value.count", bits=32, required=False),
            Text("a.b.list[].unit", required=False),
        )
    ),
}
ODD = [
    None,
    "",
    " ",
    "x",
    7,
    1e999,
    -0.0,
    True,
    [],
    [1],
    {},
    {"a": 1},
    "21.5",
    "ON",
    1763632800,
    "2026-11-20T10:00:00",
    2**63,
]


def message(rng: random.Random, name: str) -> bytes:
    """A record for the contract, with some odd values, elements and fields."""

    def value(usual):
        return rng.choice(ODD) if rng.random() < 0.04 else usual

    def element() -> object:
        if rng.random() < 0.04:
            return rng.choice(ODD)
        fields = {
            "readings[]": {
                "ts": value(1763632800 + rng.random()),
                "id": value(f"é{rng.randrange(9)}"),
                "t": value(rng.random()),
            },
            "[]": {"n": value("temperature"), "v": value(rng.randrange(99)), "vb": value(rng.choice(["ON", "OFF"]))},
            "deep": {"value": value({"now": value(2.5), "count": value(rng.randrange(9))}), "unit": value("°C")},
        }[name]
        for odd in list(fields):
            if rng.random() < 0.03:
                del fields[odd]
        return fields | ({"extra": rng.choice(ODD)} if rng.random() < 0.1 else {})

    elements = value([element() for _ in range(rng.choice([0, 1, 1, 2, 3, 20]))])
    record = {
        "readings[]": {"gateway": value("g1"), "readings": elements},
        "[]": elements,
        "deep": {
            "time": value("2026-11-20 08:00"),
            "a": value({"x": value(3), "b": value({"list": elements, "more": value(1)})}),
        },
    }[name]
    if isinstance(record, dict) and rng.random() < 0.2:
        record["fw"] = rng.choice(ODD)
    raw = json.dumps(record, ensure_ascii=rng.random() < 0.3).replace("Infinity", "1e999").encode()
    return mutate(raw, rng) if rng.random() < 0.1 else raw


def judge(spark, contract: Contract, raws: list) -> dict[int, list]:
    """The rows of each record, by its number, in the order of its elements."""
    records = spark.createDataFrame(list(enumerate(raws)), "number INT, raw BINARY").repartition(2)
    times = {field.column: F.unix_micros(field.column) for field in contract.fields if isinstance(field, Timestamp)}
    judged = parse(records.withColumn("ingest_time", F.lit(ARRIVAL).cast("timestamp")), contract).withColumns(times)
    found: dict[int, list] = {number: [] for number in range(len(raws))}
    for row in judged.orderBy("number", "element").collect():
        found[row.number].append(row)
    return found


@pytest.mark.parametrize("name", CONTRACTS)
def test_elements_are_read_as_plain_python_reads_them(spark, name):
    contract, rng = CONTRACTS[name], random.Random(7)
    raws = [message(rng, name) for _ in range(4000)] + [None, b"", b" ", b"[]", b"{}", b"null", b"7", b'"x"', b"[[]]"]
    raws += [b'[{"n":"a"}],"x":1', b'[{"n":"a"}],"[]":[{"n":"a"}]', b'[1]},{"[]":[2]', b"[7]x", b'{"readings":[{}]']
    raws += [b'\x00\x00\x00\x00\x01[{"n":"a","vb":"ON"}]', b'\xef\xbb\xbf[{"n":"a","vb":"ON"}]', b'[{"n":"\\ud800"}]']
    verdicts: Counter = Counter()
    for number, rows in judge(spark, contract, raws).items():
        raw, wanted = raws[number], oracle.read_readings(contract, raws[number], ARRIVAL_MICROS)
        assert [(row.element, row.reject_reason) for row in rows] == [row[:2] for row in wanted], raw
        assert rows[0].raw == raw and not any(row.raw for row in rows[1:])
        for row, (_, reason, values, rest) in zip(rows, wanted):
            assert reason or repr({column: row[column] for column in contract.columns}) == repr(values), raw
            assert reason or json.loads(row["_rescued_data"] or "{}") == rest, raw
            verdicts[row.element is None, reason is None] += 1
    assert all(verdicts[kind] > 300 for kind in ((True, False), (False, True), (False, False))), verdicts


@pytest.fixture
def gateway(tmp_path) -> Path:
    file = tmp_path / "gateway.py"
    file.write_text(GATEWAY)
    return file


def gateway_message(number: int, size: int, broken: dict[int, dict] | None = None) -> bytes:
    readings = [{"ts": 1763632800 + number, "id": f"{number}-{each}", "t": 20.5} for each in range(size)]
    for position, change in (broken or {}).items():
        readings[position] |= change
    return json.dumps({"gateway": "g1", "fw": 3, "readings": readings}).encode()


MESSAGES = [
    gateway_message(0, 3),
    gateway_message(1, 5, {1: {"t": "x"}, 2: {"t": 99}, 4: {"t": 98}}),
    gateway_message(2, 0),
    b"{broken",
    gateway_message(3, 2, {0: {"id": ""}, 1: {"id": None}}),
    gateway_message(4, 1000, {500: {"t": None}}),
    gateway_message(4, 1000, {500: {"t": None}}),  # once more
    gateway_message(5, 1, {0: {"more": {"a": 1}}}),
]


def expected(raws: list[bytes], readings: Path) -> tuple[Counter, Counter]:
    """The rows of the table (device, element) and of the quarantine (reason, raw, elements) for these messages."""
    contract = load_contract(str(readings))
    table: Counter = Counter()
    quarantine: Counter = Counter()
    for raw in raws:
        rejected: dict[str, list] = {}
        for element, reason, values, _ in oracle.read_readings(contract, raw, ARRIVAL_MICROS):
            reason = reason or ("too_hot" if values["temperature"] > 60 else None)
            if reason:
                rejected.setdefault(reason, []).append(element)
            else:
                table[values["device_id"], element] += 1
        for reason, elements in rejected.items():
            quarantine[reason, raw, None if elements == [None] else tuple(elements)] += 1
    return table, quarantine


def found(accepted, rejected) -> tuple[Counter, Counter]:
    table = Counter((row.device_id, row.element) for row in accepted.collect())
    quarantine = Counter(
        (row.reject_reason, bytes(row.raw), row.elements and tuple(row.elements)) for row in rejected.collect()
    )
    return table, quarantine


def test_elements_from_kafka_are_rows_or_are_listed_in_the_quarantine(spark, silver, gateway, run_here):
    _, options = silver
    there = world_of(spark, options)
    there.make(partitions=2)
    for number, raw in enumerate(MESSAGES):
        there.send(raw, partition=number % 2)

    run = run_here(CONSUMER, *options, "--readings", gateway, "--once")

    assert (run.returncode, run.stderr) == (0, "")
    table, quarantine = expected(MESSAGES, gateway)
    rejected = sum(len(elements or [0]) * rows for (_, _, elements), rows in quarantine.items())
    assert f"{table.total() + rejected:,} rows in, {table.total():,} accepted, {rejected} rejected (" in run.stdout
    assert "too_hot 2" in run.stdout and "0 messages behind" in run.stdout
    accepted, quarantined = tables(spark, options)
    assert found(accepted, quarantined) == (table, quarantine)
    # The message itself, and its fields outside of the contract, are in the first row only.
    of_first = accepted.where("element = 0").select("raw_json", "_rescued_data").collect()
    assert {row.raw_json.encode() for row in of_first} < {*MESSAGES}
    assert all(json.loads(row["_rescued_data"])["fw"] == 3 for row in of_first)
    assert accepted.where("element > 0 AND (raw_json IS NOT NULL OR _rescued_data IS NOT NULL)").count() == 0
    again = run_here(CONSUMER, *options, "--readings", gateway, "--once")
    assert (again.returncode, again.stderr) == (0, "") and found(*tables(spark, options)) == (table, quarantine)


@pytest.mark.parametrize("form", ["lines", "multiline"])
def test_elements_from_files_are_rows_or_are_listed_in_the_quarantine(spark, tmp_path, gateway, run_here, form):
    (tmp_path / "input").mkdir()
    messages = [raw for raw in MESSAGES if raw != b"{broken"]
    if form == "lines":
        put(tmp_path / "input", "a.json", *messages)
    else:
        put(tmp_path / "input", "a.json", b"[" + b",\n".join(messages) + b"]")
    options = ["--input", tmp_path / "input", "--table", tmp_path / "bronze", "--once"]
    options += ["--multiline"] if form == "multiline" else []

    run = run_here(BRONZE, *options, "--readings", gateway)

    assert (run.returncode, run.stderr) == (0, "")
    read = (spark.read.format("delta").load(str(tmp_path / name)) for name in ("bronze", "bronze_quarantine"))
    assert found(*read) == expected(messages, gateway)


def test_a_file_that_is_an_array_is_for_multiline_or_for_a_contract_with_brackets(spark, tmp_path, run_here):
    (tmp_path / "input").mkdir()
    (tmp_path / "top.py").write_text(
        'from pipeline.contract import Contract, Number\nCONTRACT = Contract((Number("[].t"),))\n'
    )
    put(tmp_path / "input", "a.json", b'[{"t":1},{"t":2}]', b'[{"t":3}]')
    options = ["--input", tmp_path / "input", "--table", tmp_path / "t", "--readings", tmp_path / "top.py", "--once"]

    refused = run_here(BRONZE, *options, "--multiline")
    run = run_here(BRONZE, *options)

    assert (refused.returncode, run.returncode, run.stderr) == (1, 0, "")
    assert "each element of a file's array is a record already; write t instead of [].t." in refused.stderr
    rows = spark.read.format("delta").load(str(tmp_path / "t")).select("t", "element").collect()
    assert sorted(map(tuple, rows)) == [(1, 0), (2, 1), (3, 0)]


def test_a_hundred_thousand_elements_and_too_many(spark, tmp_path, gateway, run_here):
    (tmp_path / "input").mkdir()
    short = [b'{"ts":1,"id":"%d","t":%d}' % (number, 61 if number % 2 else 7) for number in range(100_000)]
    large = b'{"gateway":"g","readings":[' + b",".join(short) + b"]}"
    many = b'{"gateway":"g","readings":[' + b",".join([b"{}"] * (MAX_ELEMENTS + 1)) + b"]}"
    wide = b'{"gateway":"%s","readings":[' % (b"g" * 1_000_000) + b",".join([b"{}"] * 1001) + b"]}"
    put(tmp_path / "input", "a.json", large, many, wide)
    began = time.monotonic()

    run = run_here(BRONZE, "--input", tmp_path / "input", "--table", tmp_path / "t", "--readings", gateway, "--once")

    assert (run.returncode, run.stderr) == (0, ""), time.monotonic() - began
    accepted, rejected = (spark.read.format("delta").load(str(tmp_path / name)) for name in ("t", "t_quarantine"))
    assert [row[0] for row in accepted.orderBy("element").select("element").collect()] == list(range(0, 100_000, 2))
    hot, *oversized = sorted(rejected.collect(), key=lambda row: row.reject_reason, reverse=True)
    assert (hot.reject_reason, hot.elements, bytes(hot.raw)) == ("too_hot", list(range(1, 100_000, 2)), large)
    assert [row.reject_reason for row in oversized] == ["oversized_record"] * 2
    assert {bytes(row.raw) for row in oversized} == {many, wide}
    files = sum(file.stat().st_size for file in tmp_path.glob("t*/*.parquet"))
    assert files < 2 * (len(large) + len(many) + len(wide))  # the messages are not repeated in each row


def test_a_contract_that_gains_an_array_goes_on_with_its_tables(spark, tmp_path, gateway, run_here):
    (tmp_path / "input").mkdir()
    (tmp_path / "flat.py").write_text(GATEWAY.replace("readings[].", "").replace('"ts"', '"ts", required=False'))
    options = ["--input", tmp_path / "input", "--table", tmp_path / "t", "--once"]
    put(tmp_path / "input", "a.json", b'{"gateway":"g","id":"old","t":1}', b'{"gateway":"g","id":"old"}')
    assert run_here(BRONZE, *options, "--readings", tmp_path / "flat.py").returncode == 0
    put(tmp_path / "input", "b.json", *MESSAGES[:2])

    run = run_here(BRONZE, *options, "--readings", gateway)

    assert (run.returncode, run.stderr) == (0, "") and "New columns in" in run.stdout
    accepted, rejected = (spark.read.format("delta").load(str(tmp_path / name)) for name in ("t", "t_quarantine"))
    table, quarantine = expected(MESSAGES[:2], gateway)
    assert found(accepted, rejected) == (
        table + Counter({("old", None): 1}),
        quarantine + Counter({("missing_t", b'{"gateway":"g","id":"old"}', None): 1}),
    )


def coins(spark, tmp_path):
    """Tables, their writer, and 40 messages of seven elements and a broken one. As in tests/faults/test_power_cuts.py, a rule reads the
    clock, had it not been refused at the start, so that each read of the batch has other verdicts.
    """

    class Given(GivenRecords):
        topic = "the topic"
        rejected_otherwise, knows_records = KafkaSource.rejected_otherwise, True

    contract = Contract((Text("g"), Number("r[].v")), {"coin": "xxhash64(v, CAST('now' AS TIMESTAMP)) % 2 = 0"})
    pair = silver_tables(str(tmp_path / "silver"), contract.columns, has_elements=True)
    writer = TableWriter(pair, contract, Given(), Start(Checkpoint(spark, str(tmp_path / "checkpoint")), {}, {}))
    messages = [json.dumps({"g": "g", "r": [{"v": 10 * offset + each} for each in range(7)]}) for offset in range(40)]
    rows = [(text.encode(), text, "topic", 0, offset, offset, b"key") for offset, text in enumerate([*messages, "{"])]
    records = spark.createDataFrame(
        rows, "raw BINARY, raw_json STRING, topic STRING, partition INT, offset BIGINT, time BIGINT, kafka_key BINARY"
    ).selectExpr("*", "timestamp_seconds(time) AS kafka_timestamp", "timestamp_seconds(1795000000) AS ingest_time")
    return pair, writer, records


def test_a_message_that_no_longer_fits_is_listed_though_some_of_its_elements_are_rows(spark, tmp_path, monkeypatch):
    """Its other elements were not in the quarantine yet when the batch was read again."""
    pair, writer, records = coins(spark, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TableWriter, "_quarantine_rejected", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            writer.write(records, 0, "test")
    lost = {name: f"IF(offset < 5, NULL, {name}) AS {name}" for name in ("raw", "raw_json", "kafka_timestamp")}
    given = "IF(offset < 5, 'oversized_record', NULL) AS reject_reason"
    writer.write(records.selectExpr(given, *(lost.get(name, name) for name in records.columns)), 0, "test")
    rejected = spark.read.format("delta").load(pair.quarantine).collect()
    whole = sorted(row.offset for row in rejected if row.reject_reason == "oversized_record")
    assert whole == [0, 1, 2, 3, 4] and all(row.elements is None for row in rejected if row.offset < 5)


@pytest.mark.parametrize("crash", [False, True])
def test_a_verdict_that_changes_loses_no_element_and_doubles_none(spark, tmp_path, monkeypatch, crash):
    pair, writer, records = coins(spark, tmp_path)
    messages = [row.raw_json for row in records.orderBy("offset").collect()]
    if crash:
        with monkeypatch.context() as patch:
            patch.setattr(TableWriter, "_quarantine_rejected", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                writer.write(records, 0, "test")
    writer.write(records, 0, "test")
    accepted, rejected = (spark.read.format("delta").load(table).collect() for table in (pair.table, pair.quarantine))
    there = [(row.offset, row.element) for row in accepted]
    there += [(row.offset, element) for row in rejected for element in row.elements or [None]]
    assert sorted(there, key=repr) == sorted([*((o, e) for o in range(40) for e in range(7)), (40, None)], key=repr)
    assert 80 < len(accepted) < 200 and {row.reject_reason for row in rejected} == {
        "coin",
        INCONSISTENT,
        "malformed_json",
    }
    assert all(bytes(row.raw).decode() == messages[row.offset] for row in rejected)
