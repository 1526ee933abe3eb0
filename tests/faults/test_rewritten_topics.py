"""Kafka comes back with an older copy of its log, which fills up again, or a topic is recreated. The stream is killed
at various moments.
"""

import os
import shutil
from contextlib import closing
from pathlib import Path

from pipeline.kafka.lookup import kafka_options
from pipeline.kafka.private import KafkaReader
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.topics import Topic
from pipeline.paths import quarantine_of
from pipeline.streaming import start
from pipeline.streaming.private import LAST_BATCH, Checkpoint
from pipeline.streaming.writer import TableWriter
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from helpers.processes import Script, until
from helpers.records import reading
from helpers.streams import plan
from helpers.topics import make_topic

NOW = 1_795_891_000_000


def records(*numbers: int) -> dict[int, bytes]:
    """A record for each number, broken if the number is divisible by 4. The number is also sent as the Kafka timestamp."""
    return {number: reading(device_id=f"sensor-{number}") if number % 4 else b"%d" % number for number in numbers}


def send(world, numbers, partition: int = 0) -> None:
    with KafkaProducer(bootstrap_servers=world.broker) as producer:
        for number, record in records(*numbers).items():
            producer.send(world.topic.name, record, partition=partition, timestamp_ms=NOW + number)


def arrived(world) -> list[int]:
    """The numbers of the records in both tables."""
    rows = [
        world.spark.read.format("delta")
        .load(path)
        .selectExpr(f"unix_millis(kafka_timestamp) - {NOW} AS number")
        .collect()
        for path in (world.options.table, quarantine_of(world.options.table))
    ]
    return sorted(row.number for both in rows for row in both)


@pytest.fixture
def old_broker(monkeypatch):
    """Hides topic ids, which brokers before 2.8 lack. Without them, the stream cannot tell a topic recreated with the
    same records from an older copy of the log.
    """
    monkeypatch.setattr(Topic, "id", lambda _: "")


@pytest.fixture
def rewrite(broker, old_broker):
    """A function that recreates a topic with the given records in its partitions."""

    def rewrite_topic(world, *partitions) -> None:
        with KafkaAdminClient(bootstrap_servers=broker) as admin:
            admin.delete_topics([world.topic.name])
            until(lambda: world.topic.name not in admin.list_topics())
            make_topic(admin, world.topic.name, len(partitions))
        for partition, numbers in enumerate(partitions):
            send(world, numbers, partition)

    return rewrite_topic


@pytest.fixture
def read_hundred(world, old_broker):
    """A topic with two partitions of a hundred and of fifty records, all of which a stream has read."""
    world = world()
    world.make(2)
    send(world, range(100))
    send(world, range(1000, 1050), partition=1)
    world.consume()
    assert arrived(world) == [*range(100), *range(1000, 1050)]
    return world


@pytest.mark.parametrize(
    "log, place",
    [
        ([*range(80), *range(200, 240)], 80),  # has grown past the last offset that was read
        ([*range(80), *range(200, 210)], 80),  # has not
        (range(99), 99),
        (range(200, 400), 0),  # a new topic, with more records than the old one
    ],
)
def test_a_log_that_lost_its_tail_stops_the_job_and_what_it_has_instead_is_read_if_that_is_accepted(
    read_hundred, rewrite, capsys, log, place
):
    world = read_hundred
    rewrite(world, log, [*range(1000, 1050), *range(2000, 2010)])
    lost = f"and has, or will have, others in their place: partition 0 offsets {place} to 99. .*"
    with pytest.raises(
        PipelineError, match=lost + "Nothing was skipped. With --accept-data-loss, the new records are read, too"
    ):
        world.consume()
    assert arrived(world) == [*range(100), *range(1000, 1050)]
    world.consume(accept_data_loss=True)
    everything = sorted({*range(100), *log, *range(1000, 1050), *range(2000, 2010)})
    assert arrived(world) == everything
    send(world, range(500, 510))
    world.consume()
    assert arrived(world) == sorted([*everything, *range(500, 510)])
    assert capsys.readouterr().out.count("The old checkpoint is now") == 1


def test_a_log_that_is_replaced_while_the_stream_runs_is_noticed_by_its_next_batch(read_hundred, rewrite):
    """It happens too quickly to be seen as an outage. The batch would read offsets that now hold other records."""
    world = read_hundred

    class Replaced(TableWriter):
        def write(self, *arguments):
            rewrite(world, [*range(80), *range(200, 260)], [*range(1000, 1050), *range(2000, 2010)])
            return super().write(*arguments)

    send(world, range(100, 120))
    with pytest.raises(
        PipelineError, match="While the stream was running, .* in their place: partition 0 offset 99. Start again"
    ):
        world.consume(Replaced)
    with pytest.raises(PipelineError, match="partition 0 offsets 80 to 99. .*Nothing was skipped"):
        world.consume()
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(100), *range(200, 260), *range(1000, 1050), *range(2000, 2010)]


@pytest.mark.long
def test_a_kafka_that_does_not_say_whether_it_has_them_is_not_taken_to_have_them(read_hundred, monkeypatch):
    world = read_hundred
    send(world, range(100, 120))
    with monkeypatch.context() as patch:
        for name in ("MAX_LOOKUP_SECONDS", "MAX_WAIT_SECONDS"):
            patch.setattr(f"pipeline.kafka.last_records.{name}", -1)
        with pytest.raises(PipelineError, match="no longer answers"):
            world.consume()
    world.consume()
    assert arrived(world) == [*range(120), *range(1000, 1050)]


@pytest.mark.long
def test_the_last_records_of_hundreds_of_partitions_are_found_in_time_although_many_follow(world, spark):
    world = world()
    world.make(200)
    with KafkaProducer(bootstrap_servers=world.broker, linger_ms=50) as producer:
        for number in range(200 * 600):
            producer.send(world.topic.name, b"%d" % number, partition=number % 200)
    with closing(KafkaReader(spark, kafka_options(world.topic))) as reader:
        found, unread = reader.records_between(world.topic.name, {number: (0, 1) for number in range(200)}, 10, 100)
    assert ({value for *_, value in found}, unread) == ({b"%d" % number for number in range(200)}, set())


def test_settings_for_a_better_throughput_do_not_delay_a_single_record(world, spark):
    world = world()
    world.make(1)
    send(world, range(3))
    options = kafka_options(world.topic) | {"kafka.fetch.min.bytes": 1_000_000, "kafka.fetch.max.wait.ms": 20_000}
    with closing(KafkaReader(spark, options)) as reader:
        found, unread = reader.records_between(world.topic.name, {0: (1, 2)}, 10, 100)
    assert (len(found), unread) == (1, set())


@pytest.mark.long
def test_records_that_were_fetched_with_the_batch_before_are_read_again_from_a_log_that_is_another_by_now(
    world, rewrite
):
    world = world()
    world.make(1)
    send(world, range(100))
    world.options.max_offsets_per_trigger = 60

    class Replaced(TableWriter):
        def write(self, batch, batch_id, stream):
            if batch_id == 1:
                rewrite(world, [*range(60), *range(200, 240)])
            return super().write(batch, batch_id, stream)

    world.consume(Replaced)
    assert arrived(world) == [*range(60), *range(200, 240)]


@pytest.mark.long
@pytest.mark.parametrize("aborted", [5, 15])
@pytest.mark.parametrize("kept", [110, 123])
def test_a_lost_tail_is_noticed_behind_an_aborted_transaction(world, rewrite, aborted, kept):
    """The transaction occupies the last offsets of the batch, so there may be no record at them."""
    world = world()
    world.make(1)
    send(world, range(100))
    world.consume()
    send(world, range(100, 120))
    with world.transaction() as producer:
        for _ in range(aborted):
            producer.send(world.topic.name, b"aborted", partition=0)
        producer.abort()
    for _ in range(2):
        world.consume()
    rewrite(world, [*range(min(kept, 120)), *range(200, 260)])  # the last 3 of the 123 offsets were aborted
    with pytest.raises(PipelineError, match=f"partition 0 offsets {min(kept, 120)} to {120 + aborted}"):
        world.consume()
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(120), *range(200, 260)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.long
def test_a_log_that_lost_the_end_of_a_planned_batch_is_noticed_though_it_fills_up_again(world, rewrite, first):
    world = world()
    world.make(1)
    send(world, range(100))
    if not first:
        world.consume()
        send(world, range(100, 120))
    end = 100 if first else 120
    plan(world.consume)
    rewrite(world, range(end - 10))
    lost = f"Kafka lost records of .* that were about to be read: partition 0 offsets {end - 10} to {end - 1}"
    with pytest.raises(
        PipelineError, match=f"{lost}. Nothing was skipped. With --accept-data-loss, the stream continues with the"
    ):
        world.consume()
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(end - 10)]
    send(world, range(300, 330))
    world.consume()
    assert arrived(world) == [*range(end - 10), *range(300, 330)]


@pytest.mark.long
def test_partitions_that_are_added_meanwhile_are_read_from_their_beginning(read_hundred, rewrite):
    world = read_hundred
    rewrite(world, range(90), range(1000, 1050), range(3000, 3010))
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(100), *range(1000, 1050), *range(3000, 3010)]


def test_a_log_that_only_grew_or_was_cut_at_its_beginning_is_no_other_one(read_hundred, broker):
    world = read_hundred
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.delete_records({TopicPartition(world.topic.name, 0): 100, TopicPartition(world.topic.name, 1): 45})
    send(world, range(200, 210))
    with world.transaction() as producer:
        for _ in range(20):
            producer.send(world.topic.name, b"aborted", partition=1)
        producer.abort()
    for _ in range(2):
        world.consume()
        assert arrived(world) == [*range(100), *range(200, 210), *range(1000, 1050)]


class Crash(Exception):
    pass


def test_the_way_on_survives_a_crash_after_each_of_its_steps(read_hundred, rewrite, monkeypatch):
    """A batch is half done: its valid records are in the table, but its broken ones are not in the quarantine."""
    world = read_hundred

    class HalfDone(TableWriter):
        def _append(self, records, table, *others):
            if table == self.tables.quarantine:
                raise Crash
            super()._append(records, table, *others)

    send(world, range(100, 120))
    send(world, range(1050, 1060), partition=1)
    with pytest.raises(Crash):
        world.consume(HalfDone)
    rewrite(world, [*range(90), *range(200, 250)], range(1000, 1060))
    done: list[str] = []

    def crashing(function):
        """Wraps a step so that the stream crashes right after it the first time."""

        def step(*arguments, **named):
            result = function(*arguments, **named)
            name = f"{function.__name__} {[each for each in arguments if isinstance(each, str | dict)]}"
            if name not in done:
                done.append(name)
                raise Crash
            return result

        return step

    monkeypatch.setattr(start, "set_properties", crashing(start.set_properties))
    monkeypatch.setattr(start.Checkpoint, "set_aside", crashing(start.Checkpoint.set_aside))
    monkeypatch.setattr(KafkaSource, "take_back", crashing(KafkaSource.take_back))
    crashes = 0
    while True:
        try:
            world.consume(accept_data_loss=True)
            break
        except Crash:
            crashes += 1
    assert crashes == len(done) == 4, done
    # The valid records of the half-done batch stay, although only the old log had them. Its broken ones are lost with
    # that log.
    of_old = [number for number in range(100, 120) if number % 4]
    assert arrived(world) == [*range(100), *of_old, *range(200, 250), *range(1000, 1060)]


@pytest.mark.long
def test_an_accepted_loss_is_remembered_until_the_first_batch_after_it_is_done(read_hundred, rewrite):
    world = read_hundred
    rewrite(world, [*range(80), *range(200, 240)], range(1000, 1050))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "_append_valid", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.consume(accept_data_loss=True)
    rewrite(world, [*range(80), *range(200, 205)], range(1000, 1050))
    with pytest.raises(PipelineError, match="partition 0 offsets 85 to 119. Nothing was skipped"):
        world.consume()
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(100), *range(200, 205), *range(1000, 1050)]


@pytest.mark.long
def test_rejected_records_are_taken_back_though_a_power_cut_left_the_table_without_their_batch(read_hundred, rewrite):
    world = read_hundred
    send(world, range(100, 120))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "write_last_batch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            world.consume()
    newest = max(Path(world.options.table, "_delta_log").glob("*.json"))
    newest.unlink()
    newest.with_suffix(".crc").unlink()
    rewrite(world, range(110), range(1000, 1050))
    world.consume(accept_data_loss=True)
    assert arrived(world) == sorted(
        [*range(110), *(number for number in range(110, 120) if number % 4 == 0), *range(1000, 1050)]
    )


@pytest.mark.long
def test_a_note_of_an_earlier_batch_is_not_believed(read_hundred):
    """In between, a version of the project that writes no such note has run."""
    note = Path(read_hundred.options.checkpoint, LAST_BATCH)
    earlier = note.read_text()
    for numbers in (range(100, 110), range(110, 120)):
        send(read_hundred, numbers)
        read_hundred.consume()
        note.write_text(earlier)
    assert arrived(read_hundred) == [*range(120), *range(1000, 1050)]


@pytest.mark.long
def test_a_topic_that_is_made_again_twice_is_read_from_its_beginning(world, broker):
    """The first new checkpoint has planned where to begin, but nothing has been written."""
    world = world()
    world.make(1)
    send(world, range(10))
    world.consume()
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        for numbers in (range(100, 120), range(200, 230)):
            admin.delete_topics([world.topic.name])
            until(lambda: world.topic.name not in admin.list_topics())
            make_topic(admin, world.topic.name, 1)
            send(world, numbers)
            if numbers[0] == 100:
                admin.delete_records({TopicPartition(world.topic.name, 0): 5})
                plan(world.consume, accept_data_loss=True)
    world.consume(accept_data_loss=True)
    assert arrived(world) == [*range(10), *range(200, 230)]


@pytest.mark.long
def test_a_topic_that_was_made_again_is_read_once_though_the_stream_was_killed_as_it_committed_records_of_it(
    world, broker
):
    world = world()
    world.make(1)
    send(world, range(5))
    world.consume()
    send(world, range(5, 7))

    class Killed(TableWriter):
        def _append(self, records, table, *others):
            if table == self.tables.table:
                with KafkaAdminClient(bootstrap_servers=broker) as admin:
                    admin.delete_topics([world.topic.name])
                    until(lambda: world.topic.name not in admin.list_topics())
                    make_topic(admin, world.topic.name)
                send(world, range(100, 110))
                super()._append(records, table, *others)
                raise Crash

    with pytest.raises(Crash):
        world.consume(Killed)
    half_done = len(arrived(world))
    assert half_done > 4
    with pytest.raises(PipelineError, match="has been deleted and recreated since the table was written"):
        world.consume()
    assert len(arrived(world)) == half_done
    for _ in range(2):
        world.consume(accept_data_loss=True)
        assert arrived(world) == [*range(5), *range(100, 110)]


@pytest.mark.long
def test_a_broker_that_comes_back_with_an_older_copy_of_its_data(spark, tmp_path, world):
    [port] = free_ports(1)
    data, world = tmp_path / "kafka", world()
    world.broker = f"localhost:{port}"

    def running(action) -> None:
        kafka = Script("local_kafka.py", "--port", port, "--data-dir", data)
        try:
            kafka.wait_for("Kafka is ready")
            world.topic = Topic(world.broker, "t")  # as in a new process, without connections to the previous broker
            action()
        finally:
            assert kafka.stop() == 0, kafka.output

    running(lambda: [world.make(1), send(world, range(80))])
    shutil.copytree(data, tmp_path / "copy")
    running(lambda: [send(world, range(80, 100)), world.consume()])
    shutil.rmtree(data)
    os.rename(tmp_path / "copy", data)

    def go_on() -> None:
        send(world, range(200, 240))
        with pytest.raises(PipelineError, match="partition 0 offsets 80 to 99"):
            world.consume()
        world.consume(accept_data_loss=True)
        world.consume()

    running(go_on)
    assert arrived(world) == [*range(100), *range(200, 240)]
