"""How fast the pipeline is, against the shortest ways to do the same, in one run on this machine.

    python3 -m benchmarks.run
    python3 -m benchmarks.run sustained cold

Without a name it measures all, which takes hours; each prints its lines when it is done. Ratios can be
compared between machines, times can't. What is measured, and against what, says each function here.
"""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow.parquet as parquet
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from deltalake import DeltaTable

import kafka_producer
from common.console import PipelineError, argument_parser, at_least
from common.console import run as run_main
from common.process import REPOSITORY
from common.tables import quarantine_of
from local_kafka import free_ports

# Rejected by the rules, but read by any reader of JSON: the others can't stand the rest.
READABLE_BREAKS = ("out_of_range", "unknown_type", "wrong_unit")
INVALID_FRACTION = 0.01
DEVICES = 1000
ROUNDS = 2  # of what takes a minute or more


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--scale", type=at_least(0.1, float), default=1, metavar="F",
                        help="records and batches, as a multiple of what the lines of the table say")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MEASURES):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    kafka_producer.BREAKS = {name: kafka_producer.BREAKS[name] for name in READABLE_BREAKS}
    print("| what | pipeline | other | ratio | goal |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmark") as folder, kafka(folder) as broker:
        bench = Bench(Path(folder), broker, options.scale)
        for name in options.names or MEASURES:
            for line in MEASURES[name](bench):
                print(f"| {' | '.join(line)} |", flush=True)


@contextmanager
def kafka(folder: str) -> Iterator[str]:
    """The address of a broker of docker-compose.yml."""
    [port] = free_ports(1)
    with running("local_kafka.py", "--port", port, "--data-dir", f"{folder}/kafka") as process:
        while "ready" not in process.stdout.readline():
            if process.poll() is not None:
                raise PipelineError("There is no Kafka for the benchmarks; python3 local_kafka.py says why.")
        yield f"localhost:{port}"


@contextmanager
def running(script: str, *arguments) -> Iterator[subprocess.Popen]:
    """A script as a process, which is stopped at the end."""
    process = subprocess.Popen([sys.executable, "-u", REPOSITORY / script, *map(str, arguments)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
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
    """Seconds that a script takes from start to end, and its lines, each with the second at which it came."""
    begin = time.monotonic()
    with running(script, *arguments) as process:
        lines = [(time.monotonic() - begin, line) for line in process.stdout]
        if process.wait():
            raise PipelineError(f"{script} has failed: {''.join(line for _, line in lines[-20:])}")
    return time.monotonic() - begin, lines


class Bench:
    """Where the benchmarks run: a folder, a broker, a share of the full size."""

    def __init__(self, folder: Path, broker: str, scale: float):
        self.folder, self.broker, self.scale = folder, broker, scale
        self.numbers = itertools.count()

    def size(self, full: int) -> int:
        return max(1, int(full * self.scale))

    def new(self, name: str) -> Path:
        """A path that is not there yet."""
        return self.folder / f"{name}{next(self.numbers)}"

    def topic(self, records: int, partitions: int = 3) -> str:
        """A topic with so many records."""
        name = self.new("topic").name
        admin = AdminClient({"bootstrap.servers": self.broker})
        admin.create_topics([NewTopic(name, partitions, 1)])[name].result()
        self.fill(name, records)
        return name

    def fill(self, topic: str, records: int) -> None:
        """Sends so many records to a topic."""
        messages = list(itertools.islice(kafka_producer.simulate(DEVICES, INVALID_FRACTION, seed=1), min(records, 200_000)))
        send(self.broker, topic, itertools.islice(itertools.cycle(messages), records))

    def stream(self, topic: str, *arguments) -> tuple:
        """The Kafka stream's command for a topic, with a new table and checkpoint."""
        return ("spark_kafka_consumer.py", "--bootstrap-servers", self.broker, "--topic", topic, "--table", self.new("silver"),
                "--checkpoint", self.new("checkpoint"), *arguments)

    def shortest(self, topic: str, *arguments) -> tuple:
        """The command of Spark's shortest job for the same."""
        return ("benchmarks/shortest_job.py", "kafka", self.broker, topic, self.new("table"), self.new("checkpoint"), *arguments)


def send(broker: str, topic: str, messages: Iterator[tuple[str, bytes]]) -> None:
    """Sends messages (key, value) by confluent-kafka, as safely as kafka_producer.py does."""
    producer = Producer({"bootstrap.servers": broker, "enable.idempotence": True, "linger.ms": 20})
    for key, record in messages:
        while True:
            try:
                producer.produce(topic, key=key, value=record)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def sustained(bench: Bench) -> Iterator[tuple]:
    """A backlog of 5 million records, after the first batch and as a whole, against a Python consumer that does the same work."""
    records = bench.size(5_000_000)
    first = records * 2 // 5  # the stream's default of two million
    topic = bench.topic(records)

    def rate_and_seconds(script: str, *arguments) -> tuple[float, float]:
        seconds, lines = run(script, *arguments)
        rows = 0
        reached = {}
        for second, line in lines:
            if found := re.match(r"(?:batch \d+: )?([\d,]+) rows", line):
                rows = rows + int(found[1].replace(",", ""))
                reached[rows] = second
        begin = min(count for count in reached if count >= first * 0.99)  # Spark rounds a batch down for each partition
        return (records - begin) / (reached[records] - reached[begin]), seconds

    ours, python = alternate(
        lambda: rate_and_seconds(*bench.stream(topic, "--once", "--max-offsets-per-trigger", first)),
        lambda: rate_and_seconds("benchmarks/python_consumer.py", bench.broker, topic, bench.new("python"), records))
    for what, goal, our, other in zip(("records a second, of a backlog of 5 million, rules and quarantine included",
                                       "seconds for 5 million records from a cold start"),
                                      ("at least 1.1", "at most 1.3"), zip(*ours), zip(*python)):
        yield compared(f"{what} | Python consumer of the same work", our, other, goal)


def cold(bench: Bench) -> Iterator[tuple]:
    """The first million from the start of the process, against Spark's shortest job."""
    topic = bench.topic(bench.size(1_000_000))
    ours, shortest = alternate(lambda: run(*bench.stream(topic, "--once"))[0],
                               lambda: run(*bench.shortest(topic, "--once"))[0])
    yield compared("seconds for a million records from a cold start | shortest job", ours, shortest, "at most 0.7")


def files(bench: Bench) -> Iterator[tuple]:
    """1 GB of JSON lines in 1,000 files, from the start of the process, against Spark's shortest job from files."""
    folder = bench.new("input")
    folder.mkdir()
    records = [record for _, record in itertools.islice(kafka_producer.simulate(DEVICES, INVALID_FRACTION, seed=1), 7000)]
    content = b"\n".join(records) + b"\n"
    for number in range(bench.size(1000)):
        (folder / f"{number:04}.json").write_bytes(content[:1_000_000].rpartition(b"\n")[0] + b"\n")
    ours, shortest = alternate(
        lambda: run("streaming_files_to_delta_bronze.py", "--input", folder, "--table", bench.new("bronze"),
                    "--checkpoint", bench.new("checkpoint"), "--once")[0],
        lambda: run("benchmarks/shortest_job.py", "files", folder, bench.new("table"), bench.new("checkpoint"), "--once")[0])
    yield compared("seconds for 1 GB of JSON lines in 1,000 files | shortest job", ours, shortest, "at most 0.8")


def latency(bench: Bench) -> Iterator[tuple]:
    """From produced to visible, each stream as its user starts it, at two rates."""
    for rate in (1, 1000):
        found = []
        for command in (bench.stream, bench.shortest):
            topic = bench.topic(1)
            script, *arguments = command(topic)
            table = next(argument for argument in arguments if isinstance(argument, Path))
            with running(script, *arguments):
                while not list(table.glob("_delta_log/*.json")):
                    time.sleep(0.1)
                run("kafka_producer.py", "--bootstrap-servers", bench.broker, "--topic", topic, "--rate", rate,
                    "--count", rate * bench.size(180))
                time.sleep(15)
            delays = sorted(visible_after(table, warm_up=bench.size(60)))
            found.append((delays[len(delays) // 2], delays[len(delays) * 99 // 100]))
        for name, ours, shortest in zip(("p50", "p99"), *found):
            yield compared(f"{name} of the seconds from produced to visible, {rate:,} a second | shortest job",
                           [ours], [shortest], "at most 0.5")


def batches(bench: Bench) -> Iterator[tuple]:
    """Small batches: at one message a second against the same with Kafka's default long poll, and many partitions."""
    long_poll = bench.new("properties")
    long_poll.write_text("fetch.max.wait.ms=500\n")
    yield compared("seconds of the median batch, 1 message a second, 3 partitions | with Kafka's long poll of half a second",
                   *alternate(lambda: median_batch(bench, 3, 1), lambda: median_batch(bench, 3, 1, "--kafka-config", long_poll),
                              rounds=1), "at most 0.7")
    few, *many = alternate(*(lambda partitions=partitions: median_batch(bench, partitions, 500) for partitions in (3, 50, 200)),
                           rounds=1)
    for partitions, seconds, goal in zip((50, 200), many, ("at most 2", "at most 4")):
        yield compared(f"seconds of the median batch, 500 messages a second, {partitions} partitions | 3 partitions",
                       seconds, few, goal)


def median_batch(bench: Bench, partitions: int, rate: float, *more) -> float:
    """The seconds of the median of 30 batches of the stream with its default trigger, after 30 to warm up."""
    topic = bench.topic(1, partitions)
    half = bench.size(30)
    seconds: list[float] = []
    with (running("kafka_producer.py", "--bootstrap-servers", bench.broker, "--topic", topic, "--rate", rate, "--devices", DEVICES),
          running(*bench.stream(topic, *more)) as process):
        for line in process.stdout:
            if found := re.match(r"batch \d+: .* rejected.*?, ([\d.]+) s", line):
                seconds.append(float(found[1]))
                if len(seconds) == 2 * half:
                    return statistics.median(seconds[half:])
    raise PipelineError(f"The stream has ended after {len(seconds)} batches.")


def visible_after(table: Path, warm_up: float) -> Iterator[float]:
    """The seconds from a message's time in Kafka to the commit that has it, for those after the first `warm_up` seconds."""
    commits = [(file.stat().st_mtime, [json.loads(line).get("add") for line in file.read_text().splitlines()])
               for file in sorted(table.glob("_delta_log/*.json"))]
    begin = None
    for moment, added in commits:
        for file in filter(None, added):
            if file["dataChange"]:
                times = parquet.read_table(table / file["path"], columns=["kafka_timestamp"])["kafka_timestamp"]
                produced = [time.timestamp() for time in times.to_pylist()]
                begin = begin or max(produced)
                yield from (moment - second for second in produced if second > begin + warm_up)


def readers(bench: Bench) -> Iterator[tuple]:
    """read_silver.py --limit 20 on 20 million rows, on 20 thousand, and a session that prints one row."""
    tables = [bench.new("large"), bench.new("small")]
    for table, rows in zip(tables, (bench.size(20_000_000), 20_000)):
        run("benchmarks/make_table.py", table, rows)
    large, small, bare = alternate(*(lambda table=table: run("read_silver.py", "--table", table, "--limit", 20)[0]
                                     for table in tables),
                                   lambda: run("benchmarks/shortest_job.py", "row", tables[1])[0], rounds=5)
    yield compared("seconds of read_silver.py on 20 million rows | on 20 thousand", large, small, "at most 1.2")
    yield compared("seconds of read_silver.py on 20 thousand rows | a session that prints one row", small, bare,
                   "at most 1.3")


def soak(bench: Bench) -> Iterator[tuple]:
    """3,000 small batches in a row: how long they take, and what they leave on the disk and in the memory.

    The tables keep five minutes of their past, not two hours: the run, of an hour, then shows what the clean-ups leave, one
    after each thousand batches.
    """
    batches, records = bench.size(3000), 200
    topic = bench.topic(records)
    script, *arguments = bench.stream(topic, "--once", "--max-offsets-per-trigger", records)
    table, checkpoint = (argument for argument in arguments if isinstance(argument, Path))
    run(script, *arguments)
    for path in (table, quarantine_of(str(table))):
        DeltaTable(path).alter.set_table_properties({"delta.logRetentionDuration": "interval 5 minutes",
                                                     "delta.deletedFileRetentionDuration": "interval 5 minutes"})
    bench.fill(topic, batches * records)
    seconds, samples = [], []
    with running(script, *arguments) as process:
        for line in process.stdout:
            if found := re.match(r"batch \d+: .* rejected.*?, ([\d.]+) s", line):
                seconds.append(float(found[1]))
                if len(seconds) % (batches // 60) == 0:
                    samples.append([size_of(table / "_delta_log"), size_of(checkpoint), size_of(table),
                                    len(DeltaTable(table).file_uris()), memory_of(process.pid)])
    # The first 10 warm up.
    first, last = [statistics.mean(part) for part in (seconds[10:110], seconds[-100:])]
    yield compared(f"seconds of the last 100 of {batches:,} batches | of the first 100", [last], [first], "at most 1.2")
    *sizes, live, memory = zip(*samples)  # sixty of each: twenty to a third, the sixth after a tenth of the batches
    for name, size in zip(("_delta_log", "the checkpoint", "the table's folder"), sizes):
        yield compared(f"most bytes in {name} in the last third of {batches:,} batches | in the third before",
                       [max(size[40:])], [max(size[20:40])], "bounded")
    yield f"most live files in {batches:,} batches", f"{max(live)}", "", "", "under 100"
    yield compared(f"MB of memory of the consumer's processes after {batches:,} batches | after {batches // 10:,}",
                   [memory[-1]], [memory[5]], "flat")


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # the stream removes files meanwhile
            size += file.stat().st_size if file.is_file() else 0
    return size


def memory_of(pid: int) -> float:
    """MB of memory that a process and its children have to themselves."""
    process = psutil.Process(pid)
    size = 0
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # Java runs small commands now and then
            size += each.memory_full_info().uss
    return size / 1e6


def producer(bench: Bench) -> Iterator[tuple]:
    """kafka_producer.py --rate 0 against confluent-kafka with the same records."""
    count = bench.size(300_000)
    topic = bench.topic(1)

    def confluent() -> float:
        begin = time.monotonic()
        send(bench.broker, topic, itertools.islice(kafka_producer.simulate(DEVICES, seed=1), count))
        return count / (time.monotonic() - begin)

    def ours() -> float:
        _, lines = run("kafka_producer.py", "--bootstrap-servers", bench.broker, "--topic", topic, "--rate", 0,
                       "--count", count, "--devices", DEVICES, "--seed", 1)
        times = [second for second, line in lines if " sent, " in line]
        return count / (times[-1] - times[0])

    yield compared("messages a second of kafka_producer.py --rate 0 | confluent-kafka", *alternate(ours, confluent), "stated")


def alternate(*measures, rounds: int = ROUNDS) -> list[list]:
    """Each measure's figures of some rounds, taken in turn, so that a machine that slows down slows all of them."""
    return [list(figures) for figures in zip(*[[measure() for measure in measures] for _ in range(rounds)])]


def compared(what: str, ours: Sequence[float], other: Sequence[float], goal: str) -> tuple:
    """A line of the table: medians, and the median of the ratios of the rounds."""
    what, _, against = what.partition(" | ")
    ratio = statistics.median(a / b for a, b in zip(ours, other))
    figures = [f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}" for figure in map(statistics.median, (ours, other))]
    return what, figures[0], f"{figures[1]} ({against})", f"{ratio:.2f}", goal


MEASURES = {measure.__name__: measure for measure in (sustained, cold, files, latency, batches, readers, soak, producer)}

if __name__ == "__main__":
    run_main(main)
