"""Mutated records through Kafka and files, checked against the oracle: none is lost or accepted with another value.
Also large records.

There are 20,000 mutated records, or 110,000 with `--long`.
"""

import itertools
import json
import os
import random
import subprocess
from collections import Counter

from pipeline.contract.contract import Contract, load_contract
from pipeline.contract.fields import Boolean, Number, Text
from pipeline.contract.judge import parse
from pipeline.contract.times import Timestamp
from pipeline.paths import quarantine_of
from pipeline.spark.private import code_generation, jvm_of

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kafka import KafkaConsumer, KafkaProducer
from pyspark.sql import functions as F

from helpers import oracle, shapes
from helpers.processes import REPOSITORY
from helpers.records import ARRIVAL, ARRIVAL_MICROS, CASES, JSON, VALID, judge, mutate, reading
from helpers.topics import origins, tables
from readings import CONTRACT

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"
COLUMNS = ("event_micros", *(column for column in CONTRACT.columns if column != "event_time"))


def corpus(size: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    seeds = [record for record, _ in CASES if record]
    seeds += [reading(value=2.5, note="x"), reading(type="humidity", unit="%"), reading(type="co2", unit="ppm")] * 500
    return seeds + [mutate(rng.choice(seeds), rng) for _ in range(size - len(seeds))]


def right(raw: bytes | None, arrival_micros: int) -> tuple[str | None, tuple | None, dict | None]:
    """The oracle's verdict: the reason, or the values of COLUMNS and the fields outside the contract."""
    reason, values, rest = oracle.read(CONTRACT, raw, arrival_micros)
    if reason := reason or oracle.break_rule(values):
        return reason, None, None
    return None, tuple(values.values()), rest


def rescued(row) -> dict:
    return json.loads(row["_rescued_data"] or "{}")


def check_rows(spark, records: list[bytes | None]) -> Counter:
    """Checks that contract and oracle agree on the records. Returns how many are valid and how many are not."""
    verdicts = Counter()
    for record, row in zip(records, judge(spark, records), strict=True):
        reason, values, rest = right(record, ARRIVAL_MICROS)
        ours = None if row.reject_reason else tuple(row[column] for column in COLUMNS)
        assert (row.reject_reason, ours) == (reason, values), record
        assert reason or rescued(row) == rest, record
        verdicts[reason is None] += 1
    return verdicts


READINGS = st.dictionaries(st.sampled_from(list(VALID)), JSON, max_size=4).map(lambda changes: VALID | changes)
RECORDS = st.one_of(
    READINGS.flatmap(
        lambda fields: st.booleans().map(
            lambda ascii: json.dumps(fields, ensure_ascii=ascii).encode("utf-8", "surrogatepass")
        )
    ),
    st.datetimes(timezones=st.timezones() | st.none()).map(lambda moment: reading(timestamp=moment.isoformat())),
    st.from_regex(r"\A\d{4}-[01]\d-[0-3]\dT[0-2]\d:[0-5]\d:[0-6]\d(\.\d{1,9})?(Z|[+-][01]\d:?[0-6]\d)\Z").map(
        lambda text: reading(timestamp=text)
    ),
    st.floats(-50, 130).map(lambda value: reading(value=value)),
    st.binary(max_size=200),
)


def test_the_rules_and_the_oracle_agree_on_what_hypothesis_makes(spark, pytestconfig):
    records = []

    @settings(
        max_examples=8000 if pytestconfig.option.long else 2000,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(RECORDS)
    def collect(record):
        records.append(record)

    collect()
    verdicts = check_rows(spark, records)  # all at once, as one Spark job per record would take hours
    assert min(verdicts.values()) > len(records) / 16, verdicts


def test_the_rules_and_the_oracle_agree_on_a_corpus_of_mutated_records(spark):
    verdicts = check_rows(spark, corpus(30_000, seed=1))
    assert min(verdicts.values()) > 2000, verdicts


@pytest.fixture(scope="module")
def hostile(pytestconfig) -> list[bytes]:
    return corpus(110_000 if pytestconfig.option.long else 20_000, seed=2)


def test_hostile_records_go_through_kafka(spark, broker, silver, hostile, account, run_here):
    topic, options = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    with KafkaProducer(bootstrap_servers=broker, linger_ms=50) as producer:
        for number, record in enumerate([*hostile, None, b""]):
            producer.send(topic[3], key=b"device", value=record, partition=number % 3)
    with KafkaConsumer(
        topic[3], bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        sent = {(message.topic, message.partition, message.offset): message.value for message in consumer}

    run = run_here(CONSUMER, *options, "--once")

    assert (run.returncode, run.stderr) == (0, "")
    account("hostile records in Kafka", *origins(spark, broker, options))
    accepted, rejected = tables(spark, options)
    origin = ("topic", "partition", "offset")
    arrival = rejected.select(F.unix_micros("ingest_time")).first()[0]
    for row in rejected.collect():
        raw = sent.pop(tuple(row[column] for column in origin))
        assert (row.raw if row.raw is None else bytes(row.raw)) == raw
        assert row.reject_reason == right(raw, arrival)[0], raw
    for row in accepted.withColumn("event_micros", F.unix_micros("event_time")).drop("event_time").collect():
        raw = sent.pop(tuple(row[column] for column in origin))
        assert row.raw_json.encode() == oracle.json_of(raw)
        assert (None, tuple(row[column] for column in COLUMNS), rescued(row)) == right(raw, arrival), raw
    assert not sent


def test_hostile_records_go_through_files(spark, tmp_path, hostile, account, run_here):
    folder, table = tmp_path / "input", str(tmp_path / "bronze")
    folder.mkdir()
    # Records must be one line each and not blank, and a byte order mark at the start of a file would be skipped.
    lines = [record for record in hostile if b"\n" not in record and record.strip(b" \t\r")]
    for number in range(0, len(lines), 20_000):
        content = b"\n".join([b"{}", *lines[number : number + 20_000]])
        (folder / f"_{number}").write_bytes(content)
        os.rename(folder / f"_{number}", folder / f"{number}.json")

    run = run_here(BRONZE, "--input", folder, "--table", table, "--checkpoint", tmp_path / "checkpoint", "--once")

    assert (run.returncode, run.stderr) == (0, "")
    accepted, rejected = (spark.read.format("delta").load(path) for path in (table, quarantine_of(table)))
    arrival = rejected.select(F.unix_micros("ingest_time")).first()[0]
    lines += [b"{}"] * len(range(0, len(lines), 20_000))
    verdicts = [right(line, arrival) for line in lines]
    valid = Counter(values for _, values, _ in verdicts if values)
    wrong = Counter((reason, line) for line, (reason, _, _) in zip(lines, verdicts) if reason)
    rows = accepted.withColumn("event_micros", F.unix_micros("event_time")).drop("event_time").collect()
    assert Counter(tuple(row[column] for column in COLUMNS) for row in rows) == valid
    assert Counter((row.reject_reason, bytes(row.raw)) for row in rejected.collect()) == wrong
    account(
        "hostile records in files", range(len(lines)), range(len(rows)), range(len(rows), len(rows) + rejected.count())
    )


CONTRACTS = {
    shapes.FLAT: CONTRACT,
    shapes.NESTED: load_contract(str(REPOSITORY / "examples" / "zigbee2mqtt.py")),
    shapes.KINDS: Contract(
        (
            Timestamp("time", format="iso8601", zone="Europe/Berlin"),
            Number("quoted", quoted=True),
            Boolean("switch", true=("ON",), false=("OFF",)),
            Timestamp("seen", format="epoch_us", quoted=True),
        )
    ),
}


@pytest.mark.parametrize("record", CONTRACTS, ids=["flat", "nested", "kinds"])
def test_records_that_are_hard_to_read_are_read_as_the_oracle_reads_them(spark, record):
    contract, raws = CONTRACTS[record], shapes.records(record, 20_000)
    rows = spark.createDataFrame(list(enumerate(raws)), "number INT, raw BINARY").withColumn(
        "ingest_time", F.lit(ARRIVAL).cast("timestamp")
    )
    columns = [
        f"unix_micros({name}) AS {name}" if kind == "TIMESTAMP" else name for name, kind in contract.columns.items()
    ]
    judged = (
        parse(rows, contract)
        .selectExpr("number", "reject_reason", "_rescued_data", *columns)
        .orderBy("number")
        .collect()
    )
    for raw, row in zip(raws, judged, strict=True):
        reason, values, rest = oracle.read(contract, raw, ARRIVAL_MICROS)
        assert row.reject_reason == reason, raw[:300]
        assert reason or ({name: row[name] for name in contract.columns}, rescued(row)) == (values, rest), raw[:300]


def seconds_for(spark, contract, folder, raws: list[bytes]) -> float:
    """CPU seconds that it takes to read the records, each from a file in this folder."""
    for number, raw in enumerate(raws):
        (folder / str(number)).write_bytes(raw)
    records = (
        spark.read.format("binaryFile")
        .load(str(folder))
        .selectExpr("content AS raw", f"TIMESTAMP '{ARRIVAL}' AS ingest_time")
    )

    def used() -> float:
        """CPU seconds used by the JVM so far. The clock would also count the machine's other work."""
        fields = subprocess.run(
            ["ps", "-o", "time=", "-p", str(jvm_of(spark).pid)], capture_output=True, text=True, check=True
        ).stdout
        days, _, clock = fields.strip().rpartition("-")
        return sum(float(part) * 60**power for power, part in enumerate(reversed(clock.split(":")))) + 86400 * int(
            days or 0
        )

    before = used()
    with code_generation(spark):  # as TableWriter does
        parse(records, contract).write.format("noop").mode("overwrite").save()
    return used() - before


def test_names_of_one_hash_take_no_longer_than_others(spark, tmp_path):
    names = shapes.same_hash(30_000)
    for value in ("1", "[]"):  # once for the plain parser, once for the strict one
        fields = ",".join(f'"{name}":{value}' for name in names)
        assert seconds_for(spark, CONTRACT, tmp_path, [shapes.FLAT.replace("}", f",{fields}}}").encode()]) < 8


ARRAYS = {
    shapes.ARRAY: Contract((Text("gateway"), Text("readings[].id"), Number("readings[].t"), Timestamp("readings[].ts")))
}


def test_arrays_that_are_hard_to_read_are_read_as_the_oracle_reads_them(spark):
    [(record, contract)] = ARRAYS.items()
    raws = shapes.records(record, 20_000)
    rows = spark.createDataFrame(list(enumerate(raws)), "number INT, raw BINARY").withColumn(
        "ingest_time", F.lit(ARRIVAL).cast("timestamp")
    )
    judged = parse(rows, contract).withColumn("ts", F.unix_micros("ts")).orderBy("number", "element").collect()
    for number, found in itertools.groupby(judged, lambda row: row.number):
        wanted = oracle.read_readings(contract, raws[number], ARRIVAL_MICROS)
        for row, (element, reason, values, rest) in zip(found, wanted, strict=True):
            assert (row.element, row.reject_reason) == (element, reason), raws[number][:300]
            values_found = {name: row[name] for name in contract.columns}
            assert reason or (values_found, rescued(row)) == (values, rest), raws[number][:300]


@pytest.mark.parametrize(
    "record",
    [*CONTRACTS, pytest.param(shapes.ARRAY, marks=pytest.mark.long)],
    ids=["flat", "nested", "kinds", "array"],
)
def test_a_large_record_takes_no_more_than_a_second_a_megabyte(spark, tmp_path, pytestconfig, record):
    """Records that used to hang the reader, exhaust its memory or take quadratic time are read separately, two at a time.
    All others are read in one go, and with --long also separately.
    """
    size = 7_900_000
    worst = [b"\x01" * size, b"{" + shapes.times('"":1')(size).encode() + b"}", b"[" * size]
    worst += [record.replace("21.5", f"[{shapes.counted(part)(size)}]").encode() for part in ('{"n#":1}', '"#"')]
    worst += [record.replace("{", "{" + shapes.short_names(size) + ",", 1).encode()]
    for raw in [*worst, *(shapes.records(record, size) if pytestconfig.option.long else [])]:
        copies = (
            1 if record in ARRAYS else 2
        )  # two arrays of the worst kinds need all of the memory, and others have used this JVM
        seconds = seconds_for(spark, (CONTRACTS | ARRAYS)[record], tmp_path, [raw] * copies)
        assert seconds < 2 * 8 + 4, raw[:300]
    raws = shapes.records(record, 200_000)
    assert seconds_for(spark, (CONTRACTS | ARRAYS)[record], tmp_path, raws) < sum(map(len, raws)) / 1_000_000 + 10


@pytest.mark.parametrize("record", ["valid", pytest.param("array", marks=pytest.mark.long)])
def test_many_large_records_of_a_batch_fit_into_the_memory(spark, tmp_path, pytestconfig, account, start, record):
    """Runs in its own process, with the default heap. In an earlier version, 25 such records did not fit into memory, valid or not."""
    (tmp_path / "input").mkdir()
    count, large = (100 if pytestconfig.option.long else 25), random.Random(1).randbytes(3_900_000).hex()
    text = (
        json.dumps(json.loads(reading()) | {"blob": large})
        if record == "valid"
        else json.dumps([json.loads(reading())] * 50_000)
    )
    for number in range(count):
        (tmp_path / "input" / f"{number}.json").write_text(text)
    options = [
        "--input",
        tmp_path / "input",
        "--table",
        tmp_path / "bronze",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--once",
    ]
    stream = start("streaming_files_to_delta_bronze.py", *options)
    assert stream.wait() == 0 and f"batch 0: {count} rows in" in stream.output, stream.output
    places = [
        spark.read.format("delta").load(str(tmp_path / table)).select("source_file").collect()
        for table in ("bronze", "bronze_quarantine")
    ]
    assert len(places[0 if record == "valid" else 1]) == count
    account(
        f"{count} {record} records of 8 MB",
        os.listdir(tmp_path / "input"),
        *([os.path.basename(row.source_file) for row in rows] for rows in places),
    )
