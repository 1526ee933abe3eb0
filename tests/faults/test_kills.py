"""Both streams are killed with kill -9 at random moments and between the two writes of a batch, as records keep coming.

Each stream is killed twice, or 20 times with `--long`.
"""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

from pipeline.contract.contract import load_contract
from pipeline.paths import quarantine_of

import pytest
from kafka import KafkaConsumer

from helpers import oracle
from helpers.files import put
from helpers.processes import PATIENCE, acknowledged
from helpers.records import reading
from helpers.topics import origins, tables

CONSUMER, BRONZE = "spark_kafka_consumer.py", "streaming_files_to_delta_bronze.py"


def last_batch(table: str) -> int:
    """The number of the newest batch in the log of a Delta table, or -1."""
    for commit in sorted(Path(table, "_delta_log").glob("*.json"), reverse=True):
        for action in map(json.loads, commit.read_text().splitlines()):
            if "txn" in action:
                return action["txn"]["version"]
    return -1


def kill_between_the_writes(script, table: str) -> bool:
    """Tries to kill the script when a batch is in the table but not in the quarantine; returns whether it succeeded."""
    log = Path(table, "_delta_log")
    before, deadline = last_batch(table), time.monotonic() + PATIENCE
    seen = set()
    while time.monotonic() < deadline and script.process.poll() is None:
        commits = {name for name in os.listdir(log) if name.endswith(".json")} if log.exists() else set()
        if commits != seen and last_batch(table) > before:
            break
        seen = commits
        time.sleep(0.002)
    script.stop(signal.SIGKILL)
    return last_batch(table) > last_batch(quarantine_of(table))


def kill_again_and_again(start, command: list, table: str, kills: int) -> int:
    """Starts and kills a stream `kills` times. Returns how many kills came between the two writes of a batch."""
    moments, between = random.Random(7), 0
    for kill in range(kills):
        script = start(*command)
        if kill % 2 == 0:
            between += kill_between_the_writes(script, table)
        else:
            time.sleep(moments.uniform(2, 25))
            script.stop(signal.SIGKILL)
    return between


def test_the_consumer_is_killed_while_the_producer_runs(
    spark, broker, silver, start, produce, account, pytestconfig, run_here
):
    topic, options = silver
    kills = 20 if pytestconfig.option.long else 2
    producer = produce(topic)
    producer.wait_for("acknowledged")
    table = str(options[options.index("--table") + 1])

    between = kill_again_and_again(start, [CONSUMER, *options, "--trigger", "0 seconds"], table, kills)

    delivered = acknowledged(producer)
    last = run_here(CONSUMER, *options, "--once")
    assert (last.returncode, last.stderr) == (0, "")
    in_topic, *arrived = origins(spark, broker, options)
    account(f"{kills} kills of the consumer, {between} of them between its two writes", in_topic, *arrived)
    assert between and delivered == len(in_topic)


@pytest.mark.long
def test_the_consumer_of_arrays_is_killed_while_the_producer_runs(
    spark, broker, silver, start, account, pytestconfig, run_here, tmp_path
):
    """The same, with three readings in each message: all of them arrive once, each in a row of its own or among the `elements`."""
    (topic, options), kills = silver, 20 if pytestconfig.option.long else 2
    contract = tmp_path / "gateway.py"
    contract.write_text(
        "from pipeline.contract import *\n"
        "fields = Text('gateway'), Timestamp('readings[].ts', format='epoch_ms'), Number('readings[].t')\n"
        "CONTRACT = Contract(fields, {'too_hot': 't > 60'})\n"
    )
    simulated = ["--create-topic", "--rate", 200, "--invalid-fraction", 0.05, "--readings", contract]
    producer = start("kafka_producer.py", *topic, *simulated)
    producer.wait_for("acknowledged")
    table = str(options[options.index("--table") + 1])
    options = [*options, "--readings", contract]

    between = kill_again_and_again(start, [CONSUMER, *options, "--trigger", "0 seconds"], table, kills)

    acknowledged(producer)
    last = run_here(CONSUMER, *options, "--once")
    assert (last.returncode, last.stderr) == (0, "")
    with KafkaConsumer(
        topic[3], bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        sent = [
            (message.partition, message.offset, element)
            for message in consumer
            for element, *_ in oracle.read_readings(load_contract(str(contract)), message.value, 2**62)
        ]
    accepted, rejected = tables(spark, options)
    account(
        f"{kills} kills of the consumer of arrays, {between} of them between its two writes",
        sent,
        [tuple(row) for row in accepted.select("partition", "offset", "element").collect()],
        [tuple(row) for row in rejected.selectExpr("partition", "offset", "explode_outer(elements)").collect()],
    )
    assert between and accepted.where("element = 2").count() > 100 and rejected.where("size(elements) > 1").count() > 10


def test_the_bronze_job_is_killed_while_files_arrive(spark, tmp_path, start, account, pytestconfig, run_here):
    folder, kills, sent, done = tmp_path / "input", 20 if pytestconfig.option.long else 2, [], threading.Event()
    folder.mkdir()
    table = str(tmp_path / "bronze")
    options = ["--input", folder, "--table", table, "--checkpoint", tmp_path / "checkpoint"]

    def write_files():
        while not done.wait(0.1):
            file = f"{len(sent) // 20}.json"
            # Every twentieth line breaks a rule.
            put(
                folder, file, *[reading(device_id=f"line-{line}", value=500 if line == 7 else 20) for line in range(20)]
            )
            sent.extend((file, f"line-{line}") for line in range(20))

    writer = threading.Thread(target=write_files)
    writer.start()
    try:
        between = kill_again_and_again(start, [BRONZE, *options, "--trigger", "0 seconds"], table, kills)
    finally:
        done.set()
        writer.join()
    last = run_here(BRONZE, *options, "--once")
    assert (last.returncode, last.stderr) == (0, "")

    accepted, rejected = (spark.read.format("delta").load(path).collect() for path in (table, quarantine_of(table)))
    account(
        f"{kills} kills of the Bronze job, {between} of them between its two writes",
        sent,
        [(os.path.basename(row.source_file), row.device_id) for row in accepted],
        [(os.path.basename(row.source_file), json.loads(row.raw)["device_id"]) for row in rejected],
    )
    assert between
