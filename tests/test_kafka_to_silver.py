"""Kafka -> Silver with the real scripts, broker and tables: starts, stops and kills, and an account of all records."""

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import urlopen

from pipeline.delta.tables import silver_tables
from pipeline.streaming.metrics import SILENT_SECONDS, Metrics
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from prometheus_client.parser import text_string_to_metric_families
from pyspark.sql import functions as F

from helpers.processes import PATIENCE, REPOSITORY, run_script
from helpers.records import reading
from helpers.topics import origins, tables, world_of
from readings import CONTRACT

CONSUMER, PRODUCER = "spark_kafka_consumer.py", "kafka_producer.py"


@pytest.mark.long
def test_nothing_is_lost_or_doubled_by_stops_and_kills_while_the_producer_runs(spark, broker, silver, start, account):
    topic, options = silver
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")  # before the topic exists
    consumer.wait_for("No topic")
    producer = start(PRODUCER, *topic, "--create-topic", "--rate", 100, "--invalid-fraction", 0.2, "--seed", 5)
    consumer.wait_for("batch", times=3)
    assert consumer.stop(signal.SIGINT) == 0 and "Traceback" not in consumer.output
    assert re.search(
        r"batch 1: [\d,]+ rows in, [\d,]+ accepted, [\d,]+ rejected \(.+\), [\d.]+ s, [\d,]+ messages behind",
        consumer.output,
    )

    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch", times=2)
    consumer.stop(signal.SIGKILL)

    [port] = free_ports(1)
    consumer = start(
        CONSUMER, *options, "--max-offsets-per-trigger", 700, "--trigger", "1 second", "--metrics-port", port
    )
    consumer.wait_for("batch", times=2)
    assert urlopen(f"http://127.0.0.1:{port}/healthz").status == 200
    figures = {
        sample.name + str(sample.labels): sample.value
        for family in text_string_to_metric_families(urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
        for sample in family.samples
    }
    assert figures["pipeline_accepted_records_total{}"] > 0 and figures["pipeline_batch_seconds_count{}"] >= 1
    assert 0 <= time.time() - figures["pipeline_newest_record_timestamp_seconds{}"] < PATIENCE
    assert figures["pipeline_rejected_records_total{'reason': 'empty_record'}"] > 0
    assert {f"pipeline_lag_records{{'partition': '{partition}'}}" for partition in range(3)} < figures.keys()
    assert consumer.stop(signal.SIGTERM) == 0 and "Traceback" not in consumer.output

    assert producer.stop(signal.SIGINT) == 0
    sent, acknowledged = producer.counts()
    assert sent == acknowledged

    last = run_script(CONSUMER, *options, "--once")
    assert (last.returncode, last.stderr) == (0, "")
    in_topic, *arrived = origins(spark, broker, options)
    account("stops and kills while the producer runs", in_topic, *arrived)
    assert len(in_topic) == sent
    accepted, rejected = tables(spark, options)
    assert {row.reject_reason for row in rejected.select("reject_reason").distinct().collect()} == set(CONTRACT.reasons)
    assert (
        accepted.where("device_id IS NULL OR event_time IS NULL OR kafka_key <> CAST(device_id AS BINARY)").count() == 0
    )


def test_a_client_that_asks_the_metrics_for_nothing_is_hung_up_on(monkeypatch):
    [port] = free_ports(1)
    monkeypatch.setattr("pipeline.streaming.metrics.CLIENT_SECONDS", 0.5)
    Metrics("127.0.0.1", port, ["malformed_json"])
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"GET")
        client.settimeout(60)
        assert client.recv(1) == b""


def test_a_stream_that_does_not_run_is_unhealthy_and_a_port_in_use_is_said():
    [port] = free_ports(1)
    metrics = Metrics("127.0.0.1", port, ["malformed_json"])
    for works in (False, True, False):
        metrics.working(works)
        with suppress(HTTPError):
            assert urlopen(f"http://127.0.0.1:{port}/healthz").read() == b"ok\n" and works
            continue
        assert not works
    figures = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'pipeline_rejected_records_total{reason="malformed_json"} 0.0' in figures  # before the first one
    metrics.working(True)
    metrics.heard_at -= SILENT_SECONDS  # as after kill -STOP of Spark's JVM
    with pytest.raises(HTTPError, match="503"):
        urlopen(f"http://127.0.0.1:{port}/healthz")
    with pytest.raises(PipelineError, match=f"can't be served on 127.0.0.1:{port}: .* Choose another --metrics-port"):
        Metrics("127.0.0.1", port, ["malformed_json"])


@pytest.mark.parametrize("script", ["spark_kafka_consumer", "streaming_files_to_delta_bronze"])
def test_a_stream_imports_no_library_of_what_nobody_asks_for(script):
    code = f"import sys, {script}; sys.exit(str({{'prometheus_client', 'rich'}} & sys.modules.keys()).replace('set()', '') or 0)"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_record_arrives_as_it_was_sent_with_its_origin(spark, broker, silver, run_here):
    topic, options = silver
    assert run_here(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    records = [
        reading(device_id="Gerät 🌡", building="\x00\n"),
        b"\xff\xfe",
        None,
        b"",
        b'{"device_id": "\x1b[2J"}',
        b"[1]",
    ]
    with KafkaProducer(bootstrap_servers=broker) as producer:
        for record in records:
            producer.send(topic[3], value=record, key=b"\xffkey", partition=1, timestamp_ms=1_700_000_000_123)

    world_of(spark, options).consume()

    accepted, rejected = tables(spark, options)
    silver_columns = silver_tables("", CONTRACT.columns)
    for table, columns in ((accepted, silver_columns.columns), (rejected, silver_columns.quarantine_columns)):
        assert [(name, kind.upper()) for name, kind in table.dtypes] == list(columns.items())
    origin = ["topic", "partition", "offset", "kafka_key", F.unix_millis("kafka_timestamp")]
    sent = [(topic[3], 1, offset, b"\xffkey", 1_700_000_000_123) for offset in range(len(records))]
    assert accepted.select("raw_json", "device_id", "building", *origin).collect() == [
        (records[0].decode(), "Gerät 🌡", "\x00\n", *sent[0])
    ]
    assert rejected.select("raw", "reject_reason", *origin).orderBy("offset").collect() == [
        (records[1], "invalid_encoding", *sent[1]),
        (None, "empty_record", *sent[2]),
        (b"", "empty_record", *sent[3]),
        (records[4], "malformed_json", *sent[4]),
        (b"[1]", "malformed_json", *sent[5]),
    ]

    shown = run_here("read_silver.py", "--table", options[5], "--rejected", "--raw")
    assert shown.returncode == 0 and "\x1b" not in shown.stdout and "device_id" in shown.stdout
    assert f"1 rows in {options[5]}\n5 rows in {options[5]}_quarantine\n" in shown.stdout


def test_the_producer_sends_the_same_values_for_the_same_seed(broker, silver, run_here):
    topic, _ = silver
    command = [PRODUCER, *topic, "--create-topic", "--rate", 0, "--count", 50, "--seed", 3, "--devices", 4]
    for run in (run_here(*command), run_here(*command)):
        assert (run.returncode, run.stdout.splitlines()[-1]) == (0, "50 sent, 50 acknowledged.")
    with KafkaConsumer(
        topic[3], bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        records = [(message.key, re.sub(rb'"timestamp": "[^"]+"', b"", message.value)) for message in consumer]
    by_device = [[value for key, value in records if key == f"sensor-{number:03}".encode()] for number in (1, 2, 3, 4)]
    assert [len(values) for values in by_device] == [26, 26, 24, 24]
    assert all(values[: len(values) // 2] == values[len(values) // 2 :] for values in by_device)
    assert len({re.sub(rb'"value": [^,]+', b"", value) for _, value in records}) == 4  # only a device's value changes


def test_a_message_that_cannot_be_delivered_is_an_error_and_never_silence(broker, silver, run_here):
    topic, _ = silver
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.create_topics(
            {topic[3]: {"num_partitions": 1, "replication_factor": 1, "configs": {"max.message.bytes": "10"}}},
            wait_for_metadata=True,
        )
    run = run_here(PRODUCER, *topic, "--rate", 0, "--count", 3)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.startswith(
        f'error: 3 of 3 messages could not be delivered to the topic "{topic[3]}" on {broker}: '
    )
    assert run.stdout.endswith("3 sent, 0 acknowledged.\n")
