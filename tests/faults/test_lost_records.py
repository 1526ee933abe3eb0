"""Records that Kafka loses before they are read, recreated topics, and added partitions."""

import re
import time
from collections import Counter
from contextlib import suppress

from pipeline.delta.tables import silver_tables
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.topics import Topic
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.start import Start
from pipeline.streaming.writer import TableWriter
from pipeline.terminal.errors import PipelineError, root_cause
from pipeline.terminal.signals import StopFlag

import pytest
from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import OffsetOutOfRangeError
from py4j.protocol import Py4JJavaError
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from helpers.processes import PATIENCE, acknowledged, until
from helpers.records import reading
from helpers.topics import make_topic, origins, topic_offsets, world_of
from readings import CONTRACT

CONSUMER = "spark_kafka_consumer.py"


@pytest.fixture
def admin(broker):
    with KafkaAdminClient(bootstrap_servers=broker) as client:
        yield client


@pytest.fixture
def read_five(spark, silver, admin):
    """A topic with five records, all of which a stream has read."""
    (_, _, _, topic), options = silver
    world = world_of(spark, options)
    make_topic(admin, topic)
    world.send(*[reading()] * 5)
    assert world.consume() == (5, 0)
    return world


def wait_for_more(broker: str, topic: str, beyond: dict[int, int], records: int) -> None:
    """Waits until each partition has this many records from its offset in `beyond` on."""
    until(lambda: all(end >= beyond[partition] + records for partition, end in topic_offsets(broker, topic).items()))


def next_offsets(arrived: list) -> dict[int, int]:
    """The offset at which the next batch begins in each partition, judging by the tables."""
    return {
        partition: max(offset for _, where, offset in arrived if where == partition) + 1
        for partition in {partition for _, partition, _ in arrived}
    }


def test_records_that_retention_removed_stop_the_job_which_names_them_and_can_be_told_to_go_on(
    spark, broker, silver, admin, produce, account, capsys
):
    (_, _, _, topic), options = silver
    world = world_of(spark, options)
    make_topic(admin, topic, partitions=2)
    producer = produce(silver[0])
    wait_for_more(broker, topic, {0: 0, 1: 0}, 100)
    world.consume()
    _, accepted, rejected = origins(spark, broker, options)
    read = next_offsets(accepted + rejected)
    wait_for_more(broker, topic, read, 50)
    admin.delete_records({TopicPartition(topic, 0): read[0] + 15, TopicPartition(topic, 1): read[1] + 20})
    removed = f"partition 0 offsets {read[0]} to {read[0] + 14}, partition 1 offsets {read[1]} to {read[1] + 19}"

    with pytest.raises(
        PipelineError, match=f"{removed}.* Nothing was skipped. With --accept-data-loss, the stream continues with the"
    ):
        world.consume()
    assert origins(spark, broker, options)[1:] == (accepted, rejected)

    world.consume(accept_data_loss=True)
    assert f"{removed}." in capsys.readouterr().out
    delivered = acknowledged(producer)
    world.consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("35 records removed by retention, --accept-data-loss", accepted + rejected + in_topic, *arrived)
    assert delivered == len(accepted + rejected) + 35 + len(in_topic)


def test_a_topic_that_was_made_again_stops_the_job_even_where_it_has_more_records_than_the_old_one(
    spark, broker, silver, admin, produce, account, capsys
):
    (_, _, _, topic), options = silver
    world = world_of(spark, options)
    make_topic(admin, topic)
    producer = produce(silver[0])
    wait_for_more(broker, topic, {0: 0}, 100)
    world.consume()
    _, accepted, rejected = origins(spark, broker, options)
    read = next_offsets(accepted + rejected)
    admin.delete_topics([topic])
    until(lambda: topic not in admin.list_topics())
    make_topic(admin, topic)
    wait_for_more(broker, topic, read, 1)

    complaint = re.escape(
        f'"{topic}" on {broker} has been deleted and recreated since the table was written: the unread records of the old topic, from '
        f"{{'0': {read[0]}}} on (partition: offset), are gone. Nothing was skipped. With --accept-data-loss"
    )
    with pytest.raises(PipelineError, match=complaint):
        world.consume()
    assert origins(spark, broker, options)[1:] == (accepted, rejected)

    world.consume(accept_data_loss=True)
    assert "the new topic is read from its beginning" in capsys.readouterr().out
    delivered = acknowledged(producer)
    world.consume()
    in_topic, *arrived = origins(spark, broker, options)
    # Both topics have an offset 0, so the earlier records are given another topic name.
    old = [("the old topic", *origin[1:]) for origin in accepted + rejected]
    new = [list((Counter(now) - Counter(before)).elements()) for now, before in zip(arrived, (accepted, rejected))]
    account(
        "the topic deleted and recreated, --accept-data-loss",
        old + in_topic,
        old[: len(accepted)] + new[0],
        old[len(accepted) :] + new[1],
    )
    assert delivered >= len(old + in_topic)  # the rest was in the old topic and had not been read yet


def records(spark, topic: str) -> DataFrame:
    """Two records, as the stream reads them."""
    return spark.range(2).select(
        F.lit(reading()).alias("raw"),
        F.lit("{}").alias("raw_json"),
        F.lit(topic).alias("topic"),
        F.lit(0).alias("partition"),
        F.col("id").alias("offset"),
        F.current_timestamp().alias("kafka_timestamp"),
        F.lit(b"").alias("kafka_key"),
        F.current_timestamp().alias("ingest_time"),
    )


def test_a_batch_whose_topic_was_made_again_meanwhile_ends_the_stream(
    spark, broker, silver, admin, tmp_path, monkeypatch
):
    (_, _, _, name), _ = silver
    make_topic(admin, name)
    topic = Topic(broker, name)
    source = KafkaSource(topic, accept_data_loss=False, group="lost")

    def make_it_again(batch):
        admin.delete_topics([name])
        make_topic(admin, name)
        return batch

    tables = silver_tables(str(tmp_path / "table"), CONTRACT.columns)
    writer = TableWriter(
        tables, CONTRACT, source, Start(Checkpoint(spark, str(tmp_path / "checkpoint")), source.identity(), {})
    )
    batch = records(spark, name)
    writer.write(batch, 0, "test")
    monkeypatch.setattr(source, "read_batch", make_it_again)
    with pytest.raises(PipelineError, match="somebody deleted and recreated the topic"):
        writer.write(batch, 1, "test")


def test_a_batch_whose_topic_can_not_be_asked_for_any_more_is_kept(spark, broker, silver, admin, tmp_path, monkeypatch):
    """The batch has already read its records."""
    (_, _, _, name), _ = silver
    make_topic(admin, name)
    source = KafkaSource(Topic(broker, name), accept_data_loss=False, group="lost")
    tables = silver_tables(str(tmp_path / "table"), CONTRACT.columns)
    writer = TableWriter(
        tables, CONTRACT, source, Start(Checkpoint(spark, str(tmp_path / "checkpoint")), source.identity(), {})
    )
    monkeypatch.setattr(source, "read_batch", lambda batch: [admin.delete_topics([name]), batch][1])
    writer.write(records(spark, name), 0, "test")
    assert spark.read.format("delta").load(tables.table).count() == 2


def test_data_loss_is_accepted_once(spark, broker, silver, admin, start, run_here):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    send = ["kafka_producer.py", *silver[0], "--rate", 0, "--count"]
    assert run_here(*send, 5).returncode == 0
    world_of(spark, options).consume()
    run_here(*send, 10)
    admin.delete_records({TopicPartition(topic, 0): 7})
    consumer = start(CONSUMER, *options, "--trigger", "20 seconds", "--accept-data-loss")
    consumer.wait_for("8 rows in")
    deadline = time.monotonic() + PATIENCE
    while consumer.process.poll() is None:  # until records are deleted before it has read them
        assert time.monotonic() < deadline
        run_here(*send, 5)
        with suppress(OffsetOutOfRangeError):
            admin.delete_records({TopicPartition(topic, 0): topic_offsets(broker, topic)[0]})
    assert consumer.wait() == 1
    assert consumer.output.count("--accept-data-loss: the stream continues") == 1
    assert re.search("error: Kafka no longer has unread records of .* Nothing was skipped", consumer.output), (
        consumer.output
    )


@pytest.mark.long
def test_what_is_lost_while_the_accepted_loss_is_passed_over_stops_the_job(read_five, admin, capsys):
    world = read_five
    topic = world.topic.name
    world.send(*[reading()] * 45)
    admin.delete_records({TopicPartition(topic, 0): 20})
    world.options.max_offsets_per_trigger = 10  # so the first batch contains only lost offsets and reads nothing

    class Losing(TableWriter):
        def write(self, batch, batch_id, *others):
            report = super().write(batch, batch_id, *others)
            if report.rows:
                admin.delete_records({TopicPartition(topic, 0): 40})
            return report

    with pytest.raises((StreamingQueryException, Py4JJavaError)) as lost:
        world.consume(Losing, accept_data_loss=True)
    assert re.search("may have been lost|is out of range for partition", root_cause(lost.value))
    assert "partition 0 offsets 5 to 19." in capsys.readouterr().out
    read = sorted(offset for _, offset in world.rows()[0])
    assert read == [*range(5), *range(20, 25)]
    with pytest.raises(PipelineError, match="partition 0 offsets 25 to 39. .* Nothing was skipped"):
        world.consume()
    assert world.consume(accept_data_loss=True) == (10, 0)


@pytest.mark.long
def test_a_new_partition_that_has_lost_its_beginning_is_named(read_five, admin):
    world = read_five
    topic = world.topic.name
    admin.create_partitions({topic: 2})
    world.send(*[reading()] * 5, partition=1)
    admin.delete_records({TopicPartition(topic, 1): 3})
    with pytest.raises(
        PipelineError, match="partition 1 offsets 0 to 2. .* Nothing was skipped. With --accept-data-loss"
    ):
        world.consume()
    assert [world.consume(accept_data_loss=True), world.consume()] == [(2, 0), (0, 0)]


def test_records_that_are_lost_before_the_first_batch_is_done_are_said_with_the_way_out(spark, silver, admin):
    (_, _, _, topic), options = silver
    world = world_of(spark, options)
    make_topic(admin, topic)
    world.send(*[reading()] * 5)

    class Failing(TableWriter):
        def write(self, *batch):
            raise ValueError

    with pytest.raises(ValueError):
        world.consume(Failing)
    world.send(*[reading()] * 5)
    admin.delete_records({TopicPartition(topic, 0): 8})
    source = KafkaSource(world.topic, accept_data_loss=False, group=topic)
    with pytest.raises((StreamingQueryException, Py4JJavaError)) as lost:
        world.consume()
    source.wait_until_available(lost.value, StopFlag())  # leaves it to the next start to check for lost records
    with pytest.raises(
        PipelineError, match="no longer has unread records of the topic .* Nothing was skipped. With --accept-data-loss"
    ):
        source.wait_until_available(lost.value, StopFlag())
    assert world.consume(accept_data_loss=True) == (2, 0)


@pytest.mark.parametrize(
    "problem", ["Connect to the bucket s3a://lake timed out", "Unable to execute HTTP request: Read timed out"]
)
def test_a_table_whose_store_does_not_answer_is_not_taken_for_a_broker_that_does_not(broker, problem):
    error = RuntimeError(problem)
    with pytest.raises(RuntimeError, match=problem):
        KafkaSource(Topic(broker, "door_authorizations"), accept_data_loss=False, group="g").wait_until_available(
            error, StopFlag()
        )


def test_another_topic_is_not_taken_for_the_old_one_made_again(world):
    """The user has forgotten to change --table."""
    first, other = world(), world()
    for each in (first, other):
        each.make(1)
        each.send(reading())
    assert first.consume() == (1, 0)
    other.options.table = first.options.table
    for accept in (False, True):
        with pytest.raises(PipelineError, match="was not written with the checkpoint"):
            other.consume(accept_data_loss=accept)
    assert first.consume() == (0, 0)


@pytest.mark.long
def test_an_empty_topic_in_place_of_the_old_one_is_accepted_once_and_for_all(read_five, admin, tmp_path):
    world = read_five
    topic = world.topic.name
    admin.delete_topics([topic])
    until(lambda: topic not in admin.list_topics())
    make_topic(admin, topic)

    with pytest.raises(PipelineError, match="has been deleted and recreated"):
        world.consume()
    assert [world.consume(accept_data_loss=True), world.consume()] == [(0, 0), (0, 0)]
    assert len(list(tmp_path.glob("checkpoint.*"))) == 1
    world.send(*[reading()] * 3)
    assert [world.consume(), world.consume()] == [(3, 0), (0, 0)]


def test_a_topic_that_is_deleted_while_it_is_read_ends_the_job(silver, admin, broker, start, run_here):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    assert run_here("kafka_producer.py", *silver[0], "--rate", 0, "--count", 5).returncode == 0
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch 0: 5 rows in")
    admin.delete_topics([topic])
    assert consumer.wait() == 1
    assert f'error: The topic "{topic}" on {broker} is gone' in consumer.output and "Traceback" not in consumer.output


@pytest.mark.long
def test_partitions_that_are_added_are_read_from_their_beginning(spark, broker, silver, admin, start, produce, account):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    producers = [produce(silver[0])]
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch")
    admin.create_partitions({topic: 3})
    producers.append(produce(silver[0]))  # the first one may take five minutes to notice the new partitions
    wait_for_more(broker, topic, dict.fromkeys(range(3), 0), 100)
    consumer.wait_for("batch", times=consumer.output.count("batch") + 2)
    delivered = acknowledged(*producers)
    assert consumer.stop() == 0
    world_of(spark, options).consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("two partitions added while the stream runs", in_topic, *arrived)
    assert delivered == len(in_topic) and {partition for _, partition, _ in in_topic} == {0, 1, 2}


def test_a_name_that_does_not_resolve_is_waited_for(spark, world):
    """As of a new client in the middle of a run: Spark's consumers are replaced after some minutes without a record."""
    there = world()
    there.make()
    settings = spark._jvm.java.util.HashMap()
    settings.put("bootstrap.servers", "broker.invalid:9092")
    decoder = spark._jvm.org.apache.kafka.common.serialization.ByteArrayDeserializer()
    with pytest.raises(Py4JJavaError) as unresolved:
        spark._jvm.org.apache.kafka.clients.consumer.KafkaConsumer(settings, decoder, decoder)
    there.topic.wait_until_available(unresolved.value, StopFlag())
