"""local_kafka.py: the broker of docker-compose.yml without Docker."""

import re
import signal

from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports

import psutil
import pytest
import yaml
from kafka import KafkaConsumer

from helpers.processes import REPOSITORY, run_script
from local_kafka import kafka_properties, kafka_version, zookeeper_properties

SERVICES = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def test_every_setting_comes_from_docker_compose():
    kafka = kafka_properties(SERVICES["kafka"]["environment"], 9999, 2222, "/data")
    assert re.fullmatch(r"HOST://localhost:9999,DOCKER://localhost:\d{4,5}", kafka["listeners"])
    assert kafka["advertised.listeners"] == kafka["listeners"]
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
        "autopurge.snapRetainCount": 3,
        "autopurge.purgeInterval": 1,
    }


def test_each_listener_has_a_port_of_its_own_and_names_are_those_of_the_image():
    kafka = kafka_properties(
        {
            "KAFKA_LISTENERS": "A://0.0.0.0:9092,B://:29092,C://kafka:39092",
            "KAFKA_ADVERTISED_LISTENERS": "C://kafka:39092,A://a:9092",
            "KAFKA_LISTENER_NAME_A_SCRAM___SHA___512_X__Y": 1,
        },
        9999,
        2222,
        "/data",
    )
    a, b, c = (listener.split("://localhost:")[1] for listener in kafka["listeners"].split(","))
    assert a == "9999" and len({a, b, c}) == 3
    assert kafka["advertised.listeners"] == f"C://localhost:{c},A://localhost:9999"
    assert kafka["listener.name.a.scram-sha-512.x_y"] == 1


def test_a_setting_that_is_not_known_is_named():
    with pytest.raises(PipelineError, match="has ZOOKEEPER_QUORUM, which local_kafka.py does not know. Add it to"):
        zookeeper_properties({"ZOOKEEPER_QUORUM": 3}, 2222, "/data")


def test_the_version_is_the_one_inside_the_image():
    assert SERVICES["kafka"]["image"].split(":")[1] == SERVICES["zookeeper"]["image"].split(":")[1]
    assert kafka_version(SERVICES["kafka"]["image"]).startswith("3.9.")
    with pytest.raises(PipelineError, match="knows only Confluent 7.9"):
        kafka_version("confluentinc/cp-kafka:8.0.0")


def test_a_folder_has_one_kafka_even_if_its_script_was_killed(start, tmp_path):
    port, other = free_ports(2)
    kafka = start("local_kafka.py", "--port", port, "--data-dir", tmp_path)
    kafka.wait_for("Kafka is ready")
    properties = (tmp_path / "kafka.properties").read_text()
    for _ in range(2):
        second = run_script("local_kafka.py", "--port", other, "--data-dir", tmp_path)
        assert second.returncode == 1
        assert f"error: The local Kafka on localhost:{port} is using {tmp_path}. Use it, stop it" in second.stderr
        kafka.stop(signal.SIGKILL)
    assert (tmp_path / "kafka.properties").read_text() == properties
    servers = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert len(servers) == 2
    for server in servers:
        server.kill()
    psutil.wait_procs(servers)
    kafka = start("local_kafka.py", "--port", other, "--data-dir", tmp_path)
    kafka.wait_for(f"Kafka is ready on localhost:{other}")
    assert kafka.stop() == 0


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
