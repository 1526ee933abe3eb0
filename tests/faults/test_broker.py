"""Kafka and ZooKeeper are killed with kill -9 while the producer and the consumer run."""

import re
import signal
import subprocess
from collections import defaultdict
from pathlib import Path

from pipeline.kafka.brokers import NoBrokerError
from pipeline.kafka.topics import Topic
from pipeline.terminal.ports import free_ports

import javaproperties
import psutil
import pytest
from kafka import KafkaAdminClient, KafkaConsumer

from helpers.processes import PATIENCE, acknowledged, until
from helpers.topics import origins, world_of

CONSUMER = "spark_kafka_consumer.py"


@pytest.fixture
def own_broker(start, tmp_path):
    """A function that starts local_kafka.py, always with the same data, and the address of the broker."""
    [port] = free_ports(1)

    def start_broker():
        kafka = start("local_kafka.py", "--port", port, "--data-dir", tmp_path / "kafka")
        kafka.wait_for("Kafka is ready")
        return kafka

    yield start_broker, f"localhost:{port}"
    for process in processes(tmp_path):
        process.kill()


def processes(data_dir, name: str = "") -> list[psutil.Process]:
    """The server processes with this data, or only the one started with `name`.properties."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and process.info["cmdline"][-1].startswith(str(data_dir))
        and process.info["cmdline"][-1].endswith(f"{name}.properties")
    ]


def kill(data_dir, name: str) -> None:
    [server] = processes(data_dir, name)
    server.kill()


def messages(broker: str, topic: str) -> list:
    with KafkaConsumer(
        topic, bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        return list(consumer)


def test_kafka_and_zookeeper_are_killed_while_the_producer_and_the_consumer_run(
    spark, own_broker, tmp_path, start, produce, account
):
    start_broker, broker = own_broker
    kafka = start_broker()
    # With these timeouts, an outage of seconds acts like one of minutes with Kafka's defaults.
    impatient = tmp_path / "impatient.properties"
    impatient.write_text("default.api.timeout.ms=10000\nrequest.timeout.ms=8000\n")
    # A batch that is being read waits two minutes for Kafka. By default, the producer also gives up after two minutes.
    patient = tmp_path / "patient.properties"
    patient.write_text("delivery.timeout.ms=600000\n")
    topic = ["--bootstrap-servers", broker, "--topic", "readings"]
    options = [*topic, "--table", tmp_path / "silver", "--checkpoint", tmp_path / "checkpoint", "--trigger", "1 second"]
    producer = produce([*topic, "--kafka-config", patient])
    consumer = start(CONSUMER, *options, "--kafka-config", impatient)
    consumer.wait_for("batch", times=2)

    kill(tmp_path, "kafka")
    kafka.wait_for("Kafka has ended: it was killed by signal 9")
    consumer.wait_for("batch", times=consumer.output.count("batch") + 4)
    kill(tmp_path, "zookeeper")
    kafka.wait_for("ZooKeeper has ended: it was killed by signal 9")
    consumer.wait_for("batch", times=consumer.output.count("batch") + 4)

    kafka.process.kill()  # from now on, nothing restarts them
    kill(tmp_path, "kafka")
    kill(tmp_path, "zookeeper")
    consumer.wait_for("no longer answers")
    last_start = start_broker()
    consumer.wait_for("Resuming from the last committed offsets")
    consumer.wait_for("batch", times=consumer.output.count("batch") + 2)

    delivered = acknowledged(producer)
    assert consumer.stop(signal.SIGINT) == 0, consumer.output
    world_of(spark, options[:8]).consume()
    in_topic, *arrived = origins(spark, broker, options)
    account("kill -9 of Kafka, of ZooKeeper, of both", in_topic, *arrived)
    assert delivered == len(in_topic)
    times = defaultdict(list)
    for message in messages(broker, "readings"):
        if sent_at := re.search(rb'"timestamp": "([^"]{23}Z)"', message.value or b""):  # some are broken on purpose
            times[message.key].append(sent_at[1])
    assert len(times) == 12
    for of_device in times.values():
        assert of_device == sorted(of_device)

    patient.write_text("delivery.timeout.ms=5000\nrequest.timeout.ms=3000\n")
    producer = produce([*topic, "--kafka-config", patient])
    producer.wait_for("acknowledged", times=3)
    last_start.process.kill()
    kill(tmp_path, "kafka")
    assert producer.wait() == 1
    assert re.search(r"error: [\d,]+ of [\d,]+ messages could not be delivered to the topic", producer.output), (
        producer.output
    )


def test_partitions_whose_broker_is_away_are_waited_for(own_broker, tmp_path, start):
    start_broker, address = own_broker
    start_broker()
    topic = Topic(address, "readings")
    topic.wait(PATIENCE, create=3)
    [server] = processes(tmp_path, "kafka")
    settings = javaproperties.loads(Path(server.cmdline()[-1]).read_text())
    ports = free_ports(2)
    for name in ("listeners", "advertised.listeners"):
        unused = iter(ports)
        settings[name] = re.sub(r":\d+", lambda _: f":{next(unused)}", settings[name])  # noqa: B023
    second = tmp_path / "second.properties"
    second.write_text(javaproperties.dumps(settings | {"broker.id": "2", "log.dirs": str(tmp_path / "second")}))
    with (tmp_path / "second.log").open("w") as log:
        subprocess.Popen([*server.cmdline()[:-1], str(second)], stdout=log, stderr=log)
    with KafkaAdminClient(bootstrap_servers=address) as admin:
        until(lambda: len(admin.describe_cluster()["brokers"]) == 2)
        admin.create_partitions({topic.name: {"count": 4, "assignments": [[2]]}})
    topic.wait(PATIENCE)
    kill(tmp_path, "second")

    def is_away() -> bool:
        try:
            topic.wait(0)
            return False
        except NoBrokerError as problem:
            return str(problem) == f"The broker of some partitions of {topic} is down."

    until(is_away)
