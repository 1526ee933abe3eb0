"""Checkpoints and tables that do not belong together, and two streams with one checkpoint."""

import itertools
import os
import re
import shutil
import tarfile
import time
from pathlib import Path

from pipeline.paths import quarantine_of
from pipeline.streaming.errors import explain
from pipeline.streaming.writer import TableWriter
from pipeline.terminal.errors import PipelineError

import pytest
from pyspark.errors import StreamingQueryException

from helpers.files import put
from helpers.processes import REPOSITORY, acknowledged, run_script
from helpers.records import reading
from helpers.topics import origins, world_of

CONSUMER = "spark_kafka_consumer.py"


@pytest.mark.parametrize("place", [str, quarantine_of])
def test_a_table_that_is_deleted_while_the_stream_runs_stops_it_and_can_be_put_back(world, account, tmp_path, place):
    world = world()
    world.make(1)
    world.send(reading(), b"{")
    assert world.consume() == (1, 1)
    table, away = place(world.options.table), tmp_path / "away"

    class Deleting(TableWriter):
        def write(self, *batch):
            os.rename(table, away)
            return super().write(*batch)

    world.send(reading(), b"{")
    with pytest.raises(PipelineError, match=f"Somebody deleted the table {table} while the stream was running"):
        world.consume(Deleting)
    assert not os.path.exists(table)
    with pytest.raises(PipelineError, match="there is no such table"):
        world.consume()
    os.rename(away, table)
    world.consume()
    world.check(account, "a table deleted while the stream runs, and put back")


@pytest.mark.parametrize("which", [str, quarantine_of])
def test_a_table_that_is_replaced_by_a_copy_while_the_stream_runs_stops_it(world, tmp_path, account, which):
    """Without this, a disk that is mounted late would get records of a stream that has started from the beginning."""
    world = world()
    world.make()
    world.send(reading(), b"{")
    world.consume()
    table, other = which(world.options.table), str(tmp_path / "other")
    shutil.copytree(table, other)
    world.options.max_offsets_per_trigger = 2

    class Replacing(TableWriter):
        def write(self, batch, number, stream):
            if number == 2:
                os.rename(table, f"{other}_before")
                os.rename(other, table)
            return super().write(batch, number, stream)

    world.send(reading(), b"{", reading(), b"{")
    with pytest.raises(PipelineError, match=f"another table took the place of {table}"):
        world.consume(Replacing)
    with pytest.raises(PipelineError, match="is an older copy|older version"):
        world.consume()
    shutil.rmtree(table)
    os.rename(f"{other}_before", table)
    world.consume()
    world.check(account, "a table replaced while the stream runs, and put back")


def test_a_checkpoint_and_tables_that_do_not_belong_together_are_refused(world, ingest, tmp_path, account):
    """For both streams: a deleted checkpoint, swapped checkpoints, a deleted table, and another topic."""
    kafka, other, (folder, run) = world(), world(), ingest
    for each in (kafka, other):
        each.make(2)
    kafka.send(reading(), b"{")
    put(folder, "1.json", reading(), b"{")
    assert (kafka.consume(), run()) == ((1, 1), (1, 1))
    rows = kafka.rows()
    kafka.send(reading(), b"[", partition=1)
    put(folder, "2.json", reading(), b"[")
    away, silver, bronze = tmp_path / "away", Path(kafka.options.checkpoint), tmp_path / "checkpoint"

    os.rename(silver, away)
    with pytest.raises(PipelineError, match="was not written with the checkpoint"):
        kafka.consume()
    shutil.rmtree(silver, ignore_errors=True)
    os.rename(bronze, silver)
    os.rename(away, bronze)
    for consume in (kafka.consume, run):
        with pytest.raises(PipelineError, match="was not written with the checkpoint"):
            consume()
    os.rename(bronze, away)
    os.rename(silver, bronze)
    os.rename(away, silver)
    for table in (kafka.options.table, quarantine_of(kafka.options.table)):
        os.rename(table, away)
        with pytest.raises(PipelineError, match="there is no such table"):
            kafka.consume()
        os.rename(away, table)
    other.options = kafka.options
    with pytest.raises(
        PipelineError, match=f"belongs to the topic {kafka.topic.name}. Give the topic {other.topic.name} a --table"
    ):
        other.consume()

    assert kafka.rows() == rows
    assert (kafka.consume(), run()) == ((1, 1), (1, 1))  # everything is back in its place
    kafka.check(account, "checkpoints and tables deleted and swapped, refused each time; then put back")


def test_an_older_copy_and_a_damaged_checkpoint_are_refused(ingest, tmp_path):
    folder, run = ingest
    places = ("checkpoint", "bronze", "bronze_quarantine")

    def put_back(**moments: int) -> None:
        for place, number in moments.items():
            shutil.rmtree(tmp_path / place)
            shutil.copytree(tmp_path / f"copy {number}" / place, tmp_path / place)

    for number in (1, 2):
        put(folder, f"{number}.json", reading(), b"{")
        assert run() == (1, 1)
        for place in places:
            shutil.copytree(tmp_path / place, tmp_path / f"copy {number}" / place)
    put(folder, "3.json", reading(), b"{")

    for older, what in (("checkpoint", "checkpoint"), ("bronze", "table")):
        put_back(**{older: 1})
        with pytest.raises(PipelineError, match=f"The {what} is an older copy"):
            run()
        put_back(**{older: 2})
    for file, content in itertools.product(("metadata", "offsets/1", "sources/0/1"), (b"", b"\0" * 50)):
        damaged = tmp_path / "checkpoint" / file
        damaged.with_name(f".{damaged.name}.crc").unlink(missing_ok=True)
        damaged.write_bytes(content)
        with pytest.raises((PipelineError, StreamingQueryException)) as error:
            run()
        said = (
            str(error.value) if isinstance(error.value, PipelineError) else explain(error.value, "table", "checkpoint")
        )
        assert re.search("The checkpoint .* is damaged: ", said or ""), (file, content, error.value)
        put_back(checkpoint=2)

    put_back(**dict.fromkeys(places, 1))
    assert run() == (2, 2)  # everything that arrived since that copy


def test_a_second_stream_on_the_same_checkpoint_is_refused(spark, broker, silver, start, produce, account):
    topic, options = silver
    first = start(CONSUMER, *options, "--trigger", "0 seconds")
    producer = produce(topic)
    first.wait_for("batch")
    run = run_script(CONSUMER, *options, "--once")
    assert run.returncode == 1 and run.stderr.startswith(
        f"error: Another stream is using the checkpoint {options[-1]}. Stop that one"
    )
    first.wait_for("batch", times=3)
    delivered = acknowledged(producer)
    assert first.stop() == 0
    world_of(spark, options).consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("a second consumer on the same checkpoint", in_topic, *arrived)
    assert delivered == len(in_topic)


@pytest.mark.long
def test_two_streams_where_there_is_no_lock_write_nothing_twice(spark, broker, silver, start, produce, account):
    topic, options = silver
    # URIs are not locked, as on an object store.
    options = [*options[:-1], f"file://{options[-1]}"]
    producer = produce(topic)
    producer.wait_for("acknowledged")
    two = [start(CONSUMER, *options, "--trigger", "0 seconds")]
    two[0].wait_for("batch")
    two.append(start(CONSUMER, *options, "--trigger", "0 seconds"))
    while all(stream.process.poll() is None for stream in two):
        time.sleep(0.2)
    first, second = sorted(two, key=lambda stream: stream.process.poll() is not None)
    assert second.wait() == 1 and "error: Another stream is using the checkpoint file://" in second.output
    first.wait_for("batch", times=first.output.count("batch") + 1)
    delivered = acknowledged(producer)
    assert first.stop() == 0
    assert "Traceback" not in first.output + second.output
    world_of(spark, options).consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("two streams with one checkpoint, without a lock", in_topic, *arrived)
    assert delivered == len(in_topic)


def test_a_table_and_a_checkpoint_of_an_earlier_version_are_continued(ingest, tmp_path, capsys):
    """They were written while the modules of the pipeline were still called `common`."""
    folder, run = ingest
    with tarfile.open(REPOSITORY / "tests" / "data" / "bronze_of_earlier_version.tar.gz") as stored:
        stored.extractall(tmp_path, filter="data")
    for entry in (tmp_path / "checkpoint" / "sources" / "0").iterdir():
        entry.write_text(entry.read_text().replace("/tmp/up/in/", f"{folder}/"))
    assert run.rows() == [4, 2]
    put(folder, "c.json", reading(), b"{")
    assert run() == (1, 1) and run() == (0, 0)
    assert run.rows() == [5, 3] and capsys.readouterr().err == ""
