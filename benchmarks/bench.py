"""Shared by the benchmarks: running scripts as processes, filling topics, and measuring the results."""

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.paths import REPOSITORY
from pipeline.simulator import Simulator
from pipeline.terminal.errors import PipelineError

import psutil
import pyarrow.parquet as parquet
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from local_kafka import free_ports

# Rejected by the rules, but readable by any JSON reader. The jobs used for comparison can't handle other broken records.
READABLE_BREAKS = ("out_of_range", "unknown_type", "wrong_unit")
INVALID_FRACTION = 0.01
DEVICES = 1000
ROUNDS = 2  # of each measurement that takes a minute or more
WARM_UP = 45  # seconds at the start of a stream that are not counted
SIMULATOR = Simulator.of(str(REPOSITORY / "readings.py"))
SIMULATOR.breaks = {name: SIMULATOR.breaks[name] for name in READABLE_BREAKS}


@contextmanager
def running(script: str, *arguments) -> Iterator[subprocess.Popen]:
    """Runs a script as a process and stops it on exit."""
    process = subprocess.Popen(
        [sys.executable, "-u", REPOSITORY / script, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def run(script: str, *arguments) -> tuple[float, list[tuple[float, str]]]:
    """Runs a script to its end. Returns the seconds it took and its output lines, each with its time in seconds."""
    begin = time.monotonic()
    with running(script, *arguments) as process:
        lines = [(time.monotonic() - begin, line) for line in process.stdout]
        if process.wait():
            raise PipelineError(f"{script} has failed: {''.join(line for _, line in lines[-20:])}")
    return time.monotonic() - begin, lines


def seconds(command: Sequence) -> float:
    """How many seconds a command takes from start to end."""
    return run(*command)[0]


class Live(NamedTuple):
    """Figures of a running stream: seconds from produced to visible, seconds of the median batch, CPU in % of a core."""

    p50: float
    p99: float
    batch: float
    cpu: float


class Bench:
    """The environment of the benchmarks: a folder, a broker, and the scale relative to the full size."""

    def __init__(self, folder: Path, broker: str, scale: float):
        self.folder, self.broker, self.scale = folder, broker, scale
        self.numbers = itertools.count()

    @classmethod
    @contextmanager
    def on_own_broker(cls, scale: float) -> Iterator["Bench"]:
        """Starts the broker of docker-compose.yml with local_kafka.py."""
        [port] = free_ports(1)
        with (
            tempfile.TemporaryDirectory(prefix="benchmark") as folder,
            running("local_kafka.py", "--port", port, "--data-dir", f"{folder}/kafka") as process,
        ):
            while "ready" not in process.stdout.readline():
                if process.poll() is not None:
                    raise PipelineError("There is no Kafka for the benchmarks; python3 local_kafka.py says why.")
            yield cls(Path(folder), f"localhost:{port}", scale)

    def size(self, full: int) -> int:
        return max(1, int(full * self.scale))

    def new(self, name: str) -> Path:
        """A path that does not exist yet."""
        return self.folder / f"{name}{next(self.numbers)}"

    def topic(self, records: int, partitions: int = 3, invalid_fraction: float = INVALID_FRACTION) -> str:
        """Creates a topic with this many records and returns its name."""
        name = self.new("topic").name
        admin = AdminClient({"bootstrap.servers": self.broker})
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result()
        self.fill(name, records, invalid_fraction)
        return name

    def fill(self, topic: str, records: int, invalid_fraction: float = INVALID_FRACTION) -> None:
        """Sends this many records to a topic."""
        messages = list(itertools.islice(SIMULATOR.messages(DEVICES, invalid_fraction, seed=1), min(records, 200_000)))
        send(self.broker, topic, itertools.islice(itertools.cycle(messages), records))

    def folder_of_files(self, files: int, size: int) -> Path:
        """Creates a folder of JSON lines files. `size`: the maximum size of a file in bytes."""
        folder = self.new("input")
        folder.mkdir()
        records = [
            record for _, record in itertools.islice(SIMULATOR.messages(DEVICES, INVALID_FRACTION, seed=1), 7000)
        ]
        content = (b"\n".join(records) + b"\n")[:size].rpartition(b"\n")[0] + b"\n"
        for number in range(files):
            (folder / f"{number:05}.json").write_bytes(content)
        return folder

    def stream(self, topic: str, *arguments) -> list:
        """The command that runs the Kafka stream on a topic, with a new table and checkpoint."""
        return [
            "spark_kafka_consumer.py",
            "--bootstrap-servers",
            self.broker,
            "--topic",
            topic,
            "--table",
            self.new("silver"),
            "--checkpoint",
            self.new("checkpoint"),
            *arguments,
        ]

    def shortest(self, topic: str, *arguments) -> list:
        """The command that runs Spark's shortest job on a topic."""
        return [
            "benchmarks/shortest_job.py",
            "kafka",
            self.broker,
            topic,
            self.new("table"),
            self.new("checkpoint"),
            *arguments,
        ]

    def bronze(self, folder: Path, *arguments) -> list:
        """The command that runs the file stream on a folder, with a new table and checkpoint."""
        return [
            "streaming_files_to_delta_bronze.py",
            "--input",
            folder,
            "--table",
            self.new("bronze"),
            "--checkpoint",
            self.new("checkpoint"),
            *arguments,
        ]

    def shortest_bronze(self, folder: Path, *arguments) -> list:
        """The command that runs Spark's shortest job on a folder."""
        return ["benchmarks/shortest_job.py", "files", folder, self.new("table"), self.new("checkpoint"), *arguments]

    def produce(self, topic: str, rate: float, *arguments) -> list:
        """The command that runs the producer on a topic."""
        return [
            "kafka_producer.py",
            "--bootstrap-servers",
            self.broker,
            "--topic",
            topic,
            "--rate",
            rate,
            "--devices",
            DEVICES,
            *arguments,
        ]

    def watch(self, command: list, topic: str, rate: float, duration: int) -> Live:
        """Runs a stream while messages arrive at `rate`, and measures it for `duration` seconds after a warm-up."""
        table, checkpoint = places(command)
        with running(*command) as process, running(*self.produce(topic, rate)):
            wait_for_rows(table)
            time.sleep(WARM_UP)
            begin = time.time()
            cpu = cpu_percent(process.pid, self.size(duration))
        delays = sorted(visible_after(table, begin))
        return Live(
            delays[len(delays) // 2], delays[len(delays) * 99 // 100], statistics.median(batch_seconds(checkpoint)), cpu
        )


def send(broker: str, topic: str, messages: Iterator[tuple[str, bytes]]) -> None:
    """Sends messages (key, value) with confluent-kafka, as safely as kafka_producer.py does."""
    producer = Producer({"bootstrap.servers": broker, "enable.idempotence": True, "linger.ms": 20})
    for key, record in messages:
        while True:
            try:
                producer.produce(topic, key=key, value=record)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def places(command: list) -> list[Path]:
    """The table and the checkpoint in the command of a stream: its last two paths."""
    return [argument for argument in command if isinstance(argument, Path)][-2:]


def data_files(table: Path) -> Iterator[tuple[float, Path]]:
    """The files of new rows listed in a table's log, each with the time at which it became visible."""
    for file in sorted(table.glob("_delta_log/*.json")):
        for line in file.read_text().splitlines():
            added = json.loads(line).get("add")
            if added and added["dataChange"]:
                yield file.stat().st_mtime, table / added["path"]


def wait_for_rows(table: Path, rows: int = 1) -> None:
    """Waits until this many rows are visible in a table."""
    while sum(parquet.read_metadata(file).num_rows for _, file in data_files(table)) < rows:
        time.sleep(0.05)


def visible_after(table: Path, begin: float) -> Iterator[float]:
    """Seconds from a message's Kafka timestamp to the commit that contains it, for messages produced since `begin`."""
    for moment, file in data_files(table):
        for produced in parquet.read_table(file, columns=["kafka_timestamp"])["kafka_timestamp"].to_pylist():
            if produced.timestamp() > begin:
                yield moment - produced.timestamp()


def batch_seconds(checkpoint: Path) -> list[float]:
    """Seconds of each of the last hundred batches, from the times of the files that Spark wrote before and after it."""
    ends = {file.name: file.stat().st_mtime for file in checkpoint.glob("commits/[0-9]*")}
    begins = {file.name: file.stat().st_mtime for file in checkpoint.glob("offsets/[0-9]*")}
    return [ends[batch] - begins[batch] for batch in sorted(ends.keys() & begins.keys(), key=int)[-100:]]


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_percent(pid: int, duration: float) -> float:
    """CPU usage of a process and its children during the next `duration` seconds, in % of a core."""

    def used() -> float:
        times = [process.cpu_times() for process in family(pid)]
        return sum(time.user + time.system + time.children_user + time.children_system for time in times)

    begin = used()
    time.sleep(duration)
    return (used() - begin) / duration * 100


def memory_of(pid: int) -> float:
    """MB of memory used exclusively by a process and its children."""
    size = 0
    for process in family(pid):
        with suppress(psutil.NoSuchProcess):  # Java runs small commands now and then
            size += process.memory_full_info().uss
    return size / 1e6


def size_of(folder: Path) -> int:
    """Total size of the files under a folder, in bytes."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the stream removes files at the same time
            size += file.stat().st_size if file.is_file() else 0
    return size


def batch_lines(process: subprocess.Popen) -> Iterator[float]:
    """The seconds of each batch, as printed by a stream."""
    for line in process.stdout or ():
        if found := re.match(r"batch \d+: .* rejected.*?, ([\d.]+) s", line):
            yield float(found[1])


def alternate(*measures: Callable[[], float], rounds: int = ROUNDS) -> list[list]:
    """The figures of each measure in all rounds. The measures take turns, so that a machine slowdown affects all."""
    return [list(figures) for figures in zip(*[[measure() for measure in measures] for _ in range(rounds)])]


def compared(what: str, ours: Sequence[float], other: Sequence[float], goal: str) -> tuple:
    """A table row: medians, and the median of the ratios of the rounds. `what`: "label | baseline"."""
    what, _, against = what.partition(" | ")
    ratio = statistics.median(a / b for a, b in zip(ours, other))
    figures = [shown(statistics.median(each)) for each in (ours, other)]
    return what, figures[0], f"{figures[1]} ({against})", f"{ratio:.2f}", goal


def alone(what: str, figure: float, goal: str) -> tuple:
    """A table row without a comparison."""
    return what, shown(figure), "", "", goal


def shown(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
