"""check_readings.py: its report on a sample, and the contracts it drafts."""

import json

from pipeline.contract.contract import Contract, load_contract
from pipeline.contract.fields import Boolean, Integer, Number, Text
from pipeline.contract.times import Timestamp
from pipeline.sample.draft import draft_contract

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from helpers.processes import REPOSITORY, run_script
from helpers.records import reading
from helpers.topics import make_topic

CHECK, EXAMPLES = "check_readings.py", REPOSITORY / "examples"


def drafted(*records: object) -> Contract:
    """The contract drafted from these records, which are JSON or bytes."""
    raws = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    names: dict = {}
    exec(draft_contract(raws, "a sample"), names)
    return names["CONTRACT"]


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_a_draft_accepts_the_valid_records_of_each_example(run_here, tmp_path, name):
    sample = EXAMPLES / name / "sample.jsonl"
    run = run_here(CHECK, sample, "--draft")
    assert run.returncode == 0 and run.stderr == ""
    draft, valid = tmp_path / "draft.py", tmp_path / "valid.jsonl"
    draft.write_text(run.stdout, encoding="utf-8")
    contract = load_contract(f"{EXAMPLES / name}.py")
    own = {field.name for field in contract.json_fields}
    assert own <= {field.name for field in load_contract(str(draft)).fields}
    broken = {"tasmota": [5, 6, 7, 9], "zigbee2mqtt": range(4, 7)}.get(name, range(5, 10))
    lines = sample.read_text(encoding="utf-8").splitlines()
    valid.write_text(
        "".join(f"{line}\n" for number, line in enumerate(lines) if number not in broken), encoding="utf-8"
    )
    count, what = {"telegraf": (8, "readings"), "senml": (8, "readings")}.get(
        name, (len(lines) - len(broken), "records")
    )
    run = run_here(CHECK, valid, "--readings", draft)
    assert f"{count} {what}: {count} accepted, 0 rejected" in run.stdout, run.stdout


@pytest.mark.parametrize(
    "values, field",
    [
        ([1.5, 2], Number("x")),
        (["1.5", "2"], Number("x", quoted=True)),
        (["1.5", 2], Number("x", quoted=True)),
        (["007", "013"], Text("x")),
        ([2**60, 5], Integer("x")),
        ([True, False], Boolean("x")),
        (["ON", "OFF"], Boolean("x", true=("ON",), false=("OFF",))),
        (["closed", "closed"], Boolean("x", true=("open",), false=("closed",))),
        (["a", "b"], Text("x")),
        (["2026-11-20T08:00:00Z"] * 2, Timestamp("x", at_most_ahead="1 day")),
        (["2026-11-20 08:00+01"] * 2, Timestamp("x", format="iso8601", at_most_ahead="1 day")),
        (["2026-11-20T08:00"] * 2, Timestamp("x", format="iso8601", zone="Etc/UTC", at_most_ahead="1 day")),
        ([1763625600123] * 2, Timestamp("x", format="epoch_ms", at_most_ahead="1 day")),
        ([1763625600123456789] * 2, Timestamp("x", format="epoch_ns", at_most_ahead="1 day")),
        ([1763625600, 1763625601], Timestamp("x", format="epoch_s", at_most_ahead="1 day")),
        (["1763625600", "1763625601"], Timestamp("x", format="epoch_s", quoted=True, at_most_ahead="1 day")),
        ([1763625600, 5], Number("x")),
        ([1, None], Number("x", required=False)),
        ([1, ""], Number("x", required=False)),
        (["a", 7, "b"], Text("x")),
        (["1.5", 2, "3", "--"], Number("x", quoted=True)),
        (["ON", "OFF", "on"], Boolean("x", true=("on", "ON"), false=("off", "OFF"))),
    ],
)
def test_a_draft_finds_the_kind_of_a_field(values, field):
    assert drafted(*({"x": value} for value in values)).fields == (field,)


def test_a_draft_goes_by_names_where_values_do_not_tell():
    records = [
        {"ts": 1763625600, "contact": 1, "meter_id": "4711", "n": 0},
        {"ts": 1763625601.5, "contact": 0, "meter_id": "4712", "n": 1},
    ]
    assert drafted(*records).fields == (
        Timestamp("ts", format="epoch_s", at_most_ahead="1 day"),
        Boolean("contact", true=(1,), false=(0,)),
        Text("meter_id"),
        Number("n"),
    )


def test_a_draft_says_what_is_rare_and_puts_the_usual_time_first():
    records = [{"battery_mV": 3, "sent": 1763625600, "seen": 1763625600}, *[{"id": "a", "seen": 1763625600}] * 9]
    raws = [json.dumps(record).encode() for record in records]
    text = draft_contract(raws, "a sample", keys=[b"home/attic", *[None] * 9])
    assert '# Text("@key"),  # 1 of 10 messages have a key, such as "home/attic"' in text
    assert 'Text("id", required=False),  # 9 of 10 have it' in text
    assert 'Number("battery_mV", column="battery_mv", required=False),' in text and "battery_mv NOT BETWEEN" in text
    names: dict = {}
    exec(text, names)
    first, second = names["CONTRACT"].fields[:2]
    assert (first.name, first.at_most_ahead, second.name, second.at_most_ahead) == ("seen", "1 day", "sent", "")


def test_a_draft_takes_an_array_of_readings_for_rows():
    gateway = {"gateway": "g", "readings": [{"id": "a", "t": 1.5}, {"id": "b"}], "details": [{"x": 1}]}
    text = draft_contract([json.dumps(gateway).encode()] * 3, "a sample")
    names: dict = {}
    exec(text, names)
    assert names["CONTRACT"].fields == (
        Text("gateway"),
        Text("readings[].id"),
        Number("readings[].t", required=False),
    )
    assert '# details: an array of objects; kept in _rescued_data; "details[].…" would make each a row' in text


def test_the_report_counts_readings_and_quotes_the_element_that_is_wrong(tmp_path):
    """As a process, because a connection to Python that is left open prints a traceback at the end of it."""
    (tmp_path / "mine.py").write_text(
        "from pipeline.contract import *\nCONTRACT = Contract((Text('readings[].id'), Number('readings[].t')))\n"
    )
    rows = [{"id": "a", "t": 1}, {"id": "b", "t": "x"}, {"id": "c", "t": 3, "fw": 1}]
    (tmp_path / "sample.jsonl").write_text(json.dumps({"readings": rows}) + '\n{"readings":[]}\n')
    run = run_script(CHECK, tmp_path / "sample.jsonl", "--readings", tmp_path / "mine.py")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("4 readings: 2 accepted, 2 rejected\n")
    assert '"x" is not a number' in run.stdout and "_rescued_data: readings[].fw (1)" in run.stdout


def test_a_draft_leaves_out_what_no_field_can_be_and_says_so():
    record = {
        "a": [1],
        "b.c": 1,
        "": 2,
        "d": None,
        "e": {"f": 1, "größe (m)": 2},
        "raw": 3,
        "offset": {"e": 4},
        "class": 5,
        "1st": 6,
    }
    text = draft_contract([json.dumps(record).encode()] * 2, "a sample")
    for name in ("a: an array", "b.c: has a dot", "d: never has a value"):
        assert f"# {name}" in text
    names: dict = {}
    exec(text, names)
    assert [(field.name, field.column) for field in names["CONTRACT"].fields] == [
        ("e.f", "f"),
        ("e.größe (m)", "größe_m"),
        ("raw", "raw_2"),
        ("offset.e", "e"),
        ("class", "class"),
        ("1st", "_1st"),
    ]


def test_a_value_in_some_records_and_an_object_in_others():
    assert [field.name for field in drafted({"x": 1}, {"x": {"y": 2}}, {"x": {"y": 3}}).fields] == ["x.y"]


def test_a_sample_is_judged_and_nothing_is_written(run_here, tmp_path):
    sample = tmp_path / "sample.jsonl"
    sample.write_bytes(
        b"\n".join(
            [reading(), reading(value="21,5", note=1), reading(value=999), reading()[:-1], b'{"a":1}', reading(extra=2)]
        )
    )
    run = run_here(CHECK, sample)
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.startswith("6 records: 2 accepted, 4 rejected\n")
    for said in (
        '"21,5" is not a number',
        "malformed_json",
        "missing_timestamp",
        "out_of_range",
        "_rescued_data: extra (1)",
    ):
        assert said in run.stdout
    assert list(tmp_path.iterdir()) == [sample]


def test_the_newest_messages_of_a_topic_are_judged(run_here, broker):
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        make_topic(admin, "to_check", partitions=2)
    with KafkaProducer(bootstrap_servers=broker) as producer:
        for number in range(20):
            producer.send("to_check", reading() if number % 2 else b"{", partition=number % 2)
    options = ["--bootstrap-servers", broker, "--topic", "to_check"]
    run = run_here(CHECK, *options, "--newest", 100)
    assert run.stdout.startswith("20 records: 10 accepted, 10 rejected\n"), run.stderr
    run = run_here(CHECK, *options, "--newest", 4)
    assert run.stdout.startswith("4 records: ")
    assert "CONTRACT = Contract(" in run_here(CHECK, *options, "--draft").stdout


def test_a_sample_that_is_not_there_or_holds_nothing(run_here, tmp_path):
    run = run_here(CHECK, tmp_path / "none.jsonl")
    assert (run.returncode, run.stderr) == (
        1,
        f"error: There is no file {tmp_path}/none.jsonl. Name a file with some records.\n",
    )
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n \n")
    assert run_here(CHECK, empty).stdout == "0 records: 0 accepted, 0 rejected\n"
    run = run_here(CHECK, empty, "--draft")
    assert run.returncode == 1 and "has no JSON object" in run.stderr and run.stdout == ""
