"""The reader scripts, run on real tables."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from pipeline.delta.tables import WRITER, bronze_tables, create_table, silver_tables
from pipeline.paths import REPOSITORY, tables_in
from pipeline.readers.printing import as_table, csv_line, lines
from pipeline.streaming.writer import TableWriter

import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import functions as F
from rich.console import Console

from helpers.processes import on_terminal, run_script
from helpers.records import reading
from helpers.streams import bronze_writer
from readings import CONTRACT


@pytest.fixture(scope="module")
def lake(spark, tmp_path_factory):
    """A lake with both tables.

    The order of its 30 readings by time differs from the write order, the file order and the order of event_time alone.
    """
    folder = tmp_path_factory.mktemp("lake")
    for layer, tables in (("bronze", bronze_tables), ("silver", silver_tables)):
        pair = tables(table := str(folder / layer / "sensor_data"), CONTRACT.columns)
        create_table(spark, table, pair.columns, {WRITER: "test"})
        create_table(spark, pair.quarantine, pair.quarantine_columns, {WRITER: "test"})
        for batch in (1, 0, 2):  # versions 1, 2, 3
            readings = spark.range(10).selectExpr(
                f"concat('d', {batch} * 10 + id) AS device_id",
                "'A\x1b[31m' AS building",
                "double(id) AS value",
                # Within a batch, times fall as ids rise, less than a millisecond apart.
                "timestamp_micros(1763600000000000 - id) AS event_time",
                f"timestamp_micros(1763700000000000 + {batch}) AS ingest_time",
                '\'{"whole": "record"}\' AS raw_json',
            )
            if layer == "bronze":
                readings = readings.drop("raw_json")
            readings.coalesce(1).write.format("delta").mode("append").save(table)
        spark.range(3, numPartitions=1).selectExpr(
            "'malformed_json' AS reject_reason", "CAST('{\x07' AS BINARY) AS raw", "now() AS ingest_time"
        ).write.format("delta").mode("append").save(f"{table}_quarantine")
    return folder


def column(run: subprocess.CompletedProcess, name: str) -> list:
    """The values of a column in the output of a run with --format json."""
    assert (run.returncode, run.stderr) == (0, "")
    return [json.loads(line)[name] for line in run.stdout.splitlines()]


@pytest.mark.parametrize("script, layer", [("read_bronze.py", "bronze"), ("read_silver.py", "silver")])
def test_the_newest_readings_come_first_with_the_counts_under_them(lake, script, layer):
    table = lake / layer / "sensor_data"
    run = run_script(script, "--table", table, "--limit", 12)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.findall(r"d\d\d", run.stdout) == [f"d{20 + n}" for n in range(10)] + ["d10", "d11"]
    assert run.stdout.endswith(f"30 rows in {table}\n3 rows in {table}_quarantine\n")
    assert "raw_json" not in run.stdout and "\x1b" not in run.stdout and "A\ufffd[31m" in run.stdout
    header, first = (line for line in run.stdout.splitlines() if "device_id" in line or "d20" in line)
    # Numbers are right-aligned, and times are shortened.
    assert first.rindex("0.0") + 3 == header.rindex("value") + 5 and "2025-11-20 00:53:20  " in first


def test_raw_and_rejected_records_are_shown_when_asked_for(lake, run_here):
    table = lake / "silver" / "sensor_data"
    assert run_here("read_silver.py", "--table", table, "--raw").stdout.count('{"whole": "record"}') == 20
    run = run_here("read_silver.py", "--table", table, "--rejected")
    assert run.stdout.count("malformed_json  {\ufffd  ") == 3


def test_a_row_of_csv_is_one_row_whatever_is_in_it():
    rows = [["a\nb", "c\rd", None, ""], ["\r\n", 'say "x"', "1,5", "\u2028"]]
    assert list(csv.reader(io.StringIO("\n".join(map(csv_line, rows)), newline=""))) == [
        [text or "" for text in row] for row in rows
    ]
    assert [csv_line([None, "", "a"]), csv_line([None]), csv_line([""])] == [',"",a', '""', '""']


def test_no_text_steers_a_terminal_in_any_format(spark, monkeypatch):
    hostile = "a\x1b[31m\x9b\u202e\x7f b\u00e9\U000e0041"
    rows = spark.createDataFrame([(hostile,)], "name STRING")
    [as_it_is] = lines(rows, "csv")
    assert as_it_is == hostile  # as in a pipe
    monkeypatch.setattr(sys, "stdout", argparse.Namespace(isatty=lambda: True))
    for form in ("json", "csv", "table"):
        [line] = lines(rows, form)
        assert line.isprintable() and "\u00e9" in line, line
        if form == "json":
            assert json.loads(line) == {"name": hostile}


@pytest.mark.parametrize(
    "name", ["می\u200cخواهم", "क्\u200dष", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001fae8"]
)
def test_names_in_every_script_are_shown_as_they_are(spark, monkeypatch, name):
    monkeypatch.setattr(sys, "stdout", argparse.Namespace(isatty=lambda: True))
    assert list(lines(spark.createDataFrame([(name,)], "name STRING"), "table")) == [name]


def test_programs_get_everything_and_people_are_told_that_there_is_more(lake, run_here):
    query = ["read_delta.py", "--lake", lake, "--sql", "SELECT id FROM range(100)"]
    assert len(run_here(*query, "--format", "csv").stdout.splitlines()) == 101
    assert len(run_here(*query, "--format", "json", "--limit", 30).stdout.splitlines()) == 30
    assert run_here(*query).stdout.endswith("19\nThese are the first 20 rows; --limit N shows more.\n")
    assert "--limit N" not in run_here(*query, "--limit", 100).stdout
    assert len(run_here("read_delta.py", lake / "silver" / "sensor_data", "--format", "csv").stdout.splitlines()) == 31


def test_programs_get_all_columns_as_json_or_csv(lake, run_here):
    table = lake / "silver" / "sensor_data"
    run = run_script("read_silver.py", "--table", table, "--limit", 2, "--format", "json")
    assert (
        column(run, "building") == ["A\x1b[31m"] * 2
        and column(run, "floor") == [None] * 2
        and column(run, "value") == [0.0, 1.0]
    )
    assert column(run, "event_time") == ["2025-11-20T00:53:20.000000Z", "2025-11-20T00:53:19.999999Z"]
    assert column(run, "raw_json") == ['{"whole": "record"}'] * 2
    columns = list(silver_tables("", CONTRACT.columns).columns)
    assert list(json.loads(run.stdout.splitlines()[0])) == columns
    run = run_here("read_silver.py", "--table", table, "--limit", 2, "--format", "csv")
    header, first, second = csv.reader(run.stdout.splitlines())
    assert header == columns and (first[0], first[1], second[header.index("value")], first[3]) == (
        "2025-11-20T00:53:20.000000Z",
        "d20",
        "1.0",
        "",
    )


def test_a_table_fits_the_terminal_and_what_is_left_out_is_named(lake):
    """On a terminal of 80 columns, and on one of 400."""
    for width, names in (
        (80, ["event_time", "device_id", "building", "value", "No room for"]),
        (400, ["event_time", "kafka_timestamp", "_rescued_data", "ingest_time"]),
    ):
        output = on_terminal(width, "read_silver.py", "--table", lake / "silver" / "sensor_data", "--limit", "2")
        text = re.sub(r"\x1b\[[\d;]*m", "", output)
        assert all(name in text for name in names) and ("No room for" in text) == (width == 80), text
        rows = [line for line in text.splitlines() if "d20" in line or "device_id" in line]
        assert len(rows) == 2 and max(map(len, rows)) <= width, text


@pytest.mark.parametrize("origin", ["Kafka's", "a file's"])
def test_a_raw_record_is_shown_whole_beside_its_origin(spark, origin):
    record = '{"timestamp": "2026-11-20T08:00:00Z", "device_id": "d1", "value": 21.5, "building": "A", "floor": 1}'
    sources = {
        "Kafka's": "'sensor_data' AS topic, 2 AS partition, 12345678901 AS offset, CAST('k' AS BINARY) AS kafka_key",
        "a file's": f"'file:/data/{'long/' * 20}x.json' AS source_file",
    }
    rows = spark.sql(
        f"SELECT 'missing_type' AS reject_reason, CAST('{record}' AS BINARY) AS raw, {sources[origin]}, "
        "TIMESTAMP '2026-11-20 08:00:01.5' AS ingest_time"
    )
    console = Console(width=80, file=io.StringIO())
    console.print(as_table(rows, 80, whole=True)[0])
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 10, lines
    split = lines[0].index("raw")
    left, right = ([line[part].strip() for line in lines] for part in (slice(split), slice(split, None)))
    assert "".join(right).replace("raw", "", 1).strip("─").replace(" ", "") == record.replace(" ", "")
    assert "2026-11-20 08:00:01" in left and "missing_type" in left
    assert origin == "a file's" or "sensor_data 2 12345678901" in left


def test_a_link_back_to_the_lake_does_not_repeat_its_tables(lake, tmp_path, run_here):
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "silver").symlink_to(lake / "silver")
    (tmp_path / "lake" / "again").symlink_to(tmp_path / "lake")
    (tmp_path / "lake" / "silver" / "up").symlink_to(tmp_path / "lake")
    try:
        names = ["silver/sensor_data", "silver/sensor_data_quarantine"]
        assert sorted(tables_in(str(tmp_path / "lake"))) == names
        assert column(run_here("read_delta.py", "--lake", tmp_path / "lake", "--format", "json"), "table") == names
    finally:
        (tmp_path / "lake" / "silver" / "up").unlink()


def append(spark, table, arrived: str = "now()", prefix: str = "new", **others: str) -> None:
    """Appends ten rows that arrived now or at `arrived`. `others`: expressions for further columns."""
    readings = spark.range(10).selectExpr(
        f"concat('{prefix}-', id) AS device_id",
        "double(id) AS value",
        "now() AS event_time",
        f"{arrived} AS ingest_time",
        *(f"{value} AS {name}" for name, value in others.items()),
    )
    readings.coalesce(1).write.format("delta").mode("append").save(str(table))


def test_follow_shows_the_newest_rows_in_place_and_leaves_a_clean_terminal(spark, lake, tmp_path):
    shutil.copytree(lake, tmp_path / "lake")
    table = tmp_path / "lake" / "silver" / "sensor_data"
    waits_for = iter(
        [
            ("30 accepted, 0.0 a second; the newest row is ", lambda _: append(spark, table)),
            ("40 accepted, ", lambda process: process.send_signal(signal.SIGINT)),
            ("never", None),
        ]
    )
    step = [next(waits_for)]

    def watch(text: str, process: subprocess.Popen) -> None:
        if step[0][0] in text:
            step[0][1](process)
            step[0] = next(waits_for)

    output = on_terminal(100, "read_silver.py", "--table", table, "--follow", "--limit", "3", watch=watch)
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l")  # the cursor is back
    last = re.sub(r"\x1b\[[\d;?]*\w", "", output[output.rfind("40 accepted") :])
    assert (
        re.findall(r"new-\d", last) == ["new-0", "new-1", "new-2"]
        and "3 rejected" in last
        and "Traceback" not in output
    )


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_follow_in_a_pipe_gives_each_new_row_once_as_a_line(spark, lake, tmp_path, start, form):
    shutil.copytree(lake, tmp_path / "lake")
    table = tmp_path / "lake" / "silver" / "sensor_data"
    follower = start("read_silver.py", "--table", table, "--follow", "--limit", 3, "--format", form)
    follower.wait_for("d22")
    for times in (1, 2):
        append(spark, table)
        follower.wait_for("new-9", times)
    assert follower.stop() == 0
    devices = re.findall(r"d2\d|new-\d", follower.output)
    assert (devices[:3], sorted(devices[3:13]), sorted(devices[13:])) == (
        ["d22", "d21", "d20"],
        *[[f"new-{n}" for n in range(10)]] * 2,
    )
    assert len(follower.lines) == 23 + (form != "json")


def test_follow_gives_each_row_once_though_the_clock_was_set_back_and_files_were_merged(spark, lake, tmp_path, start):
    shutil.copytree(lake, tmp_path / "lake")
    table = tmp_path / "lake" / "silver" / "sensor_data"
    follower = start("read_silver.py", "--table", table, "--follow", "--limit", 3, "--format", "json")
    follower.wait_for("d22")
    append(spark, table, arrived="TIMESTAMP '2001-01-01'")
    spark.sql(f"OPTIMIZE delta.`{table}`")
    append(spark, table, arrived="TIMESTAMP '2000-01-01'", prefix="older")
    follower.wait_for("older-9")
    append(spark, table, arrived="TIMESTAMP '2099-01-01'", prefix="late")
    follower.wait_for("late-9")
    assert follower.stop() == 0
    shown = [json.loads(line)["device_id"] for line in follower.lines][3:]
    assert [name.split("-")[0] for name in shown] == ["new"] * 10 + ["older"] * 10 + ["late"] * 10 and len(
        {*shown}
    ) == 30


def test_follow_says_what_happens_to_the_table_and_goes_on(spark, lake, tmp_path, start):
    """Changed rows, a new column, lost log versions, missing files, an older copy, and a new table."""
    shutil.copytree(lake, tmp_path / "lake")
    table = tmp_path / "lake" / "silver" / "sensor_data"
    followers = {
        form: start("read_silver.py", "--table", table, "--follow", "--limit", 3, "--format", form)
        for form in ("json", "csv")
    }

    def wait_for(text: str, times: int = 1) -> None:
        for follower in followers.values():
            follower.wait_for(text, times)

    wait_for("d22")
    spark.sql(f"DELETE FROM delta.`{table}` WHERE device_id = 'd22'")
    wait_for("Version 4 of ")
    spark.sql(f"RESTORE TABLE delta.`{table}` TO VERSION AS OF 3")
    wait_for("Version 5 of ")
    spark.sql(f"ALTER TABLE delta.`{table}` ADD COLUMNS (battery DOUBLE)")
    append(spark, table, battery="0.5D")
    wait_for("new-9")
    shutil.copytree(table, tmp_path / "backup")
    for follower in followers.values():
        follower.process.send_signal(signal.SIGSTOP)
    append(spark, table, prefix="lost")
    append(spark, table, prefix="vacuumed")
    append(spark, table, prefix="kept")
    (table / "_delta_log" / f"{8:020}.json").unlink()
    [removed] = [
        json.loads(line)["add"]["path"]
        for line in (table / "_delta_log" / f"{9:020}.json").read_text().splitlines()
        if '"add"' in line
    ]
    (table / removed).unlink()
    for follower in followers.values():
        follower.process.send_signal(signal.SIGCONT)
    wait_for("kept-9")
    table.rename(tmp_path / "away")
    (tmp_path / "backup").rename(table)
    wait_for("replaced by an older copy")
    append(spark, table, prefix="again")
    wait_for("again-9")
    shutil.rmtree(table)
    wait_for("No Delta table at ")
    spark.sql(f"CREATE TABLE delta.`{tmp_path}/other` USING delta AS SELECT 'first' AS device_id, now() AS ingest_time")
    (tmp_path / "other").rename(table)
    wait_for("is a new table")
    wait_for("first")
    for form, follower in followers.items():
        assert follower.stop() == 0 and "Traceback" not in follower.output
        rows = [line for line in follower.lines if re.search(name := r"(new|lost|vacuumed|kept|again)-\d", line)]
        expected = [f"{batch}-{n}" for batch in ("again", "kept", "new") for n in range(10)]
        assert sorted(re.search(name, row)[0] for row in rows) == expected
        assert f"added by versions 8 to 8 of {table} are not shown" in follower.output
        assert f"added by version 9 of {table} are not shown" in follower.output
        if form == "json":
            assert json.loads(rows[0])["battery"] == 0.5
        else:
            assert (
                follower.output.count("are not shown: battery. ") == 1
                and len({len(next(csv.reader([row]))) for row in rows}) == 1
            )


def test_follow_waits_for_a_table_that_is_not_there_yet(spark, lake, tmp_path, start):
    follower = start("read_silver.py", "--table", tmp_path / "silver" / "sensor_data", "--follow")
    follower.wait_for("No Delta table at ")
    shutil.copytree(lake / "silver", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "silver")
    follower.wait_for("d22")
    assert follower.stop() == 0 and "Traceback" not in follower.output


def test_read_delta_shows_what_tables_there_are(lake):
    run = run_script("read_delta.py", "--lake", lake, "--format", "json")
    assert column(run, "table") == [
        f"{layer}/sensor_data{suffix}" for layer in ("bronze", "silver") for suffix in ("", "_quarantine")
    ]
    assert column(run, "rows") == [30, 3, 30, 3]
    assert column(run, "last_commit") == ["WRITE"] * 4
    assert all(files >= 1 for files in column(run, "live_files"))


def test_sql_goes_over_all_tables_of_the_lake_and_can_only_read(lake):
    run = run_script(
        "read_delta.py",
        "--lake",
        lake,
        "--format",
        "csv",
        "--sql",
        "SELECT building, count(*) AS n, max(b.value) FROM silver.sensor_data JOIN bronze.sensor_data b USING (building) "
        "GROUP BY ALL -- all;",
    )
    assert (run.returncode, run.stdout) == (0, "building,n,max(value)\nA\x1b[31m,900,9.0\n")
    before = sorted(lake.rglob("*"))
    for sql, complaint in (
        ("SELECT * FROM gold.sensor_data", "gold"),
        ("DELETE FROM silver.sensor_data", "--sql takes one query"),
    ):
        run = run_script("read_delta.py", "--lake", lake, "--sql", sql)
        assert run.returncode == 1 and complaint in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert sorted(lake.rglob("*")) == before


def test_tables_of_any_name_can_be_asked_and_a_broken_one_is_named(spark, tmp_path, run_here):
    table = tmp_path / "2nd floor é" / "door-sensors"
    spark.range(2).selectExpr("id AS n", "id AS `N2`").write.format("delta").save(str(table))
    (tmp_path / "2nd floor é" / "broken" / "_delta_log").mkdir(parents=True)
    run = run_here(
        "read_delta.py",
        "--lake",
        tmp_path,
        "--format",
        "csv",
        "--sql",
        "SELECT * FROM 2nd_floor__.door_sensors a JOIN 2nd_floor__.door_sensors b ON a.n = b.n ORDER BY a.n",
    )
    assert (run.returncode, run.stdout) == (0, "n,N2,n_2,N2_2\n0,0,0,0\n1,1,1,1\n")
    run = run_here("read_delta.py", "--lake", tmp_path, "--format", "json")
    assert run.returncode == 0 and json.loads(run.stdout)["table"] == "2nd floor é/door-sensors"
    assert run.stderr.startswith(f"{tmp_path}/2nd floor é/broken can't be read: ") and run.stderr.count("\n") == 1


def test_tables_whose_names_differ_in_signs_only_can_all_be_asked(spark, tmp_path, run_here):
    for number, name in enumerate(("x/a-b", "x/a b", "x/A_B", "x/c", "x/a_b_2")):
        spark.range(number, number + 1).write.format("delta").save(str(tmp_path / name))
    sql = "SELECT a.id, b.id, c.id, d.id FROM x.a_b a, x.a_b_3 b, x.a_b_4 c, x.a_b_2 d"
    run = run_here("read_delta.py", "--lake", tmp_path, "--format", "csv", "--sql", sql)
    assert run.stdout.splitlines()[1:] == ["2,1,0,4"], run
    assert run.stderr == (
        f"In --sql, {tmp_path}/x/a b is named x.a_b_3, because another table is already named x.a_b.\n"
        f"In --sql, {tmp_path}/x/a-b is named x.a_b_4, because another table is already named x.a_b.\n"
    )


def test_read_delta_sorts_and_travels_in_time(lake, run_here):
    table = lake / "silver" / "sensor_data"
    run = run_here("read_delta.py", table, "--sort-by", "value", "--limit", 4, "--version", 2, "--format", "json")
    assert column(run, "value") == [9.0, 9.0, 8.0, 8.0]
    assert run_here("read_delta.py", table, "--version", 2).stdout.endswith(f"20 rows in {table}\n")
    history = run_here("read_delta.py", table, "--history", "--format", "json")
    assert column(history, "version") == [3, 2, 1, 0]
    assert column(history, "rows")[:3] == ["10", "10", "10"]
    when = column(history, "timestamp")[2]
    assert run_here("read_delta.py", table, "--timestamp", when).stdout.endswith(f"10 rows in {table}\n")


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--version", "99"], r"version 99. Available versions: \[0, 3\]"),
        (["--timestamp", "yesterday-ish"], r"'yesterday-ish'"),
        (["--sort-by", "colour"], r"has no column colour; it has event_time, device_id, "),
    ],
)
def test_read_delta_says_what_is_wrong(lake, run_here, options, complaint):
    run = run_here("read_delta.py", lake / "silver" / "sensor_data", *options)
    assert run.returncode == 1 and re.search(complaint, run.stderr) and "Traceback" not in run.stderr


def written(spark, table, batches: int) -> TableWriter:
    """Writes a Bronze table and its quarantine, as if two days ago, in batches of one valid and one broken record."""
    writer = bronze_writer(spark, table)
    writer.write(records(spark), 0, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.checkpointInterval' = '2')")
    for batch in range(1, batches):
        writer.write(records(spark), batch, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        spark.sql(
            f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.logRetentionDuration' = 'interval 1 hour', "
            f"'delta.deletedFileRetentionDuration' = 'interval 0 hours')"
        )
        for seconds, file in enumerate(sorted(Path(path).rglob("*"))):
            os.utime(file, times=(time.time() - 172_800 + seconds,) * 2)
    return writer


def records(spark):
    raw = [F.lit(record).cast("binary") for record in (reading().decode(), "{")]
    return spark.range(1).select(
        F.explode(F.array(*raw)).alias("raw"),
        F.lit("f").alias("source_file"),
        F.current_timestamp().alias("ingest_time"),
    )


def test_read_delta_merges_small_files_and_removes_what_no_version_needs(spark, tmp_path, run_here):
    table = tmp_path / "bronze"
    written(spark, table, batches=4)
    (table / "left-by-a-crash.parquet").touch()
    os.utime(table / "left-by-a-crash.parquet", times=(0, 0))
    run = run_script("read_delta.py", table, "--optimize", "--vacuum")
    assert (run.returncode, run.stderr) == (0, "")
    assert (
        run.stdout
        == "Merged 4 files into 1.\nRemoved the files and log entries that no version from the last 0 hours needs.\n"
    )
    assert len(list(table.glob("*.parquet"))) == 1
    assert not (table / "_delta_log" / f"{0:020}.json").exists()
    assert run_here("read_delta.py", table).stdout.endswith(f"4 rows in {table}\n")


@pytest.mark.long
def test_a_stream_that_reads_a_table_survives_its_clean_up_and_stops_if_its_history_is_gone(
    spark, tmp_path, monkeypatch
):
    writer = written(spark, tmp_path / "silver", batches=4)
    [script] = re.findall(r"```python\n(.*?)```", Path(REPOSITORY, "docs", "operations.md").read_text(), re.DOTALL)
    monkeypatch.setattr("pipeline.paths.SILVER", writer.tables.table)
    monkeypatch.setattr("pipeline.spark.session.build_spark", lambda _: nullcontext(spark))
    script = re.sub('"(checkpoints|lake)/', f'"{tmp_path}/', script)

    def fahrenheit() -> list[float]:
        exec(script)
        return [row.fahrenheit for row in spark.read.format("delta").load(f"{tmp_path}/gold/fahrenheit").collect()]

    assert fahrenheit() == [21.5 * 1.8 + 32] * 4
    for batch in (998, 999):  # then cleans up
        writer.write(records(spark), batch, "test")
    assert not Path(writer.tables.table, "_delta_log", f"{0:020}.json").exists()
    assert len(fahrenheit()) == 6

    for batch in range(1996, 2000):
        for seconds, file in enumerate(sorted(Path(writer.tables.table).rglob("*"))):
            os.utime(file, times=(time.time() - 172_800 + seconds,) * 2)
        writer.write(records(spark), batch, "test")
    with pytest.raises(StreamingQueryException, match="DELTA_MISSING_FILES_UNEXPECTED_VERSION"):
        fahrenheit()


@pytest.mark.long
def test_a_stream_removes_what_no_version_needs_each_thousand_batches(spark, tmp_path):
    writer = written(spark, tmp_path / "bronze", batches=4)
    writer.write(records(spark), 998, "test")
    assert all(
        Path(path, "_delta_log", f"{0:020}.json").exists() for path in (writer.tables.table, writer.tables.quarantine)
    )
    writer.write(records(spark), 999, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        assert not Path(path, "_delta_log", f"{0:020}.json").exists()
        assert spark.read.format("delta").load(path).count() == 6
