"""JSON files -> Bronze, with the script as a process on real files."""

import itertools
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from pipeline.delta.tables import bronze_tables
from pipeline.paths import quarantine_of
from pipeline.simulator import Simulator
from pipeline.spark.java import DELTA, KAFKA_SOURCE, spark_jars
from pipeline.terminal.signals import SAME_PRESS_SECONDS

import psutil
import pytest

from helpers.files import put
from helpers.processes import run_script, until
from helpers.records import VALID, reading
from readings import CONTRACT, SENSOR_TYPES

SCRIPT = "streaming_files_to_delta_bronze.py"


@pytest.fixture
def bronze(tmp_path):
    """An input folder, and the script options to read it."""
    folder = tmp_path / "input"
    folder.mkdir()
    return folder, ["--input", folder, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "checkpoint"]


def rows_of(spark, table, columns="*") -> list[tuple]:
    return sorted(map(tuple, spark.read.format("delta").load(str(table)).select(*columns).collect()), key=str)


def test_files_of_all_kinds_arrive_and_broken_ones_hurt_nobody_else(spark, bronze, tmp_path):
    folder, options = bronze
    name = "Küche 1 + [a]{b}* 100%.json"
    put(folder, name, reading(value=1), reading(value=2).replace(b"}", b"}\r"))
    put(folder, "packed.json.gz", reading(value=3))
    put(folder, "broken.json.gz", *[reading(value=n) for n in range(40)])
    packed = (folder / "broken.json.gz").read_bytes()
    (folder / "broken.json.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "empty.json").touch()
    put(folder, "blank.jsonl", b"", reading(value=4))
    put(folder, "garbage.json", b"\xff\xfe\x00", b"{", reading(value=5) + b" {}", reading(value=500))
    (folder / "sub").mkdir()
    put(folder / "sub", "deep.ndjson", reading(value=6))
    put(folder, "notes.txt", b"not for the pipeline")
    put(folder, ".hidden.json", reading(value=7))

    run = run_script(SCRIPT, *options, "--once")

    assert (run.returncode, "Traceback" in run.stderr) == (0, False), run.stderr
    assert f"{folder}/broken.json.gz can't be read" in run.stderr
    accepted = rows_of(spark, tmp_path / "bronze", ["value", "source_file"])
    assert accepted == sorted(
        [
            (float(value), f"file:{folder}/{file}")
            for value, file in [(1, name), (2, name), (3, "packed.json.gz"), (4, "blank.jsonl"), (6, "sub/deep.ndjson")]
        ],
        key=str,
    )
    rejected = rows_of(spark, tmp_path / "bronze_quarantine", ["reject_reason", "raw", "source_file"])
    assert rejected == sorted(
        [
            (reason, raw, f"file:{folder}/{file}")
            for reason, raw, file in [
                ("invalid_encoding", b"\xff\xfe\x00", "garbage.json"),
                ("malformed_json", b"{", "garbage.json"),
                ("malformed_json", reading(value=5) + b" {}", "garbage.json"),
                ("out_of_range", reading(value=500), "garbage.json"),
                ("unreadable_file", None, "broken.json.gz"),
            ]
        ],
        key=str,
    )
    assert (
        "10 rows in, 5 accepted, 5 rejected (malformed_json 2, invalid_encoding 1, out_of_range 1 and 1 more), "
        in run.stdout
    )


def test_the_tables_have_the_columns_of_the_design_and_nobody_elses(spark, bronze, tmp_path, run_here):
    folder, options = bronze
    put(folder, "one.json", reading(), b"{")
    assert run_here(SCRIPT, *options, "--once").returncode == 0
    pair = bronze_tables(str(tmp_path / "bronze"), CONTRACT.columns)
    for table, columns in ((pair.table, pair.columns), (pair.quarantine, pair.quarantine_columns)):
        assert [(name, kind.upper()) for name, kind in spark.read.format("delta").load(table).dtypes] == list(
            columns.items()
        )


def test_multiline_files_hold_an_object_or_an_array(spark, bronze, tmp_path, run_here):
    folder, options = bronze
    pretty = {"indent": 2, "ensure_ascii": False}
    put(folder, "object.json", json.dumps(VALID | {"value": 1.0}, **pretty).encode())
    put(
        folder,
        "array.json",
        json.dumps(
            [
                VALID | {"value": 2.0},
                VALID | {"value": 500},
                7,
                VALID | {"floor": 2.0},
                VALID | {"device_id": "Ärger {[,]}", "value": 3.0},
            ],
            **pretty,
        ).encode(),
    )
    put(folder, "escaped.json.gz", json.dumps([VALID | {"building": "😀", "value": 4.0}]).encode())
    put(folder, "none.json", b"[]")
    tail = json.dumps([VALID], **pretty).encode() + b',"x":1'
    put(folder, "tail.json", tail)
    disguised = json.dumps([json.dumps(VALID), VALID]).encode()
    put(folder, "disguised.json", disguised)
    put(folder, "surrogate.json", b"[" + reading(building="@").replace(b"@", rb"\ud800") + b"]")
    put(folder, "lines.json", reading(), reading())
    put(folder, "latin1.json", '[{"building":"é"}]'.encode("latin-1"))

    assert run_here(SCRIPT, *options, "--multiline", "--once").returncode == 0

    accepted = rows_of(spark, tmp_path / "bronze", ["value", "device_id", "building"])
    assert accepted == [
        (1.0, "sensor-001", "A"),
        (2.0, "sensor-001", "A"),
        (3.0, "Ärger {[,]}", "A"),
        (4.0, "sensor-001", "😀"),
    ]
    rejected = spark.read.format("delta").load(str(tmp_path / "bronze_quarantine")).collect()
    reasons = sorted((os.path.basename(row.source_file), row.reject_reason) for row in rejected)
    assert reasons == [
        ("array.json", "invalid_floor"),
        ("array.json", "malformed_json"),
        ("array.json", "out_of_range"),
        ("disguised.json", "malformed_json"),
        ("latin1.json", "invalid_encoding"),
        ("lines.json", "malformed_json"),
        ("surrogate.json", "malformed_json"),
        ("tail.json", "malformed_json"),
    ]
    whole = {os.path.basename(row.source_file): bytes(row.raw) for row in rejected}
    assert (whole["tail.json"], whole["disguised.json"]) == (tail + b"\n", disguised + b"\n")


def test_a_running_stream_takes_new_files_only_and_a_restart_goes_on(spark, bronze, tmp_path, start, run_here):
    folder, options = bronze
    put(folder, "1.json", reading(value=1))
    stream = start(SCRIPT, *options, "--trigger", "0 seconds")
    stream.wait_for("1 accepted")
    put(folder, "2.json", reading(value=2))
    stream.wait_for("1 accepted", times=2)
    assert stream.stop(signal.SIGTERM) == 0
    assert "Traceback" not in stream.output and "Stopped." in stream.output
    put(folder, "1.json", reading(value=99))  # this name has already been read
    for number in (3, 4, 5):
        put(folder, f"{number} ü.json", reading(value=number))
    again = run_here(SCRIPT, *options, "--once", "--max-files-per-trigger", 1)
    assert again.returncode == 0, again.stderr
    assert re.findall(r"s, (\d files? left)|s\n", again.stdout) == ["2 files left", "1 file left", ""]
    assert rows_of(spark, tmp_path / "bronze", ["value"]) == [(1.0,), (2.0,), (3.0,), (4.0,), (5.0,)]


def test_the_simulator_drops_whole_files_and_ctrl_c_writes_what_is_left(tmp_path, start, run_here):
    run = run_here(
        "kafka_producer.py",
        "--to-folder",
        tmp_path / "new" / "folder",
        "--rate",
        0,
        "--count",
        25_000,
        "--seed",
        1,
        "--invalid-fraction",
        0.1,
    )
    assert (run.returncode, run.stderr) == (0, "")
    messages = itertools.islice(Simulator(CONTRACT, SENSOR_TYPES).messages(12, 0.1, seed=1), 25_000)
    records = sum(bool(record) for _, record in messages)  # a blank line is not a record
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.read_bytes().count(b"\n") for file in files] == [10_000, 10_000, records - 20_000]
    assert run.stdout.endswith(f"{records:,} records in 3 files written.\n") and all(
        file.suffix == ".json" for file in files
    )

    simulator = start("kafka_producer.py", "--to-folder", tmp_path, "--rate", 50)
    simulator.wait_for("records in 1 file; last: ")
    time.sleep(1)  # leaves time for records of another file
    assert simulator.stop(signal.SIGINT) == 0
    [(records, files)] = re.findall(r"^(\d+) records in (\d) files written\.$", simulator.output, re.MULTILINE)
    assert len(list(tmp_path.glob("2*.json"))) == int(files)
    assert sum(file.read_bytes().count(b"\n") for file in tmp_path.glob("2*.json")) == int(records)

    slow = start("kafka_producer.py", "--to-folder", tmp_path / "slow", "--rate", 0.01)
    slow.wait_for("1 records in 1 file; last: ")  # and not after the next record, in 100 s
    slow.stop()

    run = run_here("kafka_producer.py", "--to-folder", "/proc/none", "--count", 1)
    assert (
        run.returncode == 1
        and run.stderr.startswith("error: /proc/none can't be written to: ")
        and run.stderr.count("\n") == 1
    )


def test_ctrl_c_under_spark_submit_lets_the_batch_finish(bronze, start):
    folder, options = bronze
    put(folder, "1.json", reading())
    jars = os.pathsep.join(spark_jars(DELTA, KAFKA_SOURCE))
    submit = [Path(sys.executable).with_name("spark-submit"), "--master", "local[1]", "--driver-class-path", jars]
    stream = start(
        SCRIPT,
        *options,
        "--trigger",
        "0 seconds",
        interpreter=submit,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable},
    )
    stream.wait_for("1 accepted")
    os.killpg(stream.process.pid, signal.SIGINT)  # like a terminal: the JVM of spark-submit gets it, too
    assert stream.wait() == 0
    assert "Traceback" not in stream.output and "Stopped." in stream.output


def test_a_second_ctrl_c_aborts_a_long_batch_and_the_next_start_repeats_it(bronze, spark, start, tmp_path):
    folder, options = bronze
    put(folder, "1.json", *[reading(value=n / 10_000) for n in range(200_000)], b"{")
    stream = start(SCRIPT, *options, "--trigger", "0 seconds")
    until(lambda: Path(options[3], "_delta_log").exists())
    stream.process.send_signal(signal.SIGINT)
    stream.wait_for("Finishing the running batch. Ctrl+C again aborts it")
    jvm = psutil.Process(stream.process.pid).children()[0]
    time.sleep(SAME_PRESS_SECONDS + 0.1)
    stream.process.send_signal(signal.SIGINT)
    assert stream.wait() == 130 and "Traceback" not in stream.output
    assert not jvm.is_running() or jvm.status() == psutil.STATUS_ZOMBIE
    assert start(SCRIPT, *options, "--once").wait() == 0
    accepted, rejected = (
        spark.read.format("delta").load(f"{options[3]}{part}").count() for part in ("", "_quarantine")
    )
    assert (accepted, rejected) == (200_000, 1)


def test_a_checkpoint_without_its_table_and_a_table_without_its_checkpoint_are_refused(bronze, tmp_path, run_here):
    folder, options = bronze
    put(folder, "1.json", reading())
    assert run_here(SCRIPT, *options, "--once").returncode == 0

    other = [*options[:4], "--checkpoint", tmp_path / "other"]
    run = run_here(SCRIPT, *other, "--once")
    assert run.returncode == 1 and "was not written with the checkpoint" in run.stderr and "Traceback" not in run.stderr

    os.rename(quarantine_of(str(tmp_path / "bronze")), tmp_path / "gone")
    run = run_here(SCRIPT, *options, "--once")
    assert run.returncode == 1 and "there is no such table" in run.stderr and "Traceback" not in run.stderr


def test_a_missing_input_folder_is_an_error_with_a_way_out(tmp_path, run_here):
    run = run_here(SCRIPT, "--input", tmp_path / "nowhere", "--once")
    assert (run.returncode, run.stderr) == (
        1,
        f"error: There is no folder {tmp_path}/nowhere. Create it, or name another with --input.\n",
    )


def test_a_clock_that_is_set_back_does_not_hold_the_stream_up(spark, bronze, run_here, monkeypatch):
    """Spark by itself would wait until the clock has caught up."""
    folder, options = bronze
    commits, second = Path(options[-1], "commits"), folder / "2.json"
    put(folder, "1.json", reading())

    def clock() -> float:
        if (commits / "0").exists() and not second.exists():
            put(folder, second.name, reading())
        if (commits / "1").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return time.time() - 3600 * second.exists()

    monkeypatch.setattr("pipeline.streaming.query.time", SimpleNamespace(time=clock, monotonic=time.monotonic))
    run = run_here(SCRIPT, *options, "--trigger", "1 hour")
    assert run.returncode == 0 and "The clock was set back by 3,600 s.\nResuming" in run.stdout
    assert run.stdout.count("1 rows in, 1 accepted") == 2
