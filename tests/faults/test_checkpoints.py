"""Checkpoints and tables that don't belong together, and two streams with one checkpoint."""

import itertools
import os
import re
import shutil
import time

import pytest
from conftest import acknowledged, origins, run_script, tables
from pyspark.errors import StreamingQueryException
from test_files_to_bronze import put
from test_rules import reading

from common.console import PipelineError
from common.streams import explain
from common.tables import quarantine_of

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"


def refused(*command) -> str:
    run = run_script(*command)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


@pytest.fixture
def filled(silver, tmp_path, produce):
    """Both streams with their tables: the commands that go on with them, the places of their checkpoints, and a producer
    that runs."""
    topic, options = silver
    folder = tmp_path / "input"
    folder.mkdir()
    put(folder, "1.json", reading(), b"{")
    files = ["--input", folder, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "bronze_checkpoint"]
    producer = produce(topic)
    while not re.search(r"\d{3} acknowledged", producer.output):  # among which each kind of table has its share
        time.sleep(0.1)
    commands = [CONSUMER, *options, "--once"], [BRONZE, *files, "--once"]
    for command in commands:
        assert run_script(*command).returncode == 0
    return *commands, tmp_path / "checkpoint", tmp_path / "bronze_checkpoint", producer


def test_a_checkpoint_and_tables_that_do_not_belong_together_are_refused(spark, broker, filled, tmp_path, account):
    kafka, files, silver_checkpoint, bronze_checkpoint, producer = filled
    put(tmp_path / "input", "2.json", reading(), b"[")
    rows = [[table.count() for table in tables(spark, command)] for command in (kafka, files)]
    assert all(min(counts) > 0 for counts in rows)

    os.rename(silver_checkpoint, tmp_path / "away")  # the checkpoint deleted but not the table
    assert "was not written with the checkpoint" in refused(*kafka)
    shutil.rmtree(silver_checkpoint, ignore_errors=True)
    os.rename(bronze_checkpoint, silver_checkpoint)  # the two swapped
    os.rename(tmp_path / "away", bronze_checkpoint)
    assert "was not written with the checkpoint" in refused(*kafka)
    assert "was not written with the checkpoint" in refused(*files)
    os.rename(bronze_checkpoint, tmp_path / "away")
    os.rename(silver_checkpoint, bronze_checkpoint)
    os.rename(tmp_path / "away", silver_checkpoint)
    for table in (tmp_path / "silver", quarantine_of(str(tmp_path / "silver"))):  # a table deleted but not the checkpoint
        os.rename(table, tmp_path / "away")
        assert "there is no such table" in refused(*kafka)
        os.rename(tmp_path / "away", table)

    other = ["other" if argument == kafka[4] else argument for argument in kafka]  # another topic
    assert run_script(PRODUCER, *other[1:5], "--create-topic", "--count", 0).returncode == 0
    assert f"is that of the topic {kafka[4]}. Give the topic other a --table" in refused(*other)

    assert [[table.count() for table in tables(spark, command)] for command in (kafka, files)] == rows
    delivered = acknowledged(producer)
    for command in (kafka, files):  # all in its place again
        assert run_script(*command).returncode == 0
    in_topic, *arrived = origins(spark, broker, kafka)
    account("checkpoints and tables deleted and swapped, refused each time; then put back", in_topic, *arrived)
    assert delivered == len(in_topic) and [table.count() for table in tables(spark, files)] == [2, 2]


def test_an_older_copy_and_a_damaged_checkpoint_are_refused(spark, ingest, tmp_path):
    folder, run = ingest
    places = ("checkpoint", "bronze", "bronze_quarantine")

    def put_back(**moments: int) -> None:
        for place, number in moments.items():
            shutil.rmtree(tmp_path / place)
            shutil.copytree(tmp_path / f"copy {number}" / place, tmp_path / place)
        spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # as in a new process

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
    for file, content in itertools.product(("metadata", "offsets/1", "commits/1", "sources/0/1"), (b"", b"\0" * 50)):
        damaged = tmp_path / "checkpoint" / file
        damaged.with_name(f".{damaged.name}.crc").unlink(missing_ok=True)
        damaged.write_bytes(content)
        with pytest.raises((PipelineError, StreamingQueryException)) as error:
            run()
        said = str(error.value) if isinstance(error.value, PipelineError) else explain(error.value, "table", "checkpoint")
        assert re.search("The checkpoint .* is damaged: ", said or ""), (file, content, error.value)
        put_back(checkpoint=2)

    put_back(**dict.fromkeys(places, 1))
    assert run() == (2, 2)  # what came since that moment


def test_a_second_stream_on_the_same_checkpoint_is_refused(spark, broker, silver, start, produce, account):
    topic, options = silver
    first = start(CONSUMER, *options, "--trigger", "0 seconds")
    producer = produce(topic)
    first.wait_for("batch")
    assert f"Another stream works with the checkpoint {options[-1]}" in refused(CONSUMER, *options, "--once")
    first.wait_for("batch", times=3)
    delivered = acknowledged(producer)
    assert first.stop() == 0
    assert run_script(CONSUMER, *options, "--once").returncode == 0
    in_topic, *arrived = origins(spark, broker, options)
    account("a second consumer on the same checkpoint", in_topic, *arrived)
    assert delivered == len(in_topic)


def test_two_streams_where_there_is_no_lock_write_nothing_twice(spark, broker, silver, start, produce, account):
    topic, options = silver
    # As on an object store: a URI is not locked.
    options = [*options[:-1], f"file://{options[-1]}", "--trigger", "0 seconds"]
    producer = produce(topic)
    producer.wait_for("acknowledged")
    two = [start(CONSUMER, *options)]
    two[0].wait_for("batch")
    two.append(start(CONSUMER, *options))
    while all(stream.process.poll() is None for stream in two):
        time.sleep(0.2)
    first, second = sorted(two, key=lambda stream: stream.process.poll() is not None)
    assert second.wait() == 1 and "error: Another stream works with the checkpoint file://" in second.output
    first.wait_for("batch", times=first.output.count("batch") + 1)
    delivered = acknowledged(producer)
    assert first.stop() == 0
    assert "Traceback" not in first.output + second.output
    assert run_script(CONSUMER, *options, "--once").returncode == 0
    in_topic, *arrived = origins(spark, broker, options)
    account("two streams with one checkpoint, without a lock", in_topic, *arrived)
    assert delivered == len(in_topic)
