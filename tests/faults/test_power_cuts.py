"""Power cuts that leave files empty or missing, copied checkpoints, and batches judged differently when read again."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

from pipeline.contract.contract import INCONSISTENT, OVERSIZED, Contract
from pipeline.contract.fields import Number
from pipeline.delta.tables import silver_tables
from pipeline.kafka.source import KafkaSource
from pipeline.streaming.private import LAST_BATCH, Checkpoint
from pipeline.streaming.start import Start
from pipeline.streaming.writer import MAX_KEPT_BYTES, TableWriter
from pipeline.terminal.errors import PipelineError

import pytest
from delta.tables import DeltaTable
from kafka import KafkaAdminClient, TopicPartition
from py4j.protocol import Py4JJavaError
from pyspark.errors import StreamingQueryException
from pyspark.sql import functions as F

from helpers.files import put
from helpers.records import reading
from helpers.streams import GivenRecords, plan


@pytest.fixture(scope="module")
def copy_of_two_batches(tmp_path_factory):
    return tmp_path_factory.mktemp("two batches") / "copy"


@pytest.fixture
def two_batches(ingest, tmp_path, copy_of_two_batches):
    """A folder and its stream, which has written two batches of one valid and one broken record each.

    They are written once; later tests get copies.
    """
    folder, run = ingest
    if copy_of_two_batches.exists():
        shutil.copytree(copy_of_two_batches, tmp_path, dirs_exist_ok=True)
        log = tmp_path / "checkpoint" / "sources" / "0"
        for entry in log.glob("[0-9]"):
            (log / f".{entry.name}.crc").unlink(missing_ok=True)
            entry.write_text(re.sub("file://.*/input/", f"file://{folder}/", entry.read_text()))
    else:
        write_two_batches(folder, run)
        shutil.copytree(tmp_path, copy_of_two_batches)
    return folder, run


def write_two_batches(folder, run) -> None:
    for number in (1, 2):
        put(folder, f"{number}.json", reading(), b"{")
        assert run() == (1, 1)


def newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("table", ["bronze", "bronze_quarantine"])
@pytest.mark.parametrize("pattern", ["*.parquet", "_delta_log/*.json"])
@pytest.mark.parametrize("damage", ["removed", "emptied"])
def test_a_start_names_the_newest_file_of_a_table_that_is_not_there_as_it_was_written(
    two_batches, tmp_path, table, pattern, damage
):
    folder, run = two_batches
    file = newest(tmp_path / table, pattern)
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    else:
        os.truncate(file, 0)
    put(folder, "3.json", reading(), b"{")
    with pytest.raises(PipelineError, match=f"is damaged: .*{file.name}|is damaged: entry 2|is an older copy"):
        run()
    file.write_bytes(content)
    assert run() == (1, 1)


@pytest.mark.parametrize(
    "pattern, cut",
    [
        ("bronze/*.parquet", b""),
        ("bronze/_delta_log/*.json", b"\0" * 900),
        ("bronze_quarantine/*.parquet", b"\0" * 900),
        ("bronze_quarantine/_delta_log/*.json", b""),
    ],
)
def test_a_batch_that_the_disk_did_not_have_yet_is_written_again(two_batches, tmp_path, capsys, pattern, cut):
    """The power is cut after Delta's commit, but before the files are synced and the batch is recorded."""
    folder, run = two_batches
    put(folder, "3.json", reading(), b"{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write_last_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    newest(tmp_path, pattern).write_bytes(cut)
    run.stream()
    assert run.rows() == [3, 3]
    assert "perhaps after a power cut" in capsys.readouterr().out
    assert run() == (0, 0)


@pytest.mark.long
def test_no_commit_is_set_aside_that_would_not_be_written_again(two_batches, tmp_path, spark):
    """The checkpoint is an older copy or belongs to another table, or somebody has changed rows since."""
    folder, run = two_batches
    run(table=str(tmp_path / "second"), checkpoint=str(tmp_path / "checkpoint_of_second"))
    shutil.copytree(tmp_path / "checkpoint", tmp_path / "checkpoint_copied")
    run_on = {"table": str(tmp_path / "bronze"), "checkpoint": str(tmp_path / "checkpoint")}
    for number in (3, 4):
        put(folder, f"{number}.json", reading(), b"{")
        run(**run_on)
    shutil.copytree(tmp_path / "bronze", tmp_path / "bronze_before")
    damaged = sorted((tmp_path / "bronze").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)[-2]
    os.truncate(damaged, 0)
    for checkpoint, problem in (
        ("copied", "is an older copy"),
        ("of_second", "was not written with"),
        ("", "is damaged"),
    ):
        with pytest.raises(PipelineError, match=problem):
            run(**run_on | {"checkpoint": f"{tmp_path}/checkpoint_{checkpoint}".rstrip("_")})

    shutil.rmtree(tmp_path / "bronze")
    shutil.copytree(tmp_path / "bronze_before", tmp_path / "bronze")
    put(folder, "5.json", reading(), b"{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write_last_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**run_on)
    written = newest(tmp_path / "bronze", "*.parquet")
    DeltaTable.forPath(spark, run_on["table"]).delete("source_file LIKE '%1.json'")
    os.truncate(written, 0)
    with pytest.raises(PipelineError, match="is damaged"):
        run(**run_on)
    assert not list(tmp_path.rglob("*.cut"))


def test_rows_that_were_deleted_after_a_crash_do_not_come_back(two_batches, tmp_path, spark, capsys):
    folder, run = two_batches
    put(folder, "3.json", *[reading(device_id=name) for name in ("kept", "erased")], b"{")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write_last_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    DeltaTable.forPath(spark, str(tmp_path / "bronze")).delete("device_id = 'erased'")
    run.stream()
    assert run.rows() == [3, 3]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "pattern",
    [
        "bronze/*.parquet",
        "bronze/_delta_log/*{}.json",
        "bronze_quarantine/*.parquet",
        "bronze_quarantine/_delta_log/*{}.json",
    ],
)
def test_a_power_cut_during_the_first_batch_leaves_nothing_to_mend(ingest, tmp_path, monkeypatch, pattern, step):
    """The power is cut before the checkpoint records the tables, or after their first commits."""
    folder, run = ingest
    put(folder, "1.json", reading(), b"{")
    steps = itertools.count(1)
    write = Checkpoint.write_last_batch
    with monkeypatch.context() as patch:
        patch.setattr(
            Checkpoint, "write_last_batch", lambda *arguments: write(*arguments) if next(steps) < step else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run.stream()
    for file in tmp_path.glob(pattern.format(step - 1)):
        os.truncate(file, 0)
    run.stream()
    assert run.rows() == [1, 1]
    assert run() == (0, 0)


def test_empty_checksum_files_hide_no_whole_file(two_batches, tmp_path, spark):
    """Hadoop writes a checksum file beside each file and never syncs it."""
    folder, run = two_batches
    assert not list(tmp_path.rglob(".*.parquet.crc"))
    files = [path for table in ("bronze", "bronze_quarantine") for path in (tmp_path / table).rglob("*.parquet")]
    for path in files:  # as earlier versions or executors on other machines write them
        path.with_name(f".{path.name}.crc").touch()
    put(folder, "3.json", reading(), b"{")
    run.stream()
    assert run.rows() == [3, 3]


@pytest.mark.parametrize("left", ["_delta_log", "_delta_log/_staged_commits", "_delta_log/.tmp"])
def test_a_kill_while_a_table_is_created_stops_no_stream(ingest, tmp_path, left):
    folder, run = ingest
    for table in ("bronze", "bronze_quarantine"):
        (tmp_path / table / left).mkdir(parents=True)
    put(folder, "1.json", reading(), b"{")
    run.stream()
    assert run.rows() == [1, 1]


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_power_cut_before_the_first_batch_leaves_nothing_to_mend(ingest, tmp_path, is_planned):
    folder, run = ingest
    put(folder, "1.json", reading(), b"{")
    plan(run)
    for name in ("metadata", "offsets/0", "sources/0/0"):
        os.truncate(tmp_path / "checkpoint" / name, 0)
    if not is_planned:
        (tmp_path / "checkpoint" / "offsets" / "0").unlink()
    assert [run(), run()] == [(1, 1), (0, 0)]


@pytest.mark.parametrize("cut", ["", 'v1\n{"path'])
@pytest.mark.long
def test_a_batch_is_begun_again_whose_entry_a_power_cut_has_left_empty(ingest, tmp_path, capsys, cut):
    folder, run = ingest
    write_two_batches(folder, run)
    (tmp_path / "checkpoint" / "commits" / "1").write_text(cut)
    assert run() == (0, 0)
    for number, entry in enumerate(("offsets", "sources/0"), 2):
        put(folder, f"{number + 1}.json", reading(), b"{")
        plan(run)
        (tmp_path / "checkpoint" / entry / str(number)).write_text(cut)
        assert run() == (1, 1)
    assert capsys.readouterr().out.count("is incomplete, perhaps because of a power cut") == 3
    assert run() == (0, 0)


def test_files_are_found_again_if_the_power_was_cut_before_their_batch_was_planned(two_batches, tmp_path):
    folder, run = two_batches
    (tmp_path / "checkpoint" / "sources" / "0" / "2").write_text("")
    put(folder, "3.json", reading(), b"{")
    assert [run(), run()] == [(1, 1), (0, 0)]


@pytest.mark.parametrize("lost", ["", None], ids=["emptied", "removed"])
def test_a_batch_is_repeated_although_the_disk_has_the_files_of_the_next_one(ingest, tmp_path, lost):
    folder, run = ingest
    write_two_batches(folder, run)
    put(folder, "3.json", reading(), b"{")
    plan(run)
    for name in ("commits/1", "offsets/2"):
        file = tmp_path / "checkpoint" / name
        file.with_name(f".{file.name}.crc").unlink(missing_ok=True)
        file.unlink()
        if lost is not None:
            file.write_text(lost)
    assert [run(), run()] == [(1, 1), (0, 0)]


def test_a_plan_of_kafka_is_kept_if_it_is_whole_and_made_again_if_it_goes_back(world, capsys):
    """The Kafka source's own entry in the checkpoint begins with a zero byte."""
    world = world()
    world.make(1)
    world.send(*[reading()] * 5)
    assert world.consume() == (5, 0)
    for goes_back in (False, True):
        world.send(*[reading()] * 3)
        plan(world.consume)
        planned = max(Path(world.options.checkpoint, "offsets").glob("[0-9]*"), key=lambda path: int(path.name))
        *others, end = planned.read_text().split("\n")
        if goes_back:
            planned.write_text("\n".join([*others, json.dumps({world.topic.name: {"0": 4}})]))
        assert world.consume() == (3, 0)
        assert planned.read_text().endswith(end)
        said = capsys.readouterr().out
        assert ("was planned to end before it begins" in said) == goes_back and "is cut" not in said


def test_a_first_batch_that_was_planned_and_lost_by_kafka_is_not_planned_again_in_silence(world, broker):
    world = world()
    world.make(1)
    world.send(*[reading()] * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "_append_valid", lambda *_: 1 / 0)  # the tables exist and are empty
        with pytest.raises(ZeroDivisionError):
            world.consume()
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.delete_records({TopicPartition(world.topic.name, 0): 8})
    with pytest.raises((StreamingQueryException, Py4JJavaError), match="may have been lost|out of range|KafkaDataLoss"):
        world.consume()


def test_two_copies_of_a_checkpoint_do_not_take_each_others_batches_for_their_own(two_batches, tmp_path):
    folder, run = two_batches
    checkpoint, copy = str(tmp_path / "checkpoint"), str(tmp_path / "copy")
    shutil.copytree(checkpoint, copy)
    put(folder, "3.json", reading(), b"{")
    plan(run, checkpoint=copy)
    (folder / "3.json").rename(tmp_path / "3.json")
    put(folder, "4.json", reading())
    assert run(checkpoint=checkpoint) == (1, 0)
    (tmp_path / "3.json").rename(folder / "3.json")
    with pytest.raises(PipelineError, match="Batch 2 .* does not match the checkpoint"):
        run(checkpoint=copy)
    assert run(checkpoint=checkpoint) == (1, 1)
    with pytest.raises(PipelineError, match="The checkpoint is an older copy"):
        run(checkpoint=copy)


def test_a_repeated_batch_is_the_same_though_its_file_is_gone(two_batches, tmp_path):
    folder, run = two_batches
    for name in ("3.json", "4.json"):
        put(folder, name, reading())
    assert run() == (2, 0)
    (tmp_path / "checkpoint" / "commits" / "2").unlink()
    (folder / "3.json").unlink()
    assert run() == (0, 0)


@pytest.mark.parametrize("crash", [False, True])
def test_a_verdict_that_changes_loses_no_record_and_doubles_none(spark, tmp_path, monkeypatch, capsys, crash):
    """Such rules are refused at the start. This is the second line of defense, should one get through."""

    class Given(GivenRecords):
        topic = "the topic"
        rejected_otherwise, knows_records = KafkaSource.rejected_otherwise, True

    contract = Contract((Number("value"),), {"coin": "xxhash64(value, CAST('now' AS TIMESTAMP)) % 2 = 0"})
    tables = silver_tables(str(tmp_path / "silver"), contract.columns)
    writer = TableWriter(tables, contract, Given(), Start(Checkpoint(spark, str(tmp_path / "checkpoint")), {}, {}))
    records = spark.range(400).select(
        F.format_string('{"value": %d}', "id").cast("binary").alias("raw"),
        F.format_string('{"value": %d}', "id").alias("raw_json"),
        F.lit("topic").alias("topic"),
        F.lit(0).alias("partition"),
        F.col("id").alias("offset"),
        F.when(F.col("id") % 3 > 0, F.timestamp_seconds("id")).alias("kafka_timestamp"),
        F.repeat(F.lit("k"), F.lit(0 if crash else MAX_KEPT_BYTES))
        .cast("binary")
        .alias("kafka_key"),  # unless empty, too long to be kept in memory
        F.timestamp_seconds(F.lit(1_795_000_000)).alias("ingest_time"),
    )
    if crash:
        with monkeypatch.context() as patch:
            patch.setattr(writer.source, "after_batch", lambda *_: 1 / 0)
            append = TableWriter._append
            patch.setattr(
                TableWriter,
                "_append",
                lambda self, records, table, *rest: (
                    append(self, records, table, *rest) if table == tables.table else None
                ),
            )
            with pytest.raises(ZeroDivisionError):
                writer.write(records, 0, "test")
    writer.write(records, 0, "test")
    accepted, rejected = (
        spark.read.format("delta").load(table).collect() for table in (tables.table, tables.quarantine)
    )
    assert sorted(row.offset for row in accepted + rejected) == list(range(400)) and 100 < len(accepted) < 300
    assert {row.reject_reason for row in rejected} == {"coin", INCONSISTENT}
    assert "was read twice, with different results" in capsys.readouterr().err
    note = json.loads((tmp_path / "checkpoint" / LAST_BATCH).read_text())
    assert note["versions"] == {"table": 1, "quarantine": 1}


def test_a_verdict_that_changes_and_changes_back_doubles_no_record(spark, tmp_path, monkeypatch):
    class Given(GivenRecords):
        topic = "the topic"
        rejected_otherwise, knows_records = KafkaSource.rejected_otherwise, True

    contract = Contract((Number("value"),))
    tables = silver_tables(str(tmp_path / "silver"), contract.columns)
    writer = TableWriter(tables, contract, Given(), Start(Checkpoint(spark, str(tmp_path / "checkpoint")), {}, {}))

    def write(too_large: list[int], fails_at: tuple) -> None:
        """Writes ten records: the last is broken, and this time those at the offsets `too_large` don't fit into memory."""
        records = spark.range(10).select(
            F.when(F.col("id").isin(too_large), OVERSIZED).alias("reject_reason"),
            F.when(F.col("id") == 9, "{").otherwise('{"value": 1}').cast("binary").alias("raw"),
            F.lit('{"value": 1}').alias("raw_json"),
            F.lit("topic").alias("topic"),
            F.lit(0).alias("partition"),
            F.col("id").alias("offset"),
            F.timestamp_seconds("id").alias("kafka_timestamp"),
            F.lit(b"k").alias("kafka_key"),
            F.timestamp_seconds(F.lit(1_795_000_000)).alias("ingest_time"),
        )
        with monkeypatch.context() as patch:
            patch.setattr(*fails_at, kill)
            with pytest.raises(ZeroDivisionError):
                writer.write(records, 0, "test")

    def kill(*_: object) -> None:
        raise ZeroDivisionError

    write([], fails_at=(TableWriter, "_quarantine_rejected"))
    write([5, 6, 7], fails_at=(writer.source, "after_batch"))
    write([], fails_at=(writer.source, "after_batch"))
    rows = [spark.read.format("delta").load(table).collect() for table in (tables.table, tables.quarantine)]
    assert [sorted(row.offset for row in each) for each in rows] == [list(range(9)), [9]]
