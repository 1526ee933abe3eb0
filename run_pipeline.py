"""The whole pipeline in one command, with or without Docker.

    kafka_producer.py ──> input/sensor_data/*.json ──> streaming_files_to_delta_bronze.py ──> lake/bronze/sensor_data
    kafka_producer.py ──> Kafka ──> spark_kafka_consumer.py ────────────────────────────────> lake/silver/sensor_data

It uses the Kafka that answers on localhost:9092 (--port), and starts local_kafka.py if there is none. It creates the
topic if necessary, and starts both streams, two simulators (one for the folder and one for Kafka), and dashboard.py if
its libraries are installed. A terminal shows a live status of all parts; in a pipe, or with --plain, each line that they
print appears with the name of its script. Ctrl+C, or the end of --duration, stops all parts in order and shows the newest
rows of both tables. If a part other than the page dies, the script names it, stops the others and exits with 1.

    python3 run_pipeline.py
    python3 run_pipeline.py --duration 120 --rate 50 --invalid-fraction 0.1
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import IO

from pipeline.dashboard import is_installed
from pipeline.kafka.brokers import answers
from pipeline.kafka.topics import PARTITIONS, Topic
from pipeline.paths import BRONZE, REPOSITORY, SILVER
from pipeline.spark.class_archive import use_archive
from pipeline.spark.java import DELTA, KAFKA_SOURCE, find_java, spark_jars
from pipeline.terminal.arguments import argument_parser, at_least, fraction, port_number
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import is_screen, say, without_controls
from pipeline.terminal.ports import is_free
from pipeline.terminal.script import has_no_end, run
from pipeline.terminal.signals import Interrupt, StopFlag, on_stop_signal

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

RATE_SECONDS = 10  # seconds over which a rate is measured, or longer if the lines come more slowly
QUIET_SECONDS = 30  # seconds after which the last rate counts as stale
STOP_SECONDS = 120  # seconds that a stream may need to finish its batch


def main() -> None:
    options = parse_options()
    if not options.duration:
        has_no_end()
    use_archive(find_java(), spark_jars(DELTA, KAFKA_SOURCE))  # once, before both streams need them at the same time
    stopping = StopFlag()
    on_stop_signal(stopping.set)

    parts: list[Part] = []
    in_place = is_screen(sys.stdout) and not options.plain
    with Live(get_renderable=lambda: overview(parts), refresh_per_second=2) if in_place else nullcontext():
        try:
            for part in start_parts(options, stopping, in_place):
                parts.append(part)
            end = time.monotonic() + (options.duration or float("inf"))
            while not stopping.wait(0.5) and time.monotonic() < end:
                require_alive(parts)
        finally:
            tell("Stopping …")
            for part in reversed(parts):  # the page and the producers first, Kafka last
                part.stop()
            for part in parts if in_place else ():
                part.tell(part.warnings)  # later batches have replaced them on the screen
    on_stop_signal(Interrupt())
    for script, table in (("read_bronze.py", BRONZE), ("read_silver.py", SILVER)):
        if os.path.exists(table):  # it does not if the pipeline was stopped before the first batch
            say(f"\n{script}")
            reader = subprocess.Popen([sys.executable, REPOSITORY / script])
            try:
                reader.wait()
            finally:
                reader.terminate()
                reader.wait()


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--duration", type=at_least(1, float), metavar="SECONDS", help="stop after this long")
    parser.add_argument(
        "--rate",
        type=at_least(0, float),
        default=1,
        metavar="PER_SECOND",
        help="messages per second from each simulator",
    )
    parser.add_argument(
        "--invalid-fraction",
        type=fraction,
        default=0,
        metavar="F",
        help="share of the simulators' messages that break a rule",
    )
    parser.add_argument("--port", type=port_number, default=9092, help="local port that Kafka listens on")
    parser.add_argument("--plain", action="store_true", help="print the parts' output line by line, even on a terminal")
    return parser.parse_args()


def start_parts(options: argparse.Namespace, stopping: StopFlag, in_place: bool) -> Iterator["Part"]:
    """Starts the parts one after another, until `stopping` is set."""
    if not answers(options.port):
        yield (kafka := Part("local_kafka.py", "--port", str(options.port), is_quiet=in_place))
        while not answers(options.port) and not stopping.wait(0.5):
            require_alive([kafka])
    broker = f"localhost:{options.port}"
    Topic(broker).wait(seconds=30, create=PARTITIONS, stopping=stopping)
    if stopping.is_set():
        return
    yield Part("streaming_files_to_delta_bronze.py", is_quiet=in_place)
    yield Part("spark_kafka_consumer.py", "--bootstrap-servers", broker, is_quiet=in_place)
    readings = ("--rate", str(options.rate), "--invalid-fraction", str(options.invalid_fraction))
    yield Part(
        "kafka_producer.py", "--to-folder", str(REPOSITORY / "input" / "sensor_data"), *readings, is_quiet=in_place
    )
    yield Part("kafka_producer.py", "--bootstrap-servers", broker, *readings, is_quiet=in_place)
    if is_installed():
        port = next(filter(is_free, range(8501, 65_536)))
        yield Part("dashboard.py", "--bootstrap-servers", broker, "--port", str(port), is_quiet=in_place)


class Part:
    """A script of the pipeline as a process of its own. Prints each line of its output with its name or, if `is_quiet`, leaves
    it to `overview`.
    """

    def __init__(self, script: str, *arguments: str, is_quiet: bool):
        # There are two producers; the other one sends to Kafka.
        self.name = f"{script} --to-folder" if "--to-folder" in arguments else script
        self.is_quiet = is_quiet
        self.lines: deque[str] = deque(maxlen=20)
        self.warnings: deque[str] = deque(maxlen=20)
        self.said, self.behind = Text(), ""  # the last line, and the backlog that it names
        self.counts = deque([(time.monotonic(), 0)])  # the number of records at several moments in the last few seconds
        # A session of its own, so that Ctrl+C in the terminal reaches only this script, which stops the parts in order.
        command = [
            sys.executable,
            "-u",
            str(REPOSITORY / script),
            *arguments,
            *["--verbose"] * ("--verbose" in sys.argv),
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        self.readers = [
            threading.Thread(target=self._read, args=[stream], daemon=True)
            for stream in (self.process.stdout, self.process.stderr)
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in map(without_controls, map(str.rstrip, stream)):
            if not self.is_quiet:
                self.tell([line])
            is_warning = stream is self.process.stderr and not line.endswith("…")  # progress messages end with "…"
            (self.warnings if is_warning else self.lines).append(line)
            self.said = (
                Text(line, "red", overflow="fold") if is_warning else Text(line, no_wrap=True, overflow="ellipsis")
            )
            if count := re.search(r"([\d,]+) (rows in|sent|records in)", line):
                records, now = int(count[1].replace(",", "")), time.monotonic()
                self.counts.append((now, self.counts[-1][1] + records if count[2] == "rows in" else records))
                while len(self.counts) > 2 and now - self.counts[1][0] > RATE_SECONDS:
                    self.counts.popleft()
            if behind := re.search(r"([\d,]+) messages behind", line):
                self.behind = behind[1]

    def tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            tell(f"{self.name:<35}| {line}")

    def state(self) -> str:
        if self.process.returncode is None:
            return "running" if self.lines else "starting"
        return "stopped" if self.process.returncode == 0 else f"exit code {self.process.returncode}"

    def rate(self) -> str:
        """Records a second, from the counts in the lines of the last few seconds; "" if there was no count recently."""
        counted_at, total = self.counts[-1]
        is_recent = total and time.monotonic() - counted_at < QUIET_SECONDS
        return f"{per_second(self.counts):,.1f}" if is_recent else ""

    def wait_for_output(self) -> None:
        for reader in self.readers:
            reader.join(timeout=5)

    def stop(self) -> None:
        self.process.terminate()  # SIGTERM, which unlike SIGINT prints nothing in a starting process
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            tell(
                f"{self.name} did not stop within {STOP_SECONDS} s and was killed; its next start resumes where it left off."
            )
            self.process.kill()
        self.wait_for_output()


def per_second(counts: Sequence[tuple[float, int]]) -> float:
    """The rate between the first and the last of the counts (time in seconds, number)."""
    (then, before), (now, after) = counts[0], counts[-1]
    return (after - before) / max(now - then, 1)  # two lines may arrive at almost the same time


def overview(parts: list[Part]) -> Group:
    """The parts' states, last messages and errors, to be shown in place."""
    table = Table(
        "part",
        "state",
        Column("rows/s", justify="right"),
        Column("behind", justify="right"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for part in parts:
        table.add_row(part.name, part.state(), part.rate(), part.behind)
    return Group(table, *(part.said for part in parts if part.said))


def tell(line: str) -> None:
    """Prints a line, unless its reader (`| head`) has gone; the parts are still read and stopped."""
    with suppress(BrokenPipeError):
        say(line)


def require_alive(parts: list[Part]) -> None:
    for part in parts:
        if part.process.poll() is not None and part.name != "dashboard.py":  # the page is only a viewer
            part.wait_for_output()
            if part.is_quiet:
                part.tell(part.lines)
            raise PipelineError(
                f"{part.name} exited with code {part.process.returncode}; its output is "
                f"above. The other parts are being stopped."
            )


if __name__ == "__main__":
    run(main)
