"""Replaying a quarantine: rejected rejected records that the contract now accepts move to the table, exactly once, whatever is killed."""

import itertools
import json
from collections import Counter
from pathlib import Path

from pipeline.contract.contract import Contract
from pipeline.contract.fields import ContractError, Integer, Number, Text
from pipeline.contract.times import Timestamp
from pipeline.delta import duplicates
from pipeline.delta import replay as replaying
from pipeline.delta.commits import REPLAY
from pipeline.delta.replay import Replay
from pipeline.delta.tables import bronze_tables
from pipeline.paths import quarantine_of
from pipeline.streaming.writer import TableWriter

import pytest
from pyspark.sql import functions as F

from helpers.records import reading
from helpers.streams import bronze_writer
from readings import CONTRACT

SCRIPT = "replay_quarantine.py"
WIDER = """
from dataclasses import replace
from readings import CONTRACT as OLD

CONTRACT = replace(OLD, rules=OLD.rules | {"unknown_type": "type = 'nonsense'", "wrong_unit": "false", "out_of_range": "value > 900"})
"""


def batch_of(spark, *records: bytes, second: int = 0):
    return spark.createDataFrame([(record,) for record in records], "raw BINARY").select(
        "raw",
        F.lit("file").alias("source_file"),
        F.lit(f"2026-11-20T08:00:{second:02}Z").cast("timestamp").alias("ingest_time"),
    )


def contents(spark, table) -> tuple[Counter, Counter]:
    """The devices in the table, and the reasons and records in the quarantine."""
    accepted = spark.read.format("delta").load(str(table)).collect()
    rejected = spark.read.format("delta").load(quarantine_of(str(table))).collect()
    return (
        Counter((row.device_id, row.source_file, str(row.ingest_time)) for row in accepted),
        Counter((row.reject_reason, bytes(row.raw)) for row in rejected),
    )


@pytest.fixture
def wider(tmp_path):
    path = tmp_path / "wider.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n{WIDER}")
    return path


@pytest.fixture
def bronze(spark, tmp_path):
    table = tmp_path / "bronze"
    writer = bronze_writer(spark, table)
    noise = reading(type="noise", device_id="new")
    writer.write(batch_of(spark, reading(), noise, noise, b"{", reading(value=500, device_id="hot")), 0, "stream")
    writer.write(batch_of(spark, noise, reading(value=999, device_id="sun"), second=1), 1, "stream")
    return table


def test_valid_records_move_with_their_origin_and_the_others_get_their_new_reason(spark, bronze, wider, run_here):
    before = contents(spark, bronze)
    preview = run_here(SCRIPT, bronze, "--readings", wider, "--dry-run")
    assert "4 of 6 rejected readings would move" in preview.stdout, preview
    assert contents(spark, bronze) == before
    done = run_here(SCRIPT, bronze, "--readings", wider)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 6 rejected readings moved" in done.stdout
    accepted, rejected = contents(spark, bronze)
    first, second = "2026-11-20 08:00:00", "2026-11-20 08:00:01"
    assert accepted == before[0] + Counter(
        {("new", "file", first): 2, ("hot", "file", first): 1, ("new", "file", second): 1}
    )
    assert rejected == Counter({("malformed_json", b"{"): 1, ("out_of_range", reading(value=999, device_id="sun")): 1})
    again = run_here(SCRIPT, bronze, "--readings", wider)
    assert "0 of 2 rejected readings moved" in again.stdout and contents(spark, bronze) == (accepted, rejected)


class Killed(BaseException):
    pass


STEPS = ["marked", "verdicts", "appended", "deleted"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("contract", ["another", pytest.param("as before", marks=pytest.mark.long)])
def test_a_replay_that_is_killed_after_any_commit_is_finished_by_the_next(spark, bronze, monkeypatch, step, contract):
    """The next one may have another contract: it must not judge rows again that are already in the table."""
    new = CONTRACT.rules | {"unknown_type": "type = 'nonsense'", "wrong_unit": "false", "out_of_range": "value > 900"}
    wider = Contract(CONTRACT.fields, new)
    calls = []

    def sync_and_die(self, table):
        calls.append(table)
        sync(self, table)
        if len(calls) == STEPS.index(step) + 3:  # the first two are those of `prepare`
            raise Killed

    sync = Replay._sync
    before = contents(spark, bronze)

    def replay(contract) -> None:
        tables = bronze_writer(spark, bronze, contract).tables
        with replaying.replaying(spark):
            mover = Replay(spark, tables, contract, "true")
            mover.prepare()
            for part in mover.parts():
                mover.move(part)

    monkeypatch.setattr(Replay, "_sync", sync_and_die)
    with pytest.raises(Killed):
        replay(wider)
    monkeypatch.undo()
    killed = contents(spark, bronze)
    assert killed != before and sum(killed[0].values()) == (5 if step in STEPS[2:] else 1)
    replay(wider if contract == "as before" else CONTRACT)
    accepted, rejected = contents(spark, bronze)
    assert accepted.total() + rejected.total() == 7
    moved = 5 if contract == "as before" or step in STEPS[2:] else 1
    assert accepted.total() == moved and all(not reason.startswith("replay") for reason, _ in rejected)
    assert rejected == before[1] or moved == 5 and rejected.total() == 2


READINGS = Contract(
    (Text("gateway"), Text("readings[].id", column="device_id"), Number("readings[].t")),
    {"hot": "t > 60", "cold": "t < -40"},
)
LOOSER = Contract(READINGS.fields, {"hot": "t > 90", "cold": "t < -40"})


def message(*temperatures: float, gateway: str | None = "g", **more) -> bytes:
    elements = [{"id": f"d{number}", "t": t} for number, t in enumerate(temperatures)]
    return json.dumps({"gateway": gateway, "readings": elements} | more).encode()


def array_writer(spark, table, contract):
    writer = bronze_writer(spark, table, contract)
    writer.tables = bronze_tables(str(table), contract.columns, None, bool(contract.array))
    return writer


def move_all(spark, tables, contract, selected="true") -> Counter:
    verdicts = Counter()
    with replaying.replaying(spark):
        replay = Replay(spark, tables, contract, selected)
        replay.prepare()
        for part in replay.parts():
            verdicts += replay.move(part)
    return verdicts


def elements(spark, table) -> tuple[Counter, Counter]:
    accepted = spark.read.format("delta").load(str(table)).collect()
    rejected = spark.read.format("delta").load(quarantine_of(str(table))).collect()
    return (
        Counter((row.gateway, row.device_id, row.element, row.t) for row in accepted),
        Counter((row.reject_reason, bytes(row.raw), tuple(row.elements) if row.elements else None) for row in rejected),
    )


def test_only_the_rejected_readings_of_a_message_move(spark, tmp_path):
    table = tmp_path / "bronze"
    writer = array_writer(spark, table, READINGS)
    mixed, all_hot, nameless = message(20, 70, 95, -50, 80), message(61, 62), message(1, 2, gateway=None)
    first_hot = message(70, 20, fw="1.2")
    writer.write(batch_of(spark, mixed, all_hot, all_hot, nameless, first_hot, b"[]"), 0, "stream")
    accepted, rejected = elements(spark, table)
    assert rejected[("hot", mixed, (1, 2, 4))] == 1 and rejected[("hot", all_hot, (0, 1))] == 2
    verdicts = move_all(spark, array_writer(spark, table, LOOSER).tables, LOOSER)
    assert verdicts == {
        ("hot", None): 7,
        ("hot", "hot"): 1,
        ("cold", "cold"): 1,
        ("missing_gateway", "missing_gateway"): 1,
        ("malformed_json", "malformed_json"): 1,
    }
    moved = Counter({("g", "d1", 1, 70.0): 1, ("g", "d4", 4, 80.0): 1, ("g", "d0", 0, 70.0): 1})
    moved += Counter({("g", "d0", 0, 61.0): 2, ("g", "d1", 1, 62.0): 2})
    now = elements(spark, table)
    assert now[0] == accepted + moved
    assert now[1] == Counter(
        [
            ("hot", mixed, (2,)),
            ("cold", mixed, (3,)),
            ("missing_gateway", nameless, None),
            ("malformed_json", b"[]", None),
        ]
    )
    [row] = spark.read.format("delta").load(str(table)).where("_rescued_data IS NOT NULL").collect()
    assert (row.element, row["_rescued_data"]) == (0, '{"fw":"1.2"}')


def test_a_contract_with_another_array_loses_no_listed_reading(spark, tmp_path):
    table = tmp_path / "bronze"
    both = message(20, 70, 80, other=[{"id": "x", "t": 1}, {"id": "y", "t": 2}])
    array_writer(spark, table, READINGS).write(batch_of(spark, both), 0, "stream")
    other = Contract((Text("gateway"), Text("other[].id", column="device_id"), Number("other[].t")))
    move_all(spark, array_writer(spark, table, other).tables, other)
    accepted, rejected = elements(spark, table)
    assert ("g", "y", 1, 2.0) in accepted and rejected == Counter([("hot", both, (2,))])
    nothing = Contract((Text("gateway"), Text("none[].id", column="device_id"), Number("none[].t")))
    move_all(spark, array_writer(spark, table, nothing).tables, nothing)
    assert elements(spark, table)[1] == Counter([("missing_none[]", both, (2,))])
    flat = Contract((Text("gateway"), Text("device_id", required=False), Number("t", required=False)))
    move_all(spark, array_writer(spark, table, flat).tables, flat)
    assert elements(spark, table)[1] == Counter([("missing_none[]", both, (2,))])


def test_messages_from_before_a_contract_had_an_array_are_read_with_it(spark, tmp_path):
    table = tmp_path / "bronze"
    flat = Contract((Text("gateway"), Text("device_id"), Number("t")))
    old = message(20, 70, 95)
    array_writer(spark, table, flat).write(batch_of(spark, old, old), 0, "stream")
    move_all(spark, array_writer(spark, table, LOOSER).tables, LOOSER)
    accepted, rejected = elements(spark, table)
    assert accepted == Counter({("g", "d0", 0, 20.0): 2, ("g", "d1", 1, 70.0): 2})
    assert rejected == Counter({("hot", old, (2,)): 2})


def test_a_large_quarantine_moves_in_parts(spark, tmp_path, monkeypatch):
    table, contract = tmp_path / "bronze", Contract((Number("value"),), {"high": "value > 0"})
    writer = bronze_writer(spark, table, contract)
    records = [b'{"value":%d}' % number for number in range(1, 101)]
    for second in range(4):
        writer.write(batch_of(spark, *records[: 10 + 30 * second], second=second), second, "stream")
    monkeypatch.setattr(replaying, "MAX_PART_ROWS", 60)
    wider = Contract((Number("value"),), {"high": "value > 90"})
    with replaying.replaying(spark):
        replay = Replay(spark, writer.tables, wider, "true")
        replay.prepare()
        parts = replay.parts()
        assert len(parts) == 1 + 2 + 2
        assert sum((replay.move(part) for part in parts), Counter()) == {("high", None): 210, ("high", "high"): 10}
    rows = spark.read.format("delta").load(str(table)).groupBy("ingest_time").count().sort("ingest_time").collect()
    assert [row["count"] for row in rows] == [10, 40, 70, 90]


def keyed(spark, table, contract, first: int = 0):
    """Returns a writer, and a function that writes a batch and returns its row counts by verdict. The first batch is `first`."""
    writer, numbers = array_writer(spark, table, contract), itertools.count(first)

    def write(*records: bytes, number: int | None = None) -> dict:
        number = next(numbers) if number is None else number
        return writer.write(batch_of(spark, *records, second=number), number, "stream").rows

    return writer, write


KEYED = Contract(CONTRACT.fields, CONTRACT.rules, key=("device_id", "event_time"))


def test_a_reading_whose_key_is_in_the_table_or_earlier_in_the_batch_is_a_duplicate(spark, tmp_path):
    writer, write = keyed(spark, tmp_path / "bronze", KEYED)
    first, second, third = (reading(device_id=f"d{number}", timestamp="2026-11-20T08:00:00Z") for number in range(3))
    broken, other_value = (reading(device_id="d0", timestamp="2026-11-20T08:00:00Z", value=value) for value in (500, 3))
    later = reading(device_id="d0", timestamp="2026-11-20T07:00:00Z")
    assert write(broken, first, other_value, second) == {"out_of_range": 1, "duplicate": 1, None: 2}
    assert write(first, third, third) == {"duplicate": 2, None: 1}
    # The same instant in another zone is the same key.
    assert write(reading(device_id="d0", timestamp="2026-11-20T09:00:00+01:00"), later) == {"duplicate": 1, None: 1}
    assert write(later, number=3) == {"duplicate": 1}
    accepted, rejected = contents(spark, tmp_path / "bronze")
    assert Counter(device for device, *_ in accepted.elements()) == {"d0": 2, "d1": 1, "d2": 1}
    assert rejected[("duplicate", other_value)] == 1  # the first line of a file wins


@pytest.mark.parametrize(
    "deleted", [True, pytest.param(False, marks=pytest.mark.long)], ids=["rows deleted in between", ""]
)
def test_a_repeated_batch_is_not_a_duplicate_of_itself(spark, tmp_path, monkeypatch, deleted):
    """If rows of the table were deleted in between, the first verdicts count."""
    table = tmp_path / "bronze"
    writer, write = keyed(spark, table, KEYED)
    first, second = reading(device_id="d0"), reading(device_id="d1")
    write(first)
    append = TableWriter._append

    def die_before_the_quarantine(records, path, *rest):
        if path == writer.tables.quarantine:
            raise Killed
        append(writer, records, path, *rest)

    monkeypatch.setattr(writer, "_append", die_before_the_quarantine)
    with pytest.raises(Killed):
        write(first, second, second)
    monkeypatch.undo()
    if deleted:
        spark.sql(f"DELETE FROM delta.`{table}` WHERE device_id = 'd0'")
    assert write(first, second, second, number=1) == {"duplicate": 2, None: 1}
    accepted, rejected = contents(spark, table)
    assert accepted.total() == 2 - deleted and rejected == Counter([("duplicate", first), ("duplicate", second)])


@pytest.mark.parametrize(
    "key", [("value", "device_id"), pytest.param(("event_time",), marks=pytest.mark.long)], ids=str
)
def test_a_key_may_have_any_required_fields(spark, tmp_path, key):
    _, write = keyed(spark, tmp_path / "bronze", Contract(CONTRACT.fields, CONTRACT.rules, key=key))
    old = reading(timestamp="2016-11-20T08:00:00Z", device_id="d1", value=2)
    assert write(reading(value=0.0), reading(value=-0.0), old) == {"duplicate": 1, None: 2}
    assert write(old, reading(value=0), b"{") == {"duplicate": 2, "malformed_json": 1}


def test_readings_of_days_that_the_calendar_skipped_count_once(spark, tmp_path):
    """Delta's statistics can't tell where such times are."""
    contract = Contract((Text("id"), Timestamp("ts", column="t")), key=("id", "t"))
    _, write = keyed(spark, tmp_path / "bronze", contract)
    records = [b'{"id":"a","ts":"1582-10-%02dT00:00:00Z"}' % day for day in (4, 5, 10, 14, 15)]
    assert write(*records) == {None: 5}
    for record in records:
        assert write(record) == {"duplicate": 1}


def test_replays_of_readings_with_a_key_add_none_twice(spark, tmp_path):
    table = tmp_path / "bronze"
    _, write = keyed(spark, table, KEYED)
    noise = [reading(type="noise", device_id=f"n{number}") for number in range(3)]
    write(*noise, noise[0], reading(device_id="n2"))
    write(noise[1])
    wider = Contract(CONTRACT.fields, {"wrong_unit": "unit = 'K'"}, key=KEYED.key)
    assert move_all(spark, bronze_writer(spark, table, wider).tables, wider) == {
        ("unknown_type", None): 2,
        ("unknown_type", "duplicate"): 3,
    }
    accepted, rejected = contents(spark, table)
    assert Counter(device for device, *_ in accepted.elements()) == {"n0": 1, "n1": 1, "n2": 1}
    assert {reason for reason, _ in rejected} == {"duplicate"} and rejected.total() == 3


@pytest.mark.parametrize(
    "key, problem",
    [
        ("device_id", r'must be a tuple, such as \("device_id",\)'),
        (("floor",), "floor, which is not the column of a required field; choose from event_time, device_id"),
        (("timestamp",), "has timestamp, which is not the column"),
    ],
)
def test_an_invalid_key_is_refused(key, problem):
    with pytest.raises(ContractError, match=problem):
        Contract(CONTRACT.fields, {}, key=key)


def test_a_contract_without_a_key_may_have_a_rule_named_duplicate():
    assert Contract(CONTRACT.fields, {"duplicate": "false"}).reasons[-1] == "duplicate"
    with pytest.raises(ContractError, match="the rule duplicate has the name of an existing reason"):
        Contract(CONTRACT.fields, {"duplicate": "false"}, key=("device_id",))


def test_a_killed_replay_cannot_append_its_rows_afterwards(spark, bronze, monkeypatch):
    """Spark may keep running for a moment after its script is killed."""
    wider = Contract(CONTRACT.fields, {"hot": "value > 900"})
    tables = bronze_writer(spark, bronze, wider).tables
    before = contents(spark, bronze)

    calls = []

    def die(self, table):
        calls.append(table)
        if len(calls) == 2:  # before the append
            raise Killed

    with replaying.replaying(spark):
        replay = Replay(spark, tables, wider, "true")
        replay.prepare()
        [part] = replay.parts()
        monkeypatch.setattr(Replay, "_sync", die)
        with pytest.raises(Killed):
            replay.move(part)
        monkeypatch.undo()
        Replay(spark, tables, wider, "true").prepare()
    undone = contents(spark, bronze)
    assert undone[0] == before[0] and undone[1].total() == 6
    late = spark.read.format("delta").load(str(bronze)).write.format("delta").mode("append")
    late.options(txnAppId=REPLAY, txnVersion=0).save(str(bronze))
    assert contents(spark, bronze) == undone
    assert move_all(spark, tables, wider).total() == 6


def test_a_replay_refuses_tables_that_lack_part_of_the_last_batch(spark, bronze, wider, run_here):
    files = {path: path.read_bytes() for path in Path(bronze).glob("*.parquet")}
    for path in files:
        path.write_bytes(b"")
    refused = run_here(SCRIPT, bronze, "--readings", wider)
    assert refused.returncode == 1 and "incomplete, perhaps after a power cut" in refused.stderr
    for path, content in files.items():
        path.write_bytes(content)
    assert run_here(SCRIPT, bronze, "--readings", wider).returncode == 0


def test_an_accepted_reading_that_the_new_contract_would_reject_or_repeat_stays(spark, tmp_path):
    """It is in the table already, whatever its key is under the new contract."""
    table = tmp_path / "bronze"
    record = json.dumps(
        {
            "gateway": "g",
            "readings": [{"id": "a", "t": 1}, {"id": "b", "temp": 2, "n": 1}, {"id": "b", "temp": 2, "n": 1}],
        }
    ).encode()
    array_writer(spark, table, READINGS).write(batch_of(spark, record, record), 0, "stream")
    fields = Text("readings[].id", column="device_id"), Integer("readings[].n"), Number("readings[].temp", column="t")
    new = Contract((Text("gateway"), *fields), key=("device_id", "n"))
    assert move_all(spark, array_writer(spark, table, new).tables, new) == {
        ("missing_readings[].t", None): 1,
        ("missing_readings[].t", "duplicate"): 3,
    }
    accepted, rejected = elements(spark, table)
    assert accepted == Counter({("g", "a", 0, 1.0): 2, ("g", "b", 1, 2.0): 1})
    assert rejected == Counter([("duplicate", record, (2,)), ("duplicate", record, (1, 2))])


@pytest.mark.long
def test_long_keys_and_keys_with_many_repeats_need_little_memory(spark, tmp_path):
    contract = Contract((Text("id"), Number("value")), key=("id",))
    _, write = keyed(spark, tmp_path / "bronze", contract)
    long = [json.dumps({"id": "é" * 100_000 + str(number), "value": 1}).encode() for number in range(20)]
    assert write(*long, *long) == {None: 20, "duplicate": 20}
    assert write(*long, *[b'{"id":"x","value":1}'] * 3000) == {None: 1, "duplicate": 3019}


def test_a_batch_of_many_readings_has_the_same_duplicates(spark, tmp_path, monkeypatch):
    """Many keys take a different path through the code than a few."""
    monkeypatch.setattr(duplicates, "FEW_ROWS", 5)
    monkeypatch.setattr(duplicates, "MAX_BROADCAST_ROWS", 8)
    _, write = keyed(spark, tmp_path / "bronze", KEYED)
    records = [reading(device_id=f"d{number}") for number in range(20)]
    assert write(*records[:3], *records[:3]) == {None: 3, "duplicate": 3}
    assert write(*records, *records) == {None: 17, "duplicate": 23}
    assert write(*records) == {"duplicate": 20}
    assert contents(spark, tmp_path / "bronze")[1].total() == 46


@pytest.mark.parametrize("reason", ["replay 0: x", "replay 17: of a buffer"])
def test_a_rule_is_not_taken_for_the_mark_of_a_replay(reason):
    with pytest.raises(ContractError, match="begins like the reason of a record that is being replayed"):
        Contract(CONTRACT.fields, {reason: "false"})
    assert Contract(CONTRACT.fields, {"replay of a buffer": "false"})


def test_duplicates_stay_if_the_contract_has_no_key(spark, tmp_path):
    table = tmp_path / "bronze"
    _, write = keyed(spark, table, KEYED)
    write(reading(), reading(), reading(value=500, device_id="hot"))
    wider = Contract(CONTRACT.fields)
    assert move_all(spark, bronze_writer(spark, table, wider).tables, wider) == {("out_of_range", None): 1}
    assert contents(spark, table)[1] == Counter([("duplicate", reading())])
