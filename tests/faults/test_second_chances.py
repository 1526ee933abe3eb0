"""A firmware update, and a gateway that resends a day: streams and replays are killed, and an independent count must agree."""

import json
import random
import signal
import threading
import time
from collections import Counter

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from helpers.topics import tables

CONSUMER, REPLAY = "spark_kafka_consumer.py", "replay_quarantine.py"
FIELDS = "Text('device'), Timestamp('ts', column='event_time', format='epoch_s'), Number('{}', column='temperature')"
CONTRACT = "from pipeline.contract import *\nCONTRACT = Contract(({}), {{'too_hot': 'temperature > 60'}}, key={})\n"


@pytest.fixture
def topic(silver, broker):
    """A topic with three partitions, and the options of a stream that writes to a table of its own."""
    topic, options = silver
    with KafkaAdminClient(bootstrap_servers=broker) as admin:
        admin.create_topics({topic[3]: {"num_partitions": 3, "replication_factor": 1}}, wait_for_metadata=True)
    return topic[3], options


def sent_to(broker: str, topic: str) -> dict[tuple[int, int], bytes]:
    """The messages of a topic by their place."""
    with KafkaConsumer(
        topic, bootstrap_servers=broker, auto_offset_reset="earliest", consumer_timeout_ms=5000
    ) as consumer:
        return {(message.partition, message.offset): message.value for message in consumer}


def places(spark, options) -> tuple[Counter, Counter]:
    """How often the table and the quarantine have the message of each place."""
    return tuple(
        Counter(tuple(row) for row in rows.select("partition", "offset").collect()) for rows in tables(spark, options)
    )


def test_after_a_firmware_update_the_rejected_readings_move_while_stream_and_replays_are_killed(
    spark, broker, topic, start, account, pytestconfig, tmp_path, run_here
):
    """The new firmware says "temp". Replays use a contract that knows it, while the stream still runs with the old contract."""
    name, options = topic
    kills, moments = (20 if pytestconfig.option.long else 3), random.Random(7)
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text(CONTRACT.format(FIELDS.format("temperature"), ()))
    new.write_text(CONTRACT.format(FIELDS.format("temp"), ()))
    stream = [CONSUMER, *options, "--readings", old, "--trigger", "0 seconds"]
    replay = [REPLAY, options[options.index("--table") + 1], "--readings", new]
    done = threading.Event()

    def send() -> None:
        with KafkaProducer(bootstrap_servers=broker) as producer:
            for number in range(10**9):
                if done.wait(0.005):
                    return
                field = "temp" if number % 3 else "temperature"
                reading = {"device": "d", "ts": 1763632800 + number // 2, field: 20 if number % 20 else 80}
                # Every tenth one comes twice: without a key, these are different records.
                for _ in range(1 + (number % 10 == 0)):
                    producer.send(name, json.dumps(reading).encode())

    sender = threading.Thread(target=send)
    sender.start()
    try:
        running = start(*stream)
        running.wait_for("accepted")
        for kill in range(kills):
            script = start(*replay)
            if kill % 3 == 1:  # two at once
                other = start(*replay)
                assert (other.wait(), script.wait()) == (0, 0), script.output + other.output
            elif kill % 3 == 2:
                running.stop(signal.SIGKILL)
                running = start(*stream)
                script.stop(signal.SIGKILL)
            else:
                script.wait_for("part 1 of") if kill % 2 else time.sleep(moments.uniform(5, 25))
                script.stop(signal.SIGKILL)
    finally:
        done.set()
        sender.join()
    running.stop()
    assert start(*stream, "--once").wait() == 0
    last = run_here(*replay)
    assert last.returncode == 0 and "with a different contract" in last.stderr, last

    sent = {place: json.loads(value) for place, value in sent_to(broker, name).items()}
    accepted, rejected = places(spark, options)
    account(f"{kills} kills of replays, and of the stream", sent, accepted.elements(), rejected.elements())
    # The old contract accepted the cool readings of the old firmware; the new one accepts only those of the new firmware.
    is_valid = {place for place, fields in sent.items() if 20 in (fields.get("temp"), fields.get("temperature"))}
    assert accepted.keys() == is_valid and len(is_valid) > 300
    reasons = {row.reject_reason for row in tables(spark, options)[1].select("reject_reason").distinct().collect()}
    assert {"too_hot", "missing_temp"} <= reasons and not any("replay" in reason for reason in reasons)


def test_a_gateway_that_resends_its_day_adds_no_reading_however_often_the_stream_is_killed(
    spark, broker, topic, start, account, pytestconfig, tmp_path, run_here
):
    name, options = topic
    kills, moments = (20 if pytestconfig.option.long else 2), random.Random(7)
    contract = tmp_path / "gateway.py"
    fields = "Text('gw'), Text('r[].id', column='device'), Timestamp('r[].ts', column='event_time', format='epoch_s'), Number('r[].t')"
    contract.write_text(
        f"from pipeline.contract import *\nCONTRACT = Contract(({fields}), {{'hot': 't > 60'}}, key=('device', 'event_time'))\n"
    )
    rng, day = random.Random(7), []
    for number in range(900):
        ids = [rng.choice("abcd") for _ in range(3)]  # sometimes the same one twice in a message
        day.append(
            {"gw": "g", "r": [{"id": id, "ts": 1763632800 + number, "t": rng.choice([20, 20, 99])} for id in ids]}
        )
    command = [CONSUMER, *options, "--readings", contract, "--trigger", "0 seconds", "--max-offsets-per-trigger", 300]
    with KafkaProducer(bootstrap_servers=broker) as producer:
        for again in range(3):
            for message in day if again != 1 else day[300:600]:
                producer.send(name, json.dumps(message | {"again": again}).encode())
    for _ in range(kills):
        running = start(*command)
        running.wait_for("batch ")
        time.sleep(moments.uniform(0, 3))
        running.stop(signal.SIGKILL)
    last = run_here(*command, "--once")
    assert (last.returncode, last.stderr) == (0, "")
    again = run_here(REPLAY, options[options.index("--table") + 1], "--readings", contract)
    assert ", 0 moved," in again.stdout, again

    sent = {
        (*place, number): (element["id"], element["ts"], element["t"])
        for place, value in sent_to(broker, name).items()
        for number, element in enumerate(json.loads(value)["r"])
    }
    accepted, rejected = tables(spark, options)
    rows = accepted.selectExpr("partition", "offset", "element", "device", "unix_seconds(event_time)", "t").collect()
    listed = rejected.where("reject_reason IN ('hot', 'duplicate')").selectExpr(
        "partition", "offset", "explode(elements)", "reject_reason"
    )
    reasons = {tuple(row)[:3]: row.reject_reason for row in listed.collect()}
    account(f"{kills} kills of the consumer while a day is resent", sent, [tuple(row)[:3] for row in rows], reasons)
    valid = {(device, ts) for device, ts, t in sent.values() if t == 20}
    assert Counter(tuple(row)[3:5] for row in rows) == Counter(valid)
    assert all(row.t == 20 for row in rows)
    hot = {place for place, (_, _, t) in sent.items() if t == 99}
    assert {place for place, reason in reasons.items() if reason == "hot"} == hot
