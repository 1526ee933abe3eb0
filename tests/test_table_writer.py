"""Writing a batch to a table and its quarantine, in cases that a whole stream meets only now and then."""

import re

from pipeline.contract.contract import Contract
from pipeline.contract.fields import Number
from pipeline.streaming import writer as table_writer
from pipeline.streaming.batches import batch_line
from pipeline.streaming.source import Backlog
from pipeline.streaming.writer import MAX_KEPT_BYTES, BatchReport, TableWriter

import pytest
from pyspark.sql import functions as F

from helpers.records import reading
from helpers.streams import bronze_writer

VALID, BROKEN, LONG = reading(), b"{", reading(value=500, note="x" * MAX_KEPT_BYTES)


@pytest.fixture
def writer(spark, tmp_path):
    return bronze_writer(spark, tmp_path / "bronze")


def batch_of(spark, *records: bytes):
    return spark.createDataFrame([(record,) for record in records], "raw BINARY").select(
        "raw", F.lit("file").alias("source_file"), F.lit("2026-11-20T08:00:00Z").cast("timestamp").alias("ingest_time")
    )


def rows_of(spark, writer) -> tuple[int, list[bytes]]:
    """The row count of the table, and the records in the quarantine."""
    rejected = spark.read.format("delta").load(writer.tables.quarantine).collect()
    return spark.read.format("delta").load(writer.tables.table).count(), sorted(bytes(row.raw) for row in rejected)


@pytest.mark.parametrize("rejected", [[BROKEN], [BROKEN, LONG]], ids=["kept in memory", "too long to be kept"])
def test_each_record_of_a_batch_is_in_one_of_the_tables(spark, writer, rejected):
    report = writer.write(batch_of(spark, VALID, *rejected, VALID), 0, "test")
    assert rows_of(spark, writer) == (2, rejected)
    assert report.rows == {None: 2, "malformed_json": 1} | ({"out_of_range": 1} if LONG in rejected else {})


def test_rejected_records_of_a_file_with_a_long_path_are_not_kept_in_memory(spark, writer, monkeypatch):
    kept = []
    rejected = TableWriter._rejected
    monkeypatch.setattr(
        TableWriter,
        "_rejected",
        lambda self, judged, found: [kept.append(len(found["kept"] or ())), rejected(self, judged, found)][1],
    )
    batch = batch_of(spark, VALID, BROKEN)
    writer.write(batch, 0, "test")
    writer.write(batch.withColumn("source_file", F.repeat(F.lit("x"), F.lit(MAX_KEPT_BYTES))), 1, "test")
    assert rows_of(spark, writer) == (2, [BROKEN, BROKEN]) and kept == [1, 0]


@pytest.mark.parametrize("crash", ["between the writes", "after them"])
def test_a_batch_that_is_repeated_after_a_crash_is_written_where_it_is_missing(spark, writer, monkeypatch, crash):
    def append(records, table, *rest):
        if table == writer.tables.quarantine:
            raise MemoryError
        TableWriter._append(writer, records, table, *rest)

    records = batch_of(spark, VALID, BROKEN)
    if crash == "between the writes":
        monkeypatch.setattr(writer, "_append", append)
        with pytest.raises(MemoryError):
            writer.write(records, 0, "test")
        assert rows_of(spark, writer) == (1, [])
        monkeypatch.undo()
    else:
        writer.write(records, 0, "test")
    report = writer.write(records, 0, "test")
    assert rows_of(spark, writer) == (1, [BROKEN])
    assert report.rows == {None: 1, "malformed_json": 1}


def test_a_batch_with_more_reasons_than_are_counted_one_by_one_loses_no_record(spark, tmp_path):
    rules = {f"is_{number}": f"value = {number}" for number in range(800)}
    writer = bronze_writer(spark, tmp_path / "bronze", Contract((Number("value"),), rules))
    records = [
        b'{"value": %d, "note": "%s"}' % (number, b"x" * (number // 700 * MAX_KEPT_BYTES)) for number in range(800)
    ]
    report = writer.write(batch_of(spark, *records), 0, "test")
    assert report.rows == dict.fromkeys(rules, 1)
    assert rows_of(spark, writer) == (0, sorted(records))


def test_a_clean_up_that_fails_stops_no_batch(spark, writer, monkeypatch, capsys):
    def fail(spark, path):
        spark.sql("VACUUM delta.`/nowhere`")

    monkeypatch.setattr(table_writer, "CLEAN_UP_EVERY", 1)
    monkeypatch.setattr(table_writer, "clean_up", fail)
    writer.write(batch_of(spark, VALID, BROKEN), 0, "test")
    assert rows_of(spark, writer) == (1, [BROKEN])
    assert capsys.readouterr().err.count("can't be removed: ") == 2


def test_records_with_unknown_fields_are_counted_and_no_others(spark, writer):
    records = [
        reading(battery=1),
        VALID,
        VALID.replace(b"}", b', "floor": 1e1}'),
        reading(unit="°C", device_id='"'),
        reading(a={}, b=1),
    ]
    report = writer.write(batch_of(spark, *records), 0, "test")
    assert (report.with_unknown, report.unknown) == (2, ["a", "b", "battery"])
    report = writer.write(batch_of(spark, *(reading(**{f"m{number}": 1}) for number in range(300))), 1, "test")
    assert report.with_unknown == 300 and 10 < len(report.unknown) < 300
    assert re.search(
        r"300 with fields unknown to the contract: (m\d+, ){9}m\d+ and \d+ more$",
        batch_line(report, {"batchId": 7, "batchDuration": 1}, None),
    )


def test_small_files_of_an_earlier_process_are_merged_once(spark, writer, tmp_path):
    batches = [batch_of(spark, VALID, BROKEN) for _ in range(4)]
    writer.write(batches[0], 0, "test")
    delta = spark._jvm.org.apache.spark.sql.delta
    delta.stats.AutoCompactPartitionStats.instance(spark._jsparkSession).resetTestOnly()  # as in a new process
    restarted = bronze_writer(spark, tmp_path / "bronze")
    for number, batch in enumerate(batches[1:], 1):
        restarted.write(batch, number, "test")
    for table in (writer.tables.table, writer.tables.quarantine):
        history = spark.sql(f"DESCRIBE HISTORY delta.`{table}`").collect()
        assert [row.operation for row in history].count("OPTIMIZE") == 1
    assert rows_of(spark, writer) == (4, [BROKEN] * 4)


def test_the_line_of_a_batch_says_how_long_the_rest_takes_and_no_field_of_a_record_steers_the_terminal():
    report = BatchReport({None: 900, "b": 60, "a": 30, "c": 30, "d": 10}, 2, ["\x1b]0;gone\x07", "x\nerror: y"], None)
    progress = {"batchId": 7, "batchDuration": 2000}
    assert batch_line(report, progress, Backlog(2060, "messages behind", 1030)) == (
        "batch 7: 1,030 rows in, 900 accepted, 130 rejected (b 60, a 30, c 30 and 1 more), 2.0 s, "
        "2,060 messages behind (4 s at this rate), "
        "2 with fields unknown to the contract: \ufffd]0;gone\ufffd, x\ufffderror: y"
    )
    assert (
        batch_line(BatchReport({None: 1}, 0, [], None), progress, None)
        == "batch 7: 1 rows in, 1 accepted, 0 rejected, 2.0 s"
    )
