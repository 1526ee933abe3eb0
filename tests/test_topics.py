"""Topics of every kind, read by the stream's own functions in one Spark session, and starts in every order."""

import argparse
import itertools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.contract.contract import MAX_RECORD_BYTES
from pipeline.delta.tables import bronze_tables, silver_tables
from pipeline.kafka.lookup import kafka_options
from pipeline.kafka.private import KafkaReader, kafka_offsets
from pipeline.kafka.records import records_of
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.stream import streams_of
from pipeline.kafka.topics import Topic
from pipeline.paths import quarantine_of
from pipeline.streaming import query as streams
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.query import run_query
from pipeline.streaming.source import SourceAwayError
from pipeline.streaming.start import Start
from pipeline.streaming.writer import NoMetrics, TableWriter
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.signals import StopFlag

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import InvalidTimestampError, MessageSizeTooLargeError
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from helpers.processes import PATIENCE, REPOSITORY, until
from helpers.records import reading
from helpers.streams import GivenRecords
from helpers.topics import origins, tables, world_of
from readings import CONTRACT

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"
VALID, BROKEN = reading(), b"{"


@pytest.mark.parametrize("partitions", [1, pytest.param(50, marks=pytest.mark.long)])
def test_an_empty_topic_stops_nothing_and_what_comes_later_is_read(world, account, partitions):
    world = world()
    world.make(partitions)
    assert [world.consume(), world.consume()] == [(0, 0), (0, 0)]
    world.send(VALID, BROKEN, partition=partitions - 1)
    assert [world.consume(), world.consume()] == [(1, 1), (0, 0)]
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, f"a topic of {partitions} partitions, empty at first")


def test_partitions_that_are_added_are_read(world, account):
    world = world()
    world.make(1)
    world.send(VALID)
    assert world.consume() == (1, 0)
    with KafkaAdminClient(bootstrap_servers=world.broker) as admin:
        admin.create_partitions({world.topic.name: 30})
    assert world.consume() == (0, 0)
    world.send(VALID, BROKEN, partition=29)
    assert world.consume() == (1, 1)
    world.check(account, "29 partitions added to a topic")


def test_a_batch_that_failed_for_want_of_a_record_goes_on(world, account):
    """The checkpoint is as earlier versions left it: the first batch is planned, but not done."""
    world = world()
    world.make(1)

    class Failing(TableWriter):
        def write(self, *batch):
            raise ValueError

    with pytest.raises(ValueError):
        world.consume(Failing)
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, "a checkpoint whose first batch failed")


@pytest.mark.long
def test_compressed_messages_are_read(world, account):
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        each = world()
        each.make(1, compression_type=codec)  # done by the broker
        each.send(*[VALID] * 20, BROKEN, linger_ms=50)
        assert each.consume() == (20, 1)
        # Without extra packages, kafka-python only reads gzip.
        account(f"messages compressed by {codec}", [(0, offset) for offset in range(21)], *each.rows())


def test_tombstones_are_records_and_stop_nothing(world, account):
    world = world()
    world.make(2)
    world.send(None, None, key=b"sensor-001")
    assert world.consume() == (0, 2)
    world.check(account, "tombstones only")


def test_a_compacted_topic_is_read_over_its_gaps(world, account):
    world = world()
    # The newest segment is never compacted. A record that arrives after 50 ms closes it.
    world.make(
        1,
        cleanup_policy="compact",
        segment_ms="50",
        min_cleanable_dirty_ratio="0.01",
        max_compaction_lag_ms="50",
        delete_retention_ms="0",
    )
    for key in (b"a", b"b", b"a", b"b", b"a", b"c"):
        world.send(VALID, VALID, VALID, key=key)
        time.sleep(0.1)
    world.options.max_offsets_per_trigger = 4  # so that some batches end in a gap, and others are all gap
    until(lambda: len(world.kept()) < 10)
    before = world.kept()
    world.consume()
    # Compaction continues meanwhile. Records that it has removed since then may be in the table; all others must be.
    rows = world.rows()
    account("a compacted topic", {*world.kept(), *set(before).intersection(rows[0])}, *rows)


def test_only_what_a_transaction_has_committed_is_read(world, account):
    world = world()
    world.make(2)
    with world.transaction() as producer:
        for commit in (True, False, True):
            for partition in (0, 0, 1):
                producer.send(world.topic.name, VALID, partition=partition)
            (producer.commit if commit else producer.abort)()
            producer.begin()
        assert world.consume() == (6, 0)
        producer.send(world.topic.name, VALID, partition=0)
        producer.abort()
        assert [world.consume(), world.consume()] == [(0, 0), (0, 0)]  # a batch of only aborted records, then none
        producer.begin()
        producer.send(world.topic.name, VALID, partition=0)
        world.send(VALID, BROKEN, partition=0)  # must wait for the transaction before it
        world.send(VALID, partition=1)
        assert world.consume() == (1, 0)
        producer.commit()
    assert world.consume() == (2, 1)
    world.check(account, "transactions, committed, aborted and open")


def noted(world) -> dict[int, int]:
    """The offsets that the stream has committed to Kafka."""
    with KafkaAdminClient(bootstrap_servers=world.broker) as admin:
        [places] = admin.list_group_offsets([world.topic.name]).values()
    return {place.partition: offset.offset for place, offset in places.items()}


def test_a_first_batch_of_aborted_records_stops_nothing(world, account):
    world = world()
    world.make(1)
    with world.transaction() as producer:
        producer.send(world.topic.name, VALID)
        producer.abort()
    assert world.consume() == (0, 0) and noted(world) == {0: 2}
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, "aborted records at first")


@pytest.mark.parametrize("codec", ["producer", "gzip", "snappy", "lz4", "zstd"])
def test_single_records_are_found_by_their_offsets_however_they_are_packed(world, broker, codec):
    world = world()
    world.make(4, compression_type=codec)
    world.send(*(b"%d" % number for number in range(2000)))
    world.send(b"first", None, partition=1, key=b"key")
    world.send(b"x" * 900_000, b"y" * 900_000, partition=2)
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.delete_records({TopicPartition(world.topic.name, 0): 1000})
    reader = KafkaReader(world.spark, kafka_options(world.topic))

    def read(offsets: dict[int, int], seconds: float = 10) -> tuple[list, set[int] | None]:
        ranges = {partition: (offset, offset + 1) for partition, offset in offsets.items()}
        return reader.records_between(world.topic.name, ranges, seconds, 10**6)

    def values(offsets: dict[int, int], seconds: float = 10) -> dict[int, bytes | None]:
        return {partition: value for partition, _, _, value in read(offsets, seconds)[0]}

    assert values({0: 1999, 1: 1, 2: 1}) == {0: b"1999", 1: None, 2: b"y" * 900_000}
    assert values({0: 1000, 1: 0}) == {0: b"1000", 1: b"first"}
    assert values({0: 999, 1: 1}) == {1: None}  # removed
    assert values({0: 2000, 3: 0}, seconds=0.3) == {}  # not there yet
    assert read({0: 2000, 1: 0, 3: 0}, 3)[1] == {0, 3}
    with world.transaction() as producer:
        producer.send(world.topic.name, b"aborted", partition=3)
        producer.abort()
    assert read({3: 0}) == ([], set())
    assert values({0: 2001, 2: 0}) == {2: b"x" * 900_000}
    assert values({}) == {}


@pytest.mark.parametrize("idle, outages", [(0, 3), (0.3, 8)])
def test_only_failures_without_a_quiet_time_between_them_are_counted_together(
    spark, tmp_path, monkeypatch, idle, outages
):
    """An idle topic has no batches to show that the stream has recovered."""

    class Source(GivenRecords):
        def wait_until_available(self, error, stopping) -> None:
            pass

    def run(*_):
        time.sleep(idle)
        seen.append(None)
        return (0, OSError("away")) if len(seen) <= 8 else (0, None)

    seen: list[None] = []
    monkeypatch.setattr(streams, "run_query", run)
    if idle:
        monkeypatch.setattr(streams, "RECOVERED_SECONDS", 0.2)
    monkeypatch.setattr(streams, "on_stop_signal", lambda _: None)
    monkeypatch.setattr(type(spark), "stop", lambda _: None)
    options = argparse.Namespace(
        table=str(tmp_path / "t"), checkpoint=str(tmp_path / "c"), readings="readings.py", once=True, metrics_port=None
    )
    arguments = (spark, [(None, {})], Source(), bronze_tables(options.table, CONTRACT.columns), CONTRACT, options)
    if outages == 8:
        streams.run_until_stopped(*arguments)
    else:
        with pytest.raises(
            PipelineError, match="failed 4 times in a row, though it answered in between: away. Nothing is lost"
        ):
            streams.run_until_stopped(*arguments)
    assert len(seen) == outages + 1


@pytest.mark.long
def test_the_last_record_of_a_batch_may_be_anything(world):
    """With each batch and at each start, it is compared with the record in Kafka."""
    world = world(request_timeout_ms="3000")
    world.make(1)
    for last in (b"", None, b"\xff\x00", b"x" * 900_000):
        world.send(VALID, last, key=b"key")
        assert world.consume() == (1, 1)
    world.send(VALID)
    assert [world.consume(), world.consume()] == [(1, 0), (0, 0)]


def test_what_kafka_removes_while_lost_records_are_passed_over_is_named(world, broker, capsys):
    world = world()
    world.make(2)
    world.send(*[VALID] * 30)
    world.send(VALID, partition=1)

    def remove(end: int) -> None:
        with KafkaAdminClient(bootstrap_servers=broker) as admin:
            admin.delete_records({TopicPartition(world.topic.name, 0): end})

    class Slow(TableWriter):
        def write(self, *arguments):
            remove(65)
            return super().write(*arguments)

    assert world.consume() == (31, 0)
    world.send(*[VALID] * 20)
    remove(15)
    assert world.consume(accept_data_loss=True) == (20, 0)
    assert "removed more records" not in capsys.readouterr().out
    world.send(*[VALID] * 20)
    remove(55)
    assert world.consume(Slow, accept_data_loss=True) == (5, 0)
    said = capsys.readouterr().out
    assert "unread records of the topic" in said and "partition 0 offsets 50 to 54" in said
    assert "while the stream caught up: partition 0 offsets 55 to 64. Those it had not read yet are lost." in said


def test_a_batch_that_was_planned_for_another_topic_is_not_read_from_it(world):
    one, other = world(), world()
    for each in (one, other):
        each.make(1)
        each.send(VALID)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.consume()
    other.options = one.options
    with pytest.raises(
        PipelineError, match=f"has begun a batch of the topic {one.topic.name}. Give the topic {other.topic.name} its"
    ):
        other.consume()
    assert one.consume() == (1, 0)


@pytest.mark.long
def test_uncommitted_records_are_read_where_the_user_wants_them_and_committed_ones_wait_for_them(world, account):
    world, committed = world(isolation_level="read_uncommitted"), world()
    world.make(1)
    committed.topic.name, committed.options = world.topic.name, world.options
    world.send(VALID)
    with world.transaction() as producer:
        producer.send(world.topic.name, VALID)
        assert world.consume() == (2, 0)
        with pytest.raises(PipelineError, match="a transaction is still open in partition 0 from offset 1 on"):
            committed.consume()
        producer.abort()
    world.send(VALID)
    assert committed.consume() == (1, 0)
    world.check(account, "uncommitted records")


def test_an_isolation_level_that_there_is_not_is_said():
    with pytest.raises(PipelineError, match="isolation.level is serializable; it must be read_committed or"):
        Topic("localhost:9092", "t", {"isolation.level": "serializable"})


def test_kafka_knows_how_far_the_stream_is_and_where_it_must_not_be_told_the_stream_goes_on(world, account, capsys):
    each = world()
    each.make(2)
    each.send(VALID, BROKEN)
    each.send(VALID, partition=1)
    assert each.consume() == (2, 1) and noted(each) == {0: 2, 1: 1}
    each.send(VALID)
    assert each.consume() == (1, 0) and noted(each) == {0: 3, 1: 1}
    with KafkaConsumer(
        each.topic.name,
        bootstrap_servers=each.broker,
        group_id=each.topic.name,
        enable_auto_commit=False,
        max_poll_interval_ms=90_000,
    ) as member:
        until(lambda: member.poll(100) or member.assignment())
        assert capsys.readouterr().err == ""
        each.send(*[VALID] * 250)  # three batches
        assert each.consume() == (250, 0) and noted(each) == {0: 3, 1: 1}
        assert capsys.readouterr().err.count(f"the lag of the group {each.topic.name}") == 1
    each.check(account, "a consumer group that has another member")


def test_a_batch_that_fails_while_the_stream_is_being_stopped_is_said(spark, world):
    world, stopping = world(), StopFlag()
    world.make(1)
    world.send(VALID)
    world.options.accept_data_loss = False
    source = KafkaSource(world.topic, accept_data_loss=False, group="g")
    [(stream, trigger)] = streams_of(spark, source, world.options)

    class Failing(TableWriter):
        def write(self, *batch):
            stopping.set()
            raise ValueError("the disk is full")

    start = Start(Checkpoint(spark, world.options.checkpoint), {}, {})
    writer = Failing(silver_tables(world.options.table, CONTRACT.columns), CONTRACT, source, start)
    written, error = run_query(stream, trigger, writer, world.options.checkpoint, stopping, NoMetrics())
    assert written == 0 and str(error) == "the disk is full"


def test_what_speaks_no_kafka_is_no_broker_and_nothing_is_left_of_the_attempt():
    """Runs in its own process, because the clients of other tests open and close sockets at any time."""
    code = """if True:
        import os, sys, threading
        from pipeline.kafka.brokers import NoBrokerError
        from pipeline.kafka.topics import Topic
        def attempt():
            try:
                Topic(sys.argv[1], "t").wait(0)
            except NoBrokerError as error:
                assert "No Kafka broker answers" in str(error)
                return threading.active_count(), len(os.listdir("/proc/self/fd"))
        first = attempt()
        assert first and attempt() == first, first
    """
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = f"localhost:{other.getsockname()[1]}"
        run = subprocess.run(
            [sys.executable, "-c", code, server], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE
        )
    assert run.returncode == 0, run.stderr


def test_a_topic_whose_name_is_that_of_another_to_kafka_is_refused_with_the_reason(broker, silver, run_here):
    topic, _ = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    other = topic[3].replace("_", ".")
    run = run_here(PRODUCER, *topic[:3], other, "--create-topic", "--count", 0)
    assert run.returncode == 1 and run.stderr.startswith(
        f'error: Kafka refuses to create the topic "{other}" on {broker} (InvalidTopic'
    )


@pytest.mark.parametrize("name", ["sénsor", "a b", "", ".", "x" * 250])
def test_a_topic_that_cannot_be_is_refused_at_the_start(name, run_here):
    run = run_here(PRODUCER, "--topic", name, "--create-topic")
    assert run.returncode == 2 and "is not a valid topic name" in run.stderr


@pytest.mark.parametrize(
    "servers", ["localhost", "localhost:kafka", "localhost:99999", "localhost:9092,other", "::1:9092"]
)
def test_an_address_that_cannot_be_is_said(servers, run_here):
    run = run_here(PRODUCER, "--bootstrap-servers", servers)
    assert run.returncode == 1 and "is not the address of a Kafka broker (HOST:PORT)" in run.stderr


def test_a_file_of_properties_may_come_from_windows(broker, silver, tmp_path, run_here):
    (tmp_path / "kafka.properties").write_bytes(f"bootstrap.servers={broker}\r\nretries=3\r\n".encode("utf-8-sig"))
    run = run_here(
        PRODUCER, *silver[0][2:], "--kafka-config", tmp_path / "kafka.properties", "--create-topic", "--count", 1
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_topic_producer_and_consumer_start_in_every_order(spark, broker, silver, start, account, run_here):
    topic, options = silver
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")  # before the topic exists
    consumer.wait_for("No topic")
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    consumer.wait_for("Writing to")  # before the first message
    while not Path(options[-1], "commits", "0").exists():
        assert consumer.process.poll() is None, consumer.output
        time.sleep(0.1)
    consumer.stop(signal.SIGKILL)
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("Writing to")
    assert run_here(PRODUCER, *topic, "--count", 20, "--rate", 0, "--invalid-fraction", 0.5).returncode == 0
    consumer.wait_for(" rows in")
    assert consumer.stop() == 0 and "Traceback" not in consumer.output
    world_of(spark, options).consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("a consumer before the topic and before the first message, killed in between", in_topic, *arrived)
    assert len(in_topic) == 20 and sum(table.count() for table in tables(spark, options)) == 20


ANY_TIME = {"message_timestamp_after_max_ms": str(2**63 - 1)}  # the default of Kafka 3
NANOSECONDS = 1_795_891_000_123_456_789
STRANGE_TIMES = [NANOSECONDS, 2**63 - 1, -(2**63), -NANOSECONDS, 2**63 // 1000 + 1, -9_223_372_036_854_776]
USUAL_TIMES = [-1, 0, 1_795_891_000_123, 253_402_300_799_999, 1_795_891_000_123_456, 2**63 // 1000]


def send_at(world, times: list[int], *records: bytes | None, partition: int = 0, key: bytes | None = None) -> None:
    """Sends the records once for each Kafka timestamp in `times`."""
    with KafkaProducer(bootstrap_servers=world.broker, linger_ms=20) as producer:
        for time_of_record in times:
            for record in records:
                producer.send(world.topic.name, record, key=key, partition=partition, timestamp_ms=time_of_record)


def kafka_times(world) -> dict[tuple[int, int], int | None]:
    """The kafka_timestamp of each row in both tables, in milliseconds, by (partition, offset)."""
    both = [
        world.spark.read.format("delta")
        .load(table)
        .selectExpr("partition", "offset", "unix_millis(kafka_timestamp) AS time")
        for table in (world.options.table, quarantine_of(world.options.table))
    ]
    return {(row.partition, row.offset): row.time for row in both[0].union(both[1]).collect()}


def test_a_batch_that_would_go_back_is_not_written(world):
    """A stream that skips lost records could go back when a new leader has reported an outdated end of a partition."""
    world = world()
    source = KafkaSource(world.topic, accept_data_loss=True, group="test")
    source.ends = {0: 10, 1: 5}
    for end in ({"0": 9, "1": 6}, {"0": 12}):
        source.begins, source.ends = {}, {0: 10, 1: 5}
        with pytest.raises(SourceAwayError, match="outdated offsets"):
            source.contents(None, {world.topic.name: end})
    source.ends = {0: 10, 1: 5}
    assert source.contents(None, {world.topic.name: {"0": 10, "1": 6, "2": 1}})
    assert source.contents(None, {world.topic.name: {"0": 10, "1": 6, "2": 1}})  # repeated


def test_a_record_whose_kafka_time_is_no_time_is_read_as_any_other_and_named(world, account, capsys):
    world = world()
    world.make(2, **ANY_TIME)
    send_at(world, STRANGE_TIMES, VALID, BROKEN, None, key=b"k" * 100_000)
    send_at(world, USUAL_TIMES, VALID, BROKEN, None, partition=1, key=b"k")
    assert world.consume() == (12, 24)
    [warning] = capsys.readouterr().err.splitlines()
    assert f"18 in partition 0, the first at offset 0 ({NANOSECONDS})" in warning and "partition 1" not in warning
    assert kafka_times(world) == {(0, offset): None for offset in range(18)} | {
        (1, offset): time for offset, time in enumerate(each for each in USUAL_TIMES for _ in range(3))
    } | {(1, offset): None for offset in range(3)}  # -1 stands for no time
    world.send(VALID)
    assert world.consume() == (1, 0) and capsys.readouterr().err == ""
    world.check(account, "invalid Kafka timestamps")


@pytest.mark.parametrize(
    "codec", ["gzip", *(pytest.param(codec, marks=pytest.mark.long) for codec in ("snappy", "lz4", "zstd"))]
)
def test_a_compressed_record_whose_kafka_time_is_no_time_is_read(world, account, codec):
    each = world()
    each.make(1, compression_type=codec, **ANY_TIME)
    send_at(each, [NANOSECONDS], *[VALID] * 20, BROKEN)
    assert each.consume() == (20, 1)
    account(f"invalid timestamps, compressed by {codec}", [(0, offset) for offset in range(21)], *each.rows())


def test_a_producer_that_always_sets_such_times_is_read_batch_by_batch_beside_others(spark, world, account, capsys):
    world = world()
    world.topic.properties["group.id"] = world.topic.name
    world.make(2, **ANY_TIME)
    for _ in range(3):
        send_at(world, [NANOSECONDS], *[VALID] * 90, BROKEN)
        world.send(*[VALID] * 40, partition=1)
    assert world.consume() == (390, 3)
    assert capsys.readouterr().err.count("are not milliseconds since 1970") == 4
    world.check(account, "a producer whose times are nanoseconds")
    # Only the consumers of the last batch are left.
    consumers = getattr(spark._jvm.org.apache.spark.sql.kafka010.consumer, "KafkaDataConsumer$")._java_lang_class
    pool = consumers.getDeclaredField("consumerPool")
    pool.setAccessible(True)
    assert pool.get(None).size() <= 6


def test_such_times_in_transactions_are_read_once_they_are_committed(world, account):
    world = world()
    world.make(1, **ANY_TIME)
    with world.transaction() as producer:
        for end in (
            producer.commit,
            producer.abort,
            producer.commit,
            producer.abort,
        ):
            for _ in range(3):
                producer.send(world.topic.name, VALID, timestamp_ms=NANOSECONDS)
            end()
            producer.begin()
        assert world.consume() == (6, 0)
        producer.abort()
    world.check(account, "invalid timestamps, in transactions")


def test_a_schema_id_before_the_json_is_left_out_and_its_record_found_again(spark, world):
    world = world()
    world.make(1)
    world.send(b"\0\0\0\0\xff" + VALID, b"\xef\xbb\xbf" + VALID, b"\0\0\0\0\xff{")
    assert world.consume() == (2, 1)
    pair = silver_tables(world.options.table, CONTRACT.columns)
    texts = spark.read.format("delta").load(pair.table).select("raw_json").collect()
    assert [row.raw_json.encode() for row in texts] == [VALID] * 2
    [rejected] = spark.read.format("delta").load(pair.quarantine).collect()
    assert bytes(rejected.raw) == b"\0\0\0\0\xff{"
    last = KafkaSource(world.topic, False, "any").last
    assert last.common_end(spark, pair, 0, 0, 3) == 3
    last.delete_from(spark, pair, {0: (0, 2)})
    assert world.rows() == ([], [(0, 2)])


@pytest.mark.long
def test_a_batch_with_such_times_is_repeated_as_it_was(world, account):
    """The stream is killed between the two writes of the batch."""
    world = world()
    world.make(1, **ANY_TIME)
    world.send(VALID)
    assert world.consume() == (1, 0)
    send_at(world, [NANOSECONDS, 1], VALID, BROKEN)

    class Killed(TableWriter):
        def _append(self, records, table, *others):
            if table == self.tables.quarantine:
                raise ValueError("killed")
            super()._append(records, table, *others)

    with pytest.raises(ValueError, match="killed"):
        world.consume(Killed)
    assert world.consume() == (0, 2)
    arrivals = [
        world.spark.read.format("delta").load(table).where("offset > 0").select("ingest_time").distinct().collect()
        for table in (world.options.table, quarantine_of(world.options.table))
    ]
    assert len(arrivals[0]) == 1 and arrivals[0] == arrivals[1]
    world.check(account, "a batch with invalid timestamps, repeated")


@pytest.mark.long
def test_data_loss_is_accepted_beside_such_times(world):
    world = world()
    world.make(1, **ANY_TIME)
    send_at(world, [NANOSECONDS], *[VALID] * 5)
    assert world.consume() == (5, 0)
    send_at(world, [NANOSECONDS], *[VALID] * 10)
    with KafkaAdminClient(bootstrap_servers=world.broker) as admin:
        admin.delete_records({TopicPartition(world.topic.name, 0): 8})
    with pytest.raises(PipelineError, match="partition 0 offsets 5 to 7"):
        world.consume()
    assert world.consume(accept_data_loss=True) == (7, 0)


def send_bombs(world, *records: bytes | None, partition: int = 0, key: bytes | None = None) -> None:
    """Sends records that are small when compressed, all in one Kafka batch."""
    with KafkaProducer(
        bootstrap_servers=world.broker,
        compression_type="gzip",
        max_request_size=2**31 - 1,
        batch_size=2**31 - 1,
        linger_ms=60_000,
        request_timeout_ms=100_000,
        delivery_timeout_ms=200_000,
    ) as producer:
        for record in records:
            producer.send(world.topic.name, record, partition=partition, key=key)


BOMB = b"a" * 450_000_000  # too large to fit into a heap of 1 GB twice


def test_records_that_fit_into_no_memory_are_named_and_hurt_none_before_them(world, account, capsys):
    """Kafka cannot skip a record that it cannot decompress, so the records behind it in the same batch are lost too."""
    world = world()
    world.make(2, compression_type="producer", **ANY_TIME)
    world.send(VALID, BROKEN, b"")
    send_bombs(world, VALID, BOMB, VALID, BROKEN)  # at offsets 4 to 6
    send_bombs(world, VALID)
    send_bombs(world, BOMB)  # at offset 8
    send_bombs(world, b"[" + b"7," * 100_000_000 + b"7]")  # at offset 9: fits, but not several times
    send_bombs(world, VALID, key=b"k" * 9_000_000)
    send_at(world, [NANOSECONDS], VALID)
    world.send(*[VALID] * 3, partition=1)
    assert world.consume() == (7, 8)
    strange, oversized = capsys.readouterr().err.splitlines()
    assert "1 in partition 0, the first at offset 11" in strange
    assert "partition 0 offsets 4 to 6" in oversized and "partition 1" not in oversized
    both = {
        table: {
            row.offset: row for row in world.spark.read.format("delta").load(table).where("partition = 0").collect()
        }
        for table in (world.options.table, quarantine_of(world.options.table))
    }
    assert sorted(both[world.options.table]) == [0, 3, 7, 11]
    reasons = {offset: row.reject_reason for offset, row in both[quarantine_of(world.options.table)].items()}
    assert reasons == {1: "malformed_json", 2: "empty_record"} | dict.fromkeys((4, 5, 6, 8, 9, 10), "oversized_record")
    assert world.consume() == (0, 0)  # the start compares the last records
    send_bombs(world, BOMB)
    assert world.consume() == (0, 1) and world.consume() == (0, 0)
    account(
        "records of 450 MB, packed into small messages",
        [(0, offset) for offset in range(13)] + [(1, offset) for offset in range(3)],
        *world.rows(),
    )


@pytest.mark.long
def test_records_beside_those_that_fit_into_no_memory_are_read(world, account):
    """Kafka's consumer decompresses the records behind each large one along with it, and batches end where Spark planned."""
    world = world()
    world.make(2, compression_type="producer")
    send_bombs(world, b"[" + b"7," * 60_000_000 + b"7]")
    world.send(*[VALID] * 97, partition=1)
    for _ in range(2):
        with world.transaction() as producer:  # its end takes up one more offset
            producer.send(world.topic.name, VALID, partition=1)
            producer.commit()
        send_bombs(world, BOMB, partition=1)  # at offsets 99, right after the first batch, and 102
    world.send(*[VALID] * 20, partition=1)
    assert world.consume() == (119, 3)
    assert world.consume() == (0, 0)  # it can read the first, but has nothing to compare it with
    world.check(account, "records of 120 MB and of 450 MB in small messages, and records beside them")


def test_a_record_is_in_one_table_where_only_the_second_reading_of_its_batch_finds_a_large_one(world, monkeypatch):
    world = world()
    world.make(1, compression_type="producer")
    send_bombs(world, VALID, b"[" + b"7," * 10_000_000 + b"7]", VALID)
    readings = itertools.count()

    class OutOfMemory(TableWriter):
        def _rejected(self, judged, found, *others):
            if found["rejected"] == 1 and not next(readings):
                judged.sparkSession._jvm.java.nio.ByteBuffer.allocate(2**31 - 1)
            return super()._rejected(judged, found, *others)

    # Where the first reading really runs out of memory, the record behind the large one is not read either.
    assert world.consume(OutOfMemory) in [(2, 1), (1, 2)]
    assert sorted(offset for rows in world.rows() for _, offset in rows) == [0, 1, 2]


def test_a_start_takes_as_long_as_it_needs_to_compare_the_last_records(world, monkeypatch):
    world = world()
    world.make(2)
    monkeypatch.setattr("pipeline.kafka.last_records.MAX_WAIT_SECONDS", 0)
    world.send(*[VALID] * 3)
    assert world.consume() == (3, 0)
    world.send(VALID, partition=1)
    assert world.consume() == (1, 0)


def test_a_record_of_more_than_8_mb_is_rejected_with_all_that_it_holds(world):
    world = world()
    world.make(1, compression_type="producer")
    longest = VALID[:-1] + b', "note": "' + b"x" * (MAX_RECORD_BYTES - len(VALID) - 13) + b'" }'
    assert len(longest) == MAX_RECORD_BYTES
    send_bombs(world, longest, longest + b" ")
    assert world.consume() == (1, 1)
    [rejected] = world.spark.read.format("delta").load(quarantine_of(world.options.table)).collect()
    assert (rejected.reject_reason, bytes(rejected.raw)) == ("oversized_record", longest + b" ")
    assert world.consume() == (0, 0)


def test_own_topics_refuse_what_is_large_only_unpacked(broker, silver, run_here):
    topic, _ = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 1).returncode == 0
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.create_topics(
            {f"{topic[3]}_other": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True
        )
    with KafkaProducer(
        bootstrap_servers=broker, retries=0, compression_type="gzip", max_request_size=2**30
    ) as producer:
        for name in (topic[3], f"{topic[3]}_other"):
            producer.send(name, b"a" * 1_000_000).get(60)
            with pytest.raises(MessageSizeTooLargeError):
                producer.send(name, b"a" * 2_000_000).get(60)


def test_a_topic_is_created_with_as_many_partitions_as_asked_for(broker, run_here):
    """With options that people know from Kafka's own tools."""
    topic = ["--bootstrap-server", broker, "--topic", "with_5_partitions"]
    run = run_here(PRODUCER, *topic, "--create-topic", "--partitions", 5, "--count", 1)
    assert run.returncode == 0 and 'Created the topic "with_5_partitions" with 5 partitions.' in run.stdout
    with KafkaConsumer(bootstrap_servers=broker) as consumer:
        assert consumer.partitions_for_topic("with_5_partitions") == set(range(5))


def test_own_topics_refuse_times_that_are_none(broker, silver, run_here):
    topic, _ = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 1).returncode == 0
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.create_topics(
            {f"{topic[3]}_other": {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True
        )
    now = int(time.time() * 1000)
    with KafkaProducer(bootstrap_servers=broker, retries=0) as producer:
        for name in (topic[3], f"{topic[3]}_other"):
            producer.send(name, VALID, timestamp_ms=now + 80_000_000).get(60)
            for strange in (NANOSECONDS, now * 1000, now + 90_000_000):
                with pytest.raises(InvalidTimestampError):
                    producer.send(name, VALID, timestamp_ms=strange).get(60)


@pytest.mark.parametrize("kind, arrival", [("LogAppendTime", "kafka_timestamp"), ("CreateTime", "NULL")])
@pytest.mark.parametrize("way", ["read_batch", "read_again"])
def test_the_broker_says_when_a_record_has_arrived_where_the_topic_asks_it_to(
    spark, world, monkeypatch, kind, arrival, way
):
    world = world()
    world.make(1, message_timestamp_type=kind)
    world.send(*[VALID] * 3)
    seen = []

    class Looking(TableWriter):
        def _judge(self, records, this):
            seen.append(records.where(f"NOT arrival_time <=> {arrival}").count())
            return super()._judge(records, this)

    if way == "read_again":

        def read_batch(source: KafkaSource, batch: DataFrame) -> DataFrame:
            records = source.lookup.records(spark, kafka_offsets(batch))
            return records_of(
                records.withColumn("timestamp", F.timestamp_millis("timestamp")), "t", F.current_timestamp()
            )

        monkeypatch.setattr(KafkaSource, "read_batch", read_batch)
    assert world.consume(Looking) == (3, 0)
    assert seen == [0]
