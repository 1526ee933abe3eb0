"""Simulated sensors -> Kafka: sends readings to the topic sensor_data, one JSON message a second.

A device keeps its place, type and unit, and its value drifts. The key of a message is the device id, so the readings of
a device stay in order. Delivery is idempotent and acknowledged by all replicas: a message that is counted as
acknowledged is in the topic, once. Ctrl+C delivers what was sent and prints the count; a message that can't be delivered
is an error.

    python3 kafka_producer.py --create-topic
    python3 kafka_producer.py --rate 200 --invalid-fraction 0.05
    python3 kafka_producer.py --rate 0 --count 1000000 --seed 1

With --to-folder the readings come as files instead, as from a gateway: one of JSON lines every five seconds.

    python3 kafka_producer.py --to-folder input/sensor_data
"""

import common.process  # isort: skip  # noqa: F401 # first, so that Ctrl+C during the other imports is clean too

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError

from common.console import PipelineError, argument_parser, at_least, fraction, local_folder, run, say
from common.contract import Boolean, Field, Integer, Number, Timestamp
from common.process import StopFlag, on_stop_signal
from common.topics import Topic, add_topic_options
from readings import CONTRACT, SENSOR_TYPES

BUILDINGS = ("A", "B", "C")
FLOORS = range(6)
SHOW_SECONDS = 5  # from one line about what was sent to the next
FILE_SECONDS, FILE_RECORDS = 5, 10_000  # of --to-folder: whichever comes first


def main() -> None:
    options = parse_options()
    messages = simulate(options.devices, options.invalid_fraction, options.seed)
    stopping = StopFlag()
    if options.to_folder:
        on_stop_signal(stopping.set)
        write_files(messages, Path(options.to_folder), options, stopping)
    else:
        topic = Topic.of(options)
        topic.wait(options.wait, create=options.create_topic)
        on_stop_signal(stopping.set)
        send(messages, topic, options, stopping)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_topic_options(parser)
    parser.add_argument("--to-folder", type=local_folder, metavar="FOLDER", help="write files of JSON lines there, not to Kafka")
    parser.add_argument("--rate", type=at_least(0, float), default=1, metavar="PER_SECOND",
                        help="messages per second; 0: unlimited")
    parser.add_argument("--count", type=at_least(0), metavar="N", help="stop after N messages")
    parser.add_argument("--devices", type=at_least(1), default=12, metavar="N", help="number of simulated devices")
    parser.add_argument("--seed", type=int, metavar="N", help="makes devices and values the same in each run")
    parser.add_argument("--invalid-fraction", type=fraction, default=0, metavar="F",
                        help="share of messages, 0 to 1, that break a rule, each kind of break in turn")
    parser.add_argument("--create-topic", action="store_true", help="make the topic, with 3 partitions, if it is missing")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def simulate(devices: int, invalid_fraction: float = 0, seed: int | None = None) -> Iterator[tuple[str, bytes | None]]:
    """Endless messages (device id, record) of `devices` devices in turn, the time in them being the present.

    A record has the fields of readings.py in their order; those that are unknown here have any value of their kind.
    """
    rng = random.Random(seed)
    fleet: list[dict[str, Any]] = []
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
        known = device | {"value": round(device["value"], 2)}
        reading: dict[str, Any] = {}
        for field in CONTRACT.fields:
            put(reading, field, known[field.name] if field.name in known else any_value(field, rng))
        is_broken = rng.random() < invalid_fraction
        yield device["device_id"], next(breaks)(reading) if is_broken else to_json(reading)


def any_value(field: Field, rng: random.Random) -> Any:
    if isinstance(field, Timestamp):
        now = datetime.now(timezone.utc)
        return {"rfc3339": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"), "epoch_s": round(now.timestamp(), 3),
                "epoch_ms": int(now.timestamp() * 1000)}[field.format]
    if isinstance(field, Boolean):
        return rng.random() < 0.5
    if isinstance(field, (Integer, Number)):
        return rng.randrange(100)
    return f"{field.column}-{rng.randrange(10)}"


def put(record: dict, field: Field, value: Any) -> None:
    for name in field.path[:-1]:
        record = record.setdefault(name, {})
    record[field.path[-1]] = value


def to_json(reading: dict) -> bytes:
    return json.dumps(reading, ensure_ascii=False).encode()


def changing(field: Field, change: Callable[[Any], Any]) -> Callable[[dict], bytes]:
    """A way to break a reading: by what `change` makes of the field's value."""
    def break_reading(reading: dict) -> bytes:
        broken = copy.deepcopy(reading)
        put(broken, field, change(reduce(getitem, field.path, reading)))
        return to_json(broken)
    return break_reading


def having(wrong: dict) -> Callable[[dict], bytes]:
    """A way to break a reading: by the values `wrong`."""
    return lambda reading: to_json(reading | wrong)


# A way to break the contract for each reason, but for rules that are unknown here.
WRONG_VALUES: dict[str, dict] = {"unknown_type": {"type": "pressure"}, "wrong_unit": {"unit": "K"}, "out_of_range": {"value": 1e6}}
BREAKS: dict[str, Callable[[dict], bytes | None]] = {
    "empty_record": lambda reading: None,
    "invalid_encoding": lambda reading: to_json(reading)[:-1] + b', "note": "\xff"}',
    "malformed_json": lambda reading: to_json(reading)[:-1],
    **{f"missing_{field.name}": changing(field, lambda _: None) for field in CONTRACT.fields if field.required},
    **{f"invalid_{field.name}": changing(field, lambda value: [value]) for field in CONTRACT.fields},
    **{reason: having(wrong) for reason, wrong in WRONG_VALUES.items() if reason in CONTRACT.rules},
}


def ticks(rate: float, stopping: StopFlag) -> Iterator[None]:
    """Yields `rate` times a second, or without a pause for 0, until `stopping` is set."""
    begin = time.monotonic()
    for number in itertools.count():
        if rate:
            stopping.wait(begin + number / rate - time.monotonic())
        if stopping.is_set():
            return
        yield


def write_files(messages: Iterator[tuple[str, bytes | None]], folder: Path, options: argparse.Namespace,
                stopping: StopFlag) -> None:
    """Writes `messages` at the rate and up to the count asked for, or until `stopping` is set, as files of JSON lines.

    Once complete, a file gets its name: the time. A message without a value is no line. Raises PipelineError.
    """
    files = records = 0
    lines: list[bytes] = []

    def write() -> None:
        nonlocal files, records, lines
        name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}.json"
        draft = folder / f"_{name}"
        draft.write_bytes(b"\n".join(lines) + b"\n")
        draft.rename(folder / name)
        files, records, lines = files + 1, records + len(lines), []
        say(f"{records:,} records in {files:,} file{'s' * (files != 1)}; last: {folder / name}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        say(f"Writing to {folder}. Ctrl+C stops.")
        begun = time.monotonic()
        for _, (_, record) in zip(itertools.islice(ticks(options.rate, stopping), options.count), messages):
            lines += [record] if record else []
            if time.monotonic() - begun >= FILE_SECONDS or len(lines) >= FILE_RECORDS:
                write()
                begun = time.monotonic()
        if lines:
            write()
    except OSError as error:
        raise PipelineError(f"{folder} can't be written to: {error.strerror}. Give this user the right, make room, or name another "
                            f"folder.") from error
    say(f"{records:,} records in {files:,} file{'s' * (files != 1)} written.")


def send(messages: Iterator[tuple[str, bytes | None]], topic: Topic, options: argparse.Namespace,
         stopping: StopFlag) -> None:
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
            if time.monotonic() - shown >= SHOW_SECONDS or sent == 1:
                shown = time.monotonic()
                say(f"{sent:,} sent, {acknowledged:,} acknowledged; last: {(record or b'null').decode(errors='replace')}")
        if not failure:  # after which kafka-python may never be done with the rest (3.0.12)
            producer.flush(timeout=producer.config["delivery_timeout_ms"] / 1000 + 10)
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
