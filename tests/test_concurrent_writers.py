"""Several writers of one table: on a local disk no commit is lost, and elsewhere conflicts are retried."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.delta.locks import MAX_ATTEMPTS, with_retries, write_lock
from pipeline.streaming.batches import Batches
from pipeline.streaming.writer import NoMetrics
from pipeline.terminal.signals import StopFlag, Stopped

import pytest
from delta.exceptions import ConcurrentTransactionException, MetadataChangedException
from pyspark.sql import functions as F

from helpers.processes import REPOSITORY, run_script, until
from helpers.records import reading
from helpers.streams import bronze_writer

# Commits collide only once in several hundred, because Delta renames right after checking. This delays each rename.
LATE_RENAMES = (
    [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "trace=rename,renameat,renameat2",
        "-e",
        "inject=rename,renameat,renameat2:delay_enter=300000",
    ]
    if shutil.which("strace")
    else []
)
APPENDS = 15 if LATE_RENAMES else 300
SESSION = """
import argparse, sys
from pipeline.spark.session import READER_JVM, build_spark
from pipeline.delta.locks import write_lock
from read_delta import tidy
table, name = sys.argv[1:]
spark = build_spark(name, READER_JVM)
print("ready", flush=True)
sys.stdin.readline()
"""
APPENDER = f"""{SESSION}
for number in range({APPENDS}):
    with write_lock(table):
        spark.sql(f"INSERT INTO delta.`{{table}}` VALUES ('{{name}}', {{number}})")
"""
MAINTAINER = f"""{SESSION}
while True:
    tidy(spark, argparse.Namespace(table=table, optimize=True, vacuum=True))
"""


@contextmanager
def session(code: str, table: Path, name: str):
    """A process with its own session and delayed renames. It waits for a line of input before it begins."""
    with subprocess.Popen(
        [*LATE_RENAMES, sys.executable, "-c", code, table, name],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_no_commit_of_two_processes_is_lost(spark, tmp_path):
    table = tmp_path / "table"
    spark.sql(f"CREATE TABLE delta.`{table}` (writer STRING, number INT) USING delta")
    with session(APPENDER, table, "a") as one, session(APPENDER, table, "b") as other:
        assert {process.stdout.readline() for process in (one, other)} == {"ready\n"}
        for process in (one, other):
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait() for process in (one, other)] == [0, 0]
    rows = spark.read.format("delta").load(str(table)).collect()
    assert sorted(map(tuple, rows)) == [(writer, number) for writer in "ab" for number in range(APPENDS)]


def test_a_stream_at_full_speed_beside_maintenance_loses_no_record(spark, ingest, tmp_path, account):
    folder, run = ingest
    lines = {}

    def add(number: int) -> None:
        (folder / f"{number}.json").write_bytes(reading(device_id=f"d{number}") + b"\n{\n")
        lines.update({f"d{number}": number})

    add(0)
    run()
    with session(MAINTAINER, tmp_path / "bronze", "maintainer") as maintainer:
        for number in range(1, 5):
            add(number)
        assert maintainer.stdout.readline() == "ready\n"
        maintainer.stdin.write("\n")
        maintainer.stdin.flush()
        assert run(max_files_per_trigger=1) == (4, 4)
        assert maintainer.poll() is None
    rows = spark.read.format("delta").load(str(tmp_path / "bronze"))
    account("OPTIMIZE and VACUUM in a loop beside a stream", lines, [row.device_id for row in rows.collect()], [])
    history = {row.operation for row in spark.sql(f"DESCRIBE HISTORY delta.`{tmp_path}/bronze`").collect()}
    assert {"WRITE", "OPTIMIZE"} <= history


@pytest.mark.long
def test_a_stream_that_waits_for_another_writer_stops_when_asked_to(tmp_path, start):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "1.json").write_bytes(reading())
    options = [
        "streaming_files_to_delta_bronze.py",
        "--input",
        tmp_path / "input",
        "--table",
        tmp_path / "bronze",
        "--checkpoint",
        tmp_path / "checkpoint",
    ]
    stream = start(*options, "--trigger", "0 seconds")
    stream.wait_for("batch 0: 1 rows in, 1 accepted")
    for number in (2, 3):  # first during a batch, then at the start of the stream
        with write_lock(str(tmp_path / "bronze")):
            (tmp_path / "input" / f"{number}.json").write_bytes(reading())
            stream.wait_for(f"Waiting for another process that is writing to {tmp_path}/bronze …")
            asked = time.monotonic()
            assert stream.stop() == 0 and "Stopped." in stream.output and "error" not in stream.output
            assert time.monotonic() - asked < 60
            if number == 2:
                stream = start(*options)
    last = run_script(*options, "--once")
    assert (last.returncode, last.stdout.count("1 rows in, 1 accepted")) == (0, 2), last.stdout


@pytest.mark.parametrize("option", ["--optimize", "--vacuum"])
def test_maintenance_waits_for_a_writer(spark, tmp_path, start, option):
    spark.range(1).write.format("delta").save(str(tmp_path / "table"))
    with write_lock(str(tmp_path / "table")):
        for signal_sent in (True, False):
            maintenance = start("read_delta.py", tmp_path / "table", option)
            maintenance.wait_for(f"Waiting for another process that is writing to {tmp_path}/table …")
            if signal_sent:
                assert maintenance.stop() == 130 and maintenance.output.count("\n") == 1
    assert maintenance.wait() == 0 and re.search("^(Merged|Removed) ", maintenance.output, re.MULTILINE)


def is_locked(table: str) -> bool:
    stopping = StopFlag()
    stopping.set()
    try:
        with write_lock(table, stopping):
            return False
    except Stopped:
        return True


def test_a_table_has_one_lock_by_whatever_path_it_is_named(tmp_path):
    (tmp_path / "table").mkdir()
    (tmp_path / "link").symlink_to("table")
    names = [
        f"{tmp_path}/table",
        f"{tmp_path}/table/",
        f"{tmp_path}/link",
        f"file:{tmp_path}/table",
        f"file://{tmp_path}/link",
    ]
    for name in names:
        with write_lock(name):
            assert all(map(is_locked, names))
        assert not any(map(is_locked, names))
    with write_lock(f"{tmp_path}/gone"), write_lock("s3a://bucket/table"):
        assert not (tmp_path / "gone").exists()


def test_a_killed_process_leaves_no_lock_and_a_replaced_folder_is_locked_anew(tmp_path):
    table = tmp_path / "table"
    table.mkdir()
    code = "import sys; from pipeline.delta.locks import write_lock\nwith write_lock(sys.argv[1]): print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, table], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        assert is_locked(str(table))
        process.kill()
    assert not is_locked(str(table))
    with write_lock(str(table)):
        table.rename(tmp_path / "old")
        table.mkdir()
        assert not is_locked(str(table)) and is_locked(f"{tmp_path}/old")


def test_a_batch_that_meets_a_change_of_the_table_by_somebody_else_is_written_once(spark, tmp_path):
    writer = bronze_writer(spark, tmp_path / "bronze")
    batches = Batches(writer, StopFlag(), NoMetrics())
    spark.sparkContext.setLocalProperty("sql.streaming.queryId", "test")
    begun, changed = tmp_path / "begun", tmp_path / "changed"

    @F.udf("string")
    def slowly(value: str) -> str:
        begun.touch()
        while not changed.exists():
            time.sleep(0.1)
        return value

    def records(origin):
        raw = [F.lit(record).cast("binary") for record in (reading(), b"{")]
        return spark.range(1).select(
            F.explode(F.array(*raw)).alias("raw"),
            F.current_timestamp().alias("ingest_time"),
            origin.alias("source_file"),
        )

    def change() -> None:
        until(begun.exists)
        spark.sql(f"ALTER TABLE delta.`{tmp_path}/bronze` SET TBLPROPERTIES ('delta.checkpointInterval' = '20')")
        changed.touch()

    try:
        batches.write(records(F.lit("a")), 0)
        other = threading.Thread(target=change)
        other.start()
        batches.write(records(slowly(F.lit("b"))), 1)
        other.join()
    finally:
        spark.sparkContext.setLocalProperty("sql.streaming.queryId", None)
    for table in (writer.tables.table, writer.tables.quarantine):
        rows = spark.read.format("delta").load(table).collect()
        assert sorted(row.source_file for row in rows) == ["a", "b"]
    assert batches.reports[1].rows == {None: 1, "malformed_json": 1}


@pytest.mark.parametrize(
    "error, attempts",
    [(MetadataChangedException("x"), MAX_ATTEMPTS), (ConcurrentTransactionException("x"), 1), (OSError("x"), 1)],
)
def test_only_conflicts_are_retried_and_not_for_ever(monkeypatch, error, attempts):
    made = []

    def write() -> None:
        made.append(True)
        raise error

    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(type(error)):
        with_retries(write)
    assert len(made) == attempts
