"""Simulated sensors -> Kafka: sends readings to the topic sensor_data, one JSON message a second.

Each device keeps its place, type and unit, and its value drifts. Messages are keyed by device id, so the readings of a
device stay in order. Delivery is idempotent and acknowledged by all replicas: every message counted as acknowledged is
in the topic exactly once. Ctrl+C delivers all messages sent so far and prints their number. A message that can't be
delivered is an error.

    python3 kafka_producer.py --create-topic
    python3 kafka_producer.py --rate 200 --invalid-fraction 0.05
    python3 kafka_producer.py --rate 0 --count 1000000 --seed 1

With --to-folder, it writes files instead, like a gateway: a file of JSON lines every five seconds.

    python3 kafka_producer.py --to-folder input/sensor_data
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from pipeline.contract.contract import add_readings_option
from pipeline.kafka.topics import PARTITIONS, Topic, add_topic_options
from pipeline.simulator import Simulator
from pipeline.terminal.arguments import argument_parser, at_least, fraction, local_folder
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say
from pipeline.terminal.script import has_no_end, run
from pipeline.terminal.signals import StopFlag, on_stop_signal

from kafka import KafkaProducer
from kafka.errors import KafkaError

SHOW_SECONDS = 5  # seconds between two lines about the messages sent
FILE_SECONDS, FILE_RECORDS = 5, 10_000  # per file of --to-folder, whichever comes first


def main() -> None:
    options = parse_options()
    if options.count is None:
        has_no_end()
    messages = Simulator.of(options.readings).messages(options.devices, options.invalid_fraction, options.seed)
    stopping = StopFlag()
    if options.to_folder:
        on_stop_signal(stopping.set)
        write_files(messages, Path(options.to_folder), options, stopping)
    else:
        topic = Topic.of(options)
        topic.wait(options.wait, create=options.partitions if options.create_topic else 0)
        on_stop_signal(stopping.set)
        send(messages, topic, options, stopping)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_topic_options(parser)
    parser.add_argument(
        "--to-folder", type=local_folder, metavar="FOLDER", help="write JSON files there instead of sending to Kafka"
    )
    add_readings_option(parser)
    parser.add_argument(
        "--rate", type=at_least(0, float), default=1, metavar="PER_SECOND", help="messages per second; 0: unlimited"
    )
    parser.add_argument("--count", type=at_least(0), metavar="N", help="stop after N messages")
    parser.add_argument("--devices", type=at_least(1), default=12, metavar="N", help="number of simulated devices")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same devices and values")
    parser.add_argument(
        "--invalid-fraction",
        type=fraction,
        default=0,
        metavar="F",
        help="share of invalid messages, from 0 to 1; they break each rule in turn",
    )
    parser.add_argument("--create-topic", action="store_true", help="create the topic if it does not exist")
    parser.add_argument(
        "--partitions",
        type=at_least(1),
        metavar="N",
        default=PARTITIONS,
        help="partitions of the topic that --create-topic creates",
    )
    return parser.parse_args()


def ticks(rate: float, stopping: StopFlag) -> Iterator[None]:
    """Yields `rate` times a second, or without a pause for 0, until `stopping` is set."""
    begin = time.monotonic()
    for number in itertools.count():
        if rate:
            stopping.wait(begin + number / rate - time.monotonic())
        if stopping.is_set():
            return
        yield


def write_files(
    messages: Iterator[tuple[str, bytes | None]], folder: Path, options: argparse.Namespace, stopping: StopFlag
) -> None:
    """Writes `messages` at the rate and up to the count asked for, or until `stopping` is set, as files of JSON lines.

    Once complete, a file gets its name: the time. A message without a value is skipped. Raises PipelineError.
    """
    files = records = 0
    lines: list[bytes] = []

    def write() -> None:
        nonlocal files, records, lines
        name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}.json"
        draft = folder / f"_{name}"
        with _writing_to(folder):
            draft.write_bytes(b"\n".join(lines) + b"\n")
            draft.rename(folder / name)
        files, records, lines = files + 1, records + len(lines), []
        say(f"{records:,} records in {files:,} file{'s' * (files != 1)}; last: {folder / name}")

    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    say(f"Writing to {folder}. Press Ctrl+C to stop.")
    begun = time.monotonic()
    until_next = 1 / options.rate if options.rate else 0
    for _, (_, record) in zip(itertools.islice(ticks(options.rate, stopping), options.count), messages):
        lines += [record] if record else []
        if time.monotonic() - begun + until_next >= FILE_SECONDS or len(lines) >= FILE_RECORDS:
            write()
            begun = time.monotonic()
    if lines:
        write()
    say(f"{records:,} records in {files:,} file{'s' * (files != 1)} written.")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PipelineError(
            f"{folder} can't be written to: {error.strerror}. Give this user permission, make room, or name another "
            f"folder."
        ) from error


class Producer(KafkaProducer):
    """A producer that `send` always closes. kafka-python's own would flush again when deleted, and print the error."""

    def __del__(self) -> None:
        pass


class Delivery:
    """The fate of the messages sent. The first that can't be delivered sets `stopping`."""

    def __init__(self, stopping: StopFlag):
        self.sent = self.acknowledged = 0
        self.failure: Exception | None = None
        self.stopping = stopping

    def count(self, _: object) -> None:
        self.acknowledged += 1

    def fail(self, error: Exception) -> None:
        self.failure = error
        self.stopping.set()

    def __str__(self) -> str:
        return f"{self.sent:,} sent, {self.acknowledged:,} acknowledged"


def send(
    messages: Iterator[tuple[str, bytes | None]], topic: Topic, options: argparse.Namespace, stopping: StopFlag
) -> None:
    """Sends `messages` at the rate and up to the count asked for, or until `stopping` is set; delivers all it has sent.

    Raises PipelineError if one can't be delivered.
    """
    producer = topic.client(
        Producer,
        enable_idempotence=True,
        acks="all",
        batch_size=128 * 1024,
        linger_ms=0 if options.rate and options.rate < 100 else 20,
        allow_auto_create_topics=False,
    )
    say(f"Sending to {topic}. Press Ctrl+C to stop.")
    delivery, shown = Delivery(stopping), time.monotonic()
    try:
        # The tick comes first, so that the time in a message is the time at which it is sent.
        for _, (key, record) in zip(itertools.islice(ticks(options.rate, stopping), options.count), messages):
            producer.send(topic.name, key=key.encode(), value=record).add_callback(delivery.count).add_errback(
                delivery.fail
            )
            delivery.sent += 1
            if time.monotonic() - shown >= SHOW_SECONDS or delivery.sent == 1:
                shown = time.monotonic()
                say(f"{delivery}; last: {(record or b'null').decode(errors='replace')}")
        if not delivery.failure:  # after a failure, kafka-python may never finish the rest (3.0.12)
            producer.flush(timeout=producer.config["delivery_timeout_ms"] / 1000 + 10)
    except KafkaError as error:
        delivery.failure = delivery.failure or error  # the fate of a message says more than the failure of a flush
    finally:
        with suppress(KafkaError):  # it flushes and fails again; the failure is already known by then
            producer.close(timeout=10)
    say(f"{delivery}.")
    if delivery.failure:
        raise PipelineError(
            f"{delivery.sent - delivery.acknowledged:,} of {delivery.sent:,} messages could not be delivered to "
            f"{topic}: {delivery.failure}. Check that Kafka is running and has the topic, then start again."
        )


if __name__ == "__main__":
    run(main)
