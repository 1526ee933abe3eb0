"""Records that Kafka loses before they are read, a topic that is made again, and partitions that are added."""

import time

import pytest
from conftest import origins, run_script, tables
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.errors import TopicAlreadyExistsError
from test_rules import reading

CONSUMER, PRODUCER = "spark_kafka_consumer.py", "kafka_producer.py"


@pytest.fixture
def admin(broker):
    with KafkaAdminClient(bootstrap_servers=broker) as client:
        yield client


def make_topic(admin, topic: str, partitions: int = 1) -> None:
    while topic not in admin.list_topics():
        try:
            admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
        except TopicAlreadyExistsError:  # the old one is still being deleted
            time.sleep(0.2)


def send(broker: str, topic: str, values: range, partition: int = 0) -> None:
    with KafkaProducer(bootstrap_servers=broker) as producer:
        for value in values:
            producer.send(topic, value=reading(value=value), partition=partition)


def read_all(options: list, *more: str) -> str:
    run = run_script(CONSUMER, *options, "--once", *more)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def refusal(options: list) -> str:
    run = run_script(CONSUMER, *options, "--once")
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert "--accept-data-loss" in run.stderr
    return run.stderr


def values_of(spark, options: list) -> list[float]:
    return sorted(row.value for row in tables(spark, options)[0].select("value").collect())


def test_records_that_retention_removed_stop_the_job_which_names_them_and_can_be_told_to_go_on(
        spark, broker, silver, admin, account):
    (_, _, _, topic), options = silver
    make_topic(admin, topic, partitions=2)
    for partition in (0, 1):
        send(broker, topic, range(0, 10), partition)
    read_all(options)
    for partition in (0, 1):
        send(broker, topic, range(10, 30), partition)
    admin.delete_records({TopicPartition(topic, 0): 15, TopicPartition(topic, 1): 20})

    assert "partition 0 offsets 10 to 14, partition 1 offsets 10 to 19" in refusal(options)
    assert values_of(spark, options) == sorted([*range(10)] * 2)  # nothing was skipped

    said = read_all(options, "--accept-data-loss")
    assert "partition 0 offsets 10 to 14, partition 1 offsets 10 to 19" in said
    assert values_of(spark, options) == sorted([*range(10), *range(15, 30), *range(10), *range(20, 30)])
    in_topic, *arrived = origins(spark, broker, options)
    account("15 records removed by retention, --accept-data-loss",
            in_topic + [(topic, partition, offset) for partition, end in ((0, 15), (1, 20)) for offset in range(10)],
            *arrived)


def test_a_topic_that_was_made_again_stops_the_job_even_where_it_has_more_records_than_the_old_one(
        spark, broker, silver, admin, account):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    send(broker, topic, range(0, 5))
    read_all(options)
    admin.delete_topics([topic])
    while topic in admin.list_topics():
        time.sleep(0.2)
    make_topic(admin, topic)
    send(broker, topic, range(20, 50))

    assert f'"{topic}" on {broker} was deleted and made again' in refusal(options)
    assert "from {'0': 5} on (partition: offset) is gone" in refusal(options)
    assert values_of(spark, options) == [*range(5)]

    assert "the new topic is read from its beginning" in read_all(options, "--accept-data-loss")
    send(broker, topic, range(50, 60))
    read_all(options)
    assert values_of(spark, options) == [*range(5), *range(20, 60)]
    account("the topic deleted and made again, --accept-data-loss", [*range(5), *range(20, 60)], values_of(spark, options), [])


def test_a_topic_that_is_deleted_while_it_is_read_ends_the_job(silver, admin, broker, start):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    send(broker, topic, range(0, 5))
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch 0: 5 rows in")
    admin.delete_topics([topic])
    assert consumer.wait() == 1
    assert f'error: The topic "{topic}" on {broker} is gone' in consumer.output and "Traceback" not in consumer.output


def test_partitions_that_are_added_are_read_from_their_beginning(spark, broker, silver, admin, start, account):
    (_, _, _, topic), options = silver
    make_topic(admin, topic)
    send(broker, topic, range(0, 10))
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch 0: 10 rows in")
    admin.create_partitions({topic: 3})
    send(broker, topic, range(10, 20), partition=2)
    send(broker, topic, range(20, 30), partition=1)
    consumer.wait_for("batch", times=2)
    assert consumer.stop() == 0
    read_all(options)
    account("two partitions added while the stream runs", *origins(spark, broker, options))
    assert values_of(spark, options) == [*range(30)]
