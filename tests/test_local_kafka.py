"""local_kafka.py: the broker of docker-compose.yml without Docker."""

from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports

import pytest
import yaml
from kafka import KafkaConsumer

from helpers.processes import REPOSITORY, run_script
from local_kafka import kafka_properties, kafka_version, zookeeper_properties

SERVICES = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def test_every_setting_comes_from_docker_compose():
    kafka = kafka_properties(SERVICES["kafka"]["environment"], 9999, 1111, 2222, "/data")
    assert kafka["listeners"] == "HOST://localhost:9999,DOCKER://localhost:1111"
    assert kafka["advertised.listeners"] == "HOST://localhost:9999,DOCKER://localhost:1111"
    assert (kafka["zookeeper.connect"], kafka["log.dirs"]) == ("localhost:2222", "/data/kafka")
    own = {"listeners", "advertised.listeners", "zookeeper.connect", "log.dirs"}
    assert {name: value for name, value in kafka.items() if name not in own} == {
        name.removeprefix("KAFKA_").replace("_", ".").lower(): value
        for name, value in SERVICES["kafka"]["environment"].items()
        if name not in ("KAFKA_LISTENERS", "KAFKA_ADVERTISED_LISTENERS", "KAFKA_ZOOKEEPER_CONNECT", "KAFKA_HEAP_OPTS")
    }
    assert zookeeper_properties(SERVICES["zookeeper"]["environment"], 2222, "/data") == {
        "clientPort": 2222,
        "clientPortAddress": "127.0.0.1",
        "dataDir": "/data/zookeeper",
        "tickTime": 2000,
        "admin.enableServer": "false",
    }


def test_the_version_is_the_one_inside_the_image():
    assert SERVICES["kafka"]["image"].split(":")[1] == SERVICES["zookeeper"]["image"].split(":")[1]
    assert kafka_version(SERVICES["kafka"]["image"]).startswith("3.9.")
    with pytest.raises(PipelineError, match="knows only Confluent 7.9"):
        kafka_version("confluentinc/cp-kafka:8.0.0")


def test_a_second_start_goes_on_with_the_same_data(start, tmp_path):
    [port] = free_ports(1)
    server = f"localhost:{port}"
    for run in (1, 2):
        kafka = start("local_kafka.py", "--port", port, "--data-dir", tmp_path)
        kafka.wait_for(f"Kafka is ready on {server}")
        create = ["--create-topic"] if run == 1 else []
        sent = run_script("kafka_producer.py", "--bootstrap-servers", server, "--rate", 0, "--count", 5, *create)
        assert sent.returncode == 0, sent.stderr
        assert kafka.stop() == 0
        assert kafka.output.endswith("Kafka and ZooKeeper have stopped.\n") and "Traceback" not in kafka.output
    kafka = start("local_kafka.py", "--port", port, "--data-dir", tmp_path)
    kafka.wait_for("Kafka is ready")
    with KafkaConsumer(
        "sensor_data", bootstrap_servers=server, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        assert len(list(consumer)) == 10
    assert kafka.stop() == 0
