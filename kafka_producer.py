"""Simulated sensors -> Kafka: sends readings to the topic sensor_data, one JSON message a second.

A device keeps its place, type and unit, and its value drifts. The key of a message is the device id, so the readings of
a device stay in order. Delivery is idempotent and acknowledged by all replicas: a message that is counted as
acknowledged is in the topic, once. Ctrl+C delivers what was sent and prints the count; a message that can't be delivered
is an error.

    python3 kafka_producer.py --create-topic
    python3 kafka_producer.py --rate 200 --invalid-fraction 0.05
    python3 kafka_producer.py --rate 0 --count 1000000 --seed 1
"""

import common.process  # isort: skip  # before all else: a Ctrl+C during the other imports is clean, too

import argparse
import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone

from kafka import KafkaProducer
from kafka.errors import KafkaError

from common.console import PipelineError, argument_parser, at_least, fraction, run, say
from common.process import on_stop_signal
from common.readings import SENSOR_TYPES
from common.topics import Topic, add_topic_options

BUILDINGS = ("A", "B", "C")
FLOORS = range(6)


def main() -> None:
    options = parse_options()
    topic = Topic.of(options)
    topic.wait(options.wait, create=options.create_topic)
    stopping = threading.Event()
    on_stop_signal(stopping.set)
    send(simulate(options.devices, options.invalid_fraction, options.seed), topic, options, stopping)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_topic_options(parser)
    parser.add_argument("--rate", type=at_least(0, float), default=1, metavar="PER_SECOND",
                        help="messages per second; 0: as fast as it goes")
    parser.add_argument("--count", type=at_least(0), metavar="N", help="stop after so many messages")
    parser.add_argument("--devices", type=at_least(1), default=12, metavar="N", help="number of simulated devices")
    parser.add_argument("--seed", type=int, metavar="N", help="makes devices and values the same in each run")
    parser.add_argument("--invalid-fraction", type=fraction, default=0, metavar="F",
                        help="share of messages, 0 to 1, that break a rule, each kind of break in turn")
    parser.add_argument("--create-topic", action="store_true", help="make the topic, with 3 partitions, if it is missing")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def simulate(devices: int, invalid_fraction: float = 0, seed: int | None = None) -> Iterator[tuple[str, bytes | None]]:
    """Endless messages (device id, record) of `devices` devices in turn, the time in them being the present."""
    rng = random.Random(seed)
    fleet = []
    for number in range(1, devices + 1):
        sensor_type, sensor = list(SENSOR_TYPES.items())[number % len(SENSOR_TYPES)]
        usual = rng.uniform(*sensor.typical)
        fleet.append({"device_id": f"sensor-{number:03}", "building": rng.choice(BUILDINGS), "floor": rng.choice(FLOORS),
                      "type": sensor_type, "value": usual, "unit": sensor.unit, "usual": usual})
    breaks = itertools.cycle(BREAKS.values())
    for device in itertools.cycle(fleet):
        sensor = SENSOR_TYPES[device["type"]]
        step = (sensor.typical[1] - sensor.typical[0]) / 50
        # A random walk that is drawn back to where the device started, so that it never leaves the sanity range.
        device["value"] += rng.gauss(0, step) + (device["usual"] - device["value"]) / 20
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        reading = {"timestamp": now} | device | {"value": round(device["value"], 2)}
        del reading["usual"]
        record = to_json(reading)
        if rng.random() < invalid_fraction:
            record = next(breaks)(reading)
        yield device["device_id"], record


def to_json(reading: dict) -> bytes:
    return json.dumps(reading, ensure_ascii=False).encode()


def without(field: str):
    return lambda reading: to_json({name: value for name, value in reading.items() if name != field})


def replacing(**fields):
    return lambda reading: to_json(reading | fields)


# A way to break each rule of common/readings.py, by the reason that it is rejected for.
BREAKS = {
    "empty_record": lambda reading: None,
    "invalid_encoding": lambda reading: to_json(reading)[:-1] + b', "note": "\xff"}',
    "malformed_json": lambda reading: to_json(reading)[:-1],
    "missing_device_id": without("device_id"),
    "missing_building": replacing(building=" "),
    "missing_type": replacing(type=""),
    "missing_unit": replacing(unit=None),
    "missing_value": replacing(value=None),
    "missing_timestamp": without("timestamp"),
    "invalid_device_id": replacing(device_id=7),
    "invalid_building": replacing(building=["A"]),
    "invalid_type": replacing(type={"name": "co2"}),
    "invalid_unit": replacing(unit=True),
    "invalid_value": lambda reading: to_json(reading | {"value": str(reading["value"])}),
    "invalid_floor": replacing(floor=1.5),
    "invalid_timestamp": lambda reading: to_json(reading | {
        "timestamp": (datetime.now(timezone.utc) + timedelta(days=3)).isoformat()}),
    "unknown_type": replacing(type="pressure"),
    "wrong_unit": replacing(unit="K"),
    "out_of_range": replacing(value=1e6),
}


def ticks(rate: float, stopping: threading.Event) -> Iterator[None]:
    """Comes up `rate` times a second, or without a pause for 0, until `stopping` is set."""
    begin = time.monotonic()
    for number in itertools.count():
        if rate:
            stopping.wait(begin + number / rate - time.monotonic())
        if stopping.is_set():
            return
        yield


def send(messages: Iterator[tuple[str, bytes | None]], topic: Topic, options: argparse.Namespace,
         stopping: threading.Event) -> None:
    """Sends `messages` at the rate and up to the count asked for, or until `stopping` is set; delivers all it has sent.

    Raises PipelineError where one can't be delivered.
    """
    sent, acknowledged, failure, send_error = 0, 0, None, None

    def count_delivery(_):
        nonlocal acknowledged
        acknowledged += 1

    def note_failure(error):
        nonlocal failure
        failure = error
        stopping.set()

    producer = topic.client(KafkaProducer, enable_idempotence=True, acks="all", batch_size=128 * 1024,
                            linger_ms=0 if options.rate and options.rate < 100 else 20, allow_auto_create_topics=False)
    say(f"Sending to {topic}. Ctrl+C stops.")
    shown = time.monotonic()
    try:
        # The tick comes first, so that the time in a message is the one at which it is sent.
        for _, (key, record) in zip(itertools.islice(ticks(options.rate, stopping), options.count), messages):
            producer.send(topic.name, key=key.encode(), value=record).add_callback(count_delivery).add_errback(
                note_failure)
            sent += 1
            if time.monotonic() - shown >= 1 or sent == 1:
                shown = time.monotonic()
                say(f"{sent:,} sent, {acknowledged:,} acknowledged; last: {(record or b'null').decode(errors='replace')}")
        producer.flush()
    except KafkaError as error:
        send_error = error
    finally:
        with suppress(KafkaError):  # it flushes again, and fails again; what failed is known by then
            producer.close(timeout=10)
    say(f"{sent:,} sent, {acknowledged:,} acknowledged.")
    if failure := failure or send_error:  # what became of a message says more than that a flush failed
        raise PipelineError(f"{sent - acknowledged:,} of {sent:,} messages could not be delivered to {topic}: "
                            f"{failure}. Check that Kafka runs and has the topic, then start again.")


if __name__ == "__main__":
    run(main)
