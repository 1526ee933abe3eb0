"""The reader scripts on real tables."""

import os
import re
import time
from pathlib import Path

import pytest
from conftest import bronze_writer, run_script
from pyspark.sql import functions as F
from test_rules import reading

from common.table_writer import TableWriter
from common.tables import WRITER, bronze_tables, create_table, silver_tables
from readings import CONTRACT


@pytest.fixture(scope="module")
def lake(spark, tmp_path_factory):
    """A lake with both tables: 30 readings whose order by time is none of writing, of files or of event_time alone."""
    folder = tmp_path_factory.mktemp("lake")
    for layer, tables in (("bronze", bronze_tables), ("silver", silver_tables)):
        pair = tables(table := str(folder / layer / "sensor_data"), CONTRACT.columns)
        create_table(spark, table, pair.columns, {WRITER: "test"}, adopt=False)
        create_table(spark, pair.quarantine, pair.quarantine_columns, {WRITER: "test"}, adopt=False)
        for batch in (1, 0, 2):  # versions 1, 2, 3
            readings = spark.range(10).selectExpr(
                f"concat('d', {batch} * 10 + id) AS device_id", "'A\x1b[31m' AS building", "double(id) AS value",
                # Within a batch the times fall as ids rise, and come closer than a millisecond.
                "timestamp_micros(1763600000000000 - id) AS event_time",
                f"timestamp_micros(1763700000000000 + {batch}) AS ingest_time", "'{\"whole\": \"record\"}' AS raw_json")
            if layer == "bronze":
                readings = readings.drop("raw_json")
            readings.coalesce(1).write.format("delta").mode("append").save(table)
        spark.range(3, numPartitions=1).selectExpr("'malformed_json' AS reject_reason", "CAST('{\x07' AS BINARY) AS raw",
                                  "now() AS ingest_time").write.format("delta").mode("append").save(f"{table}_quarantine")
    return folder


def column(output: str, name: str) -> list[str]:
    """The values of a column in a printed table."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line.startswith("|")]
    return [row[rows[0].index(name)] for row in rows[1:]]


@pytest.mark.parametrize("script, layer", [("read_bronze.py", "bronze"), ("read_silver.py", "silver")])
def test_the_newest_readings_come_first_with_the_counts_under_them(lake, script, layer):
    table = lake / layer / "sensor_data"
    run = run_script(script, "--table", table, "--limit", 12)
    assert (run.returncode, run.stderr) == (0, "")
    assert column(run.stdout, "device_id") == [f"d{20 + n}" for n in range(10)] + ["d10", "d11"]
    assert run.stdout.endswith(f"30 rows in {table}\n3 rows in {table}_quarantine\n")
    assert "raw_json" not in run.stdout and "\x1b" not in run.stdout and "A\ufffd[31m" in run.stdout


def test_raw_and_rejected_records_are_shown_when_asked_for(lake):
    table = lake / "silver" / "sensor_data"
    assert column(run_script("read_silver.py", "--table", table, "--raw").stdout, "raw_json") == ['{"whole": "record"}'] * 20
    run = run_script("read_silver.py", "--table", table, "--rejected")
    assert column(run.stdout, "reject_reason") == ["malformed_json"] * 3
    assert column(run.stdout, "raw") == ["{\ufffd"] * 3


def test_read_delta_shows_what_tables_there_are(lake):
    run = run_script("read_delta.py", "--lake", lake)
    assert (run.returncode, run.stderr) == (0, "")
    assert column(run.stdout, "table") == [f"{layer}/sensor_data{suffix}" for layer in ("bronze", "silver")
                                           for suffix in ("", "_quarantine")]
    assert column(run.stdout, "rows") == ["30", "3", "30", "3"]
    assert column(run.stdout, "last_commit") == ["WRITE"] * 4
    assert all(int(files) >= 1 for files in column(run.stdout, "live_files"))


def test_read_delta_sorts_and_travels_in_time(lake):
    table = lake / "silver" / "sensor_data"
    run = run_script("read_delta.py", table, "--sort-by", "value", "--limit", 4, "--version", 2)
    assert column(run.stdout, "value") == ["9.0", "9.0", "8.0", "8.0"]
    assert run.stdout.endswith(f"20 rows in {table}\n")
    history = run_script("read_delta.py", table, "--history").stdout
    assert column(history, "version") == ["3", "2", "1", "0"]
    assert column(history, "rows")[:3] == ["10", "10", "10"]
    when = column(history, "timestamp")[2]
    assert run_script("read_delta.py", table, "--timestamp", when).stdout.endswith(f"10 rows in {table}\n")


@pytest.mark.parametrize("options, complaint", [
    (["--version", "99"], r"version 99. Available versions: \[0, 3\]"),
    (["--timestamp", "yesterday-ish"], r"'yesterday-ish'"),
    (["--sort-by", "colour"], r"has no column colour; it has event_time, device_id, "),
])
def test_read_delta_says_what_is_wrong(lake, options, complaint):
    run = run_script("read_delta.py", lake / "silver" / "sensor_data", *options)
    assert run.returncode == 1 and re.search(complaint, run.stderr) and "Traceback" not in run.stderr


def written(spark, table, batches: int) -> TableWriter:
    """A Bronze table and its quarantine of so many batches of two records, one of them broken, made two days ago."""
    writer = bronze_writer(table)
    writer.write(records(spark), 0, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.checkpointInterval' = '2')")
    for batch in range(1, batches):
        writer.write(records(spark), batch, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        spark.sql(f"ALTER TABLE delta.`{path}` SET TBLPROPERTIES ('delta.logRetentionDuration' = 'interval 1 hour', "
                  f"'delta.deletedFileRetentionDuration' = 'interval 0 hours')")
        for seconds, file in enumerate(sorted(Path(path).rglob("*"))):
            os.utime(file, times=(time.time() - 172_800 + seconds,) * 2)
    return writer


def records(spark):
    raw = [F.lit(record).cast("binary") for record in (reading().decode(), "{")]
    return spark.range(1).select(F.explode(F.array(*raw)).alias("raw"), F.lit("f").alias("source_file"),
                                 F.current_timestamp().alias("ingest_time"))


def test_read_delta_merges_small_files_and_removes_what_no_version_needs(spark, tmp_path):
    table = tmp_path / "bronze"
    written(spark, table, batches=4)
    (table / "left-by-a-crash.parquet").touch()
    os.utime(table / "left-by-a-crash.parquet", times=(0, 0))
    run = run_script("read_delta.py", table, "--optimize", "--vacuum")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "Merged 4 files into 1.\nRemoved the files and log entries that no version of the last 0 hours needs.\n"
    assert len(list(table.glob("*.parquet"))) == 1
    assert not (table / "_delta_log" / f"{0:020}.json").exists()
    assert run_script("read_delta.py", table).stdout.endswith(f"4 rows in {table}\n")


def test_a_stream_removes_what_no_version_needs_each_thousand_batches(spark, tmp_path):
    writer = written(spark, tmp_path / "bronze", batches=4)
    writer.write(records(spark), 998, "test")
    assert all(Path(path, "_delta_log", f"{0:020}.json").exists() for path in (writer.tables.table, writer.tables.quarantine))
    writer.write(records(spark), 999, "test")
    for path in (writer.tables.table, writer.tables.quarantine):
        assert not Path(path, "_delta_log", f"{0:020}.json").exists()
        assert spark.read.format("delta").load(path).count() == 6
