"""Measures the speed of the pipeline against the shortest alternatives that do the same, in one run on this machine.

    python3 -m benchmarks.run
    python3 -m benchmarks.run sustained cold
    python3 -m benchmarks.run --full

Without a name, it measures everything except the soak and takes 40 minutes; --full adds the soak, another hour. Each
measurement prints its rows when it is done. Ratios can be compared between machines, times cannot. The docstring of
each function describes the measurement and the comparison.
"""

import itertools
import json
import random
import re
import statistics
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from pipeline.paths import REPOSITORY, quarantine_of
from pipeline.terminal.arguments import argument_parser, at_least
from pipeline.terminal.script import run as run_main

from deltalake import DeltaTable

from benchmarks.bench import (
    DEVICES,
    SIMULATOR,
    Bench,
    alone,
    alternate,
    batch_lines,
    compared,
    cpu_percent,
    memory_of,
    places,
    run,
    running,
    seconds,
    send,
    size_of,
    wait_for_rows,
)

SETTLED = 30  # seconds until an idle stream has settled


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument(
        "--scale",
        type=at_least(0.1, float),
        default=1,
        metavar="F",
        help="multiplies the records, seconds and batches of every measurement",
    )
    parser.add_argument("--full", action="store_true", help="the soak, too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MEASURES):
        parser.error(f"no such measurement: {', '.join(unknown)}; choose from {', '.join(MEASURES)}")
    names = options.names or [name for name in MEASURES if options.full or name != "soak"]
    print("| measurement | pipeline | other | ratio | goal |\n|---|---|---|---|---|", flush=True)
    with Bench.on_own_broker(options.scale) as bench:
        for name in names:
            for line in MEASURES[name](bench):
                print(f"| {' | '.join(line)} |", flush=True)


def live(bench: Bench) -> Iterator[tuple]:
    """A stream with default settings at one message a second and at a thousand, and with no pause between batches."""
    for rate, duration in ((1, 150), (1000, 50)):
        ours, shortest = (
            bench.watch(command(topic), topic, rate, duration)
            for command in (bench.stream, bench.shortest)
            for topic in [bench.topic(1)]
        )
        if rate == 1:
            yield compared(
                "seconds for the median batch, 1 message a second | shortest job",
                [ours.batch],
                [shortest.batch],
                "at most 0.12",
            )
            yield compared("% of a core, 1 message a second | shortest job", [ours.cpu], [shortest.cpu], "at most 0.2")
        for name, our, other, goal in (("p50", ours.p50, shortest.p50, 0.25), ("p99", ours.p99, shortest.p99, 0.2)):
            yield compared(
                f"{name} seconds from production to visibility, {rate:,} a second | shortest job",
                [our],
                [other],
                f"at most {goal}",
            )
    topic = bench.topic(1)
    at_once = bench.watch(bench.stream(topic, "--trigger", "0 seconds"), topic, 1, 60)
    yield alone(
        'p50 seconds from production to visibility, 1 a second, --trigger "0 seconds"', at_once.p50, "at most 0.7"
    )
    yield alone('% of a core, 1 message a second, --trigger "0 seconds"', at_once.cpu, "none")


def partitions(bench: Bench) -> Iterator[tuple]:
    """Small batches from many partitions."""
    few, *many = alternate(*(lambda count=count: median_batch(bench, count) for count in (3, 50, 200)), rounds=1)
    for count, figures, goal in zip((50, 200), many, ("at most 2", "at most 4")):
        yield compared(
            f"seconds for the median batch, 500 messages a second, {count} partitions | 3 partitions",
            figures,
            few,
            goal,
        )


def median_batch(bench: Bench, partitions: int) -> float:
    """Seconds of the median of 20 batches of the stream with its default trigger, after 10 warm-up batches."""
    topic, batches = bench.topic(1, partitions), bench.size(20)
    with running(*bench.produce(topic, 500)), running(*bench.stream(topic)) as process:
        return statistics.median(itertools.islice(batch_lines(process), 10, 10 + batches))


def start(bench: Bench) -> Iterator[tuple]:
    """From script start to first rows, with 20 records waiting; from a burst of 100,000 to its last row."""
    topic = bench.topic(20, invalid_fraction=0)

    def first_rows(command: list) -> float:
        begin = time.monotonic()
        with running(*command):
            wait_for_rows(places(command)[0])
            return time.monotonic() - begin

    ours, shortest = alternate(lambda: first_rows(bench.stream(topic)), lambda: first_rows(bench.shortest(topic)))
    yield compared(
        "seconds from the start of the script to its first rows | shortest job", ours, shortest, "at most 0.4"
    )

    def burst(command, topic: str) -> float:
        with running(*command):
            wait_for_rows(places(command)[0])
            time.sleep(SETTLED)
            begin = time.monotonic()
            bench.fill(topic, bench.size(100_000), invalid_fraction=0)
            wait_for_rows(places(command)[0], 20 + bench.size(100_000))
            return time.monotonic() - begin

    ours, shortest = alternate(
        *(
            lambda command=command: burst(command(topic := bench.topic(20, invalid_fraction=0)), topic)
            for command in (bench.stream, bench.shortest)
        ),
        rounds=1,
    )
    yield compared(
        "seconds until an idle stream has made a burst of 100,000 visible | shortest job",
        ours,
        shortest,
        "none",
    )


def sustained(bench: Bench) -> Iterator[tuple]:
    """A backlog of 5 million records, after the first batch and as a whole, against a Python consumer that does the
    same work.
    """
    records = bench.size(5_000_000)
    first = records * 2 // 5  # the stream's default of two million
    topic = bench.topic(records)

    ours, python = alternate(
        lambda: rate_and_seconds(records, first, *bench.stream(topic, "--once", "--max-offsets-per-trigger", first)),
        lambda: rate_and_seconds(
            records, first, "benchmarks/python_consumer.py", bench.broker, topic, bench.new("python"), records
        ),
    )
    for what, goal, our, other in zip(
        (
            "records a second, on a backlog of 5 million, rules and quarantine included",
            "seconds for 5 million records from a cold start",
        ),
        ("at least 1.1", "at most 1.3"),
        zip(*ours),
        zip(*python),
    ):
        yield compared(f"{what} | Python consumer, same work", our, other, goal)


def key(bench: Bench) -> Iterator[tuple]:
    """A backlog of 5 million readings of which 1 % are repeats, with a contract that has a key, and with one that has none."""
    records = bench.size(5_000_000)
    topic = bench.topic(0)
    reading = (
        '{"timestamp":"%s","device_id":"sensor-%d","building":"A","floor":1,"type":"co2","value":500.5,"unit":"ppm"}'
    )
    begin = datetime(2026, 1, 1)

    def messages() -> Iterator[tuple[str, bytes]]:
        for number in range(records):
            unique = number - 50_000 if number % 100 == 0 and number >= 50_000 else number
            time = (begin + timedelta(milliseconds=unique)).isoformat(timespec="milliseconds") + "Z"
            yield f"sensor-{unique % 90}", (reading % (time, unique % 90)).encode()

    send(bench.broker, topic, messages())
    contract = bench.new("key").with_suffix(".py")
    contract.write_text(
        f"import dataclasses, sys\nsys.path.insert(0, {str(REPOSITORY)!r})\nfrom readings import CONTRACT\n"
        "CONTRACT = dataclasses.replace(CONTRACT, key=('device_id', 'event_time'))\n"
    )
    with_key, without = alternate(
        lambda: seconds(bench.stream(topic, "--once", "--readings", contract)),
        lambda: seconds(bench.stream(topic, "--once")),
        rounds=2,
    )
    yield compared(
        "seconds for 5 million readings, 1 % repeats, with a key | without", with_key, without, "at most 1.5"
    )


def rate_and_seconds(rows: int, first: int, script: str, *arguments) -> tuple[float, float]:
    """Rows a second after the `first` ones, and the seconds of the whole process, of a script that reads this many `rows`."""
    seconds, lines = run(script, *arguments)
    count = 0
    reached = {}
    for second, line in lines:
        if found := re.match(r"(?:batch \d+: )?([\d,]+) rows", line):
            count += int(found[1].replace(",", ""))
            reached[count] = second
    begin = min(each for each in reached if each >= first * 0.99)  # Spark rounds a batch down per partition
    return (rows - begin) / (reached[rows] - reached[begin]), seconds


def contracts(bench: Bench) -> Iterator[tuple]:
    """Backlogs of other contracts, after the first batch, against a Python consumer that does the same work: a million messages of the
    Zigbee2MQTT example (nested, with three fields unknown to the contract), and 250,000 messages with 20 readings each.
    """
    for what, contract, messages, made, readings in (
        ("records a second, Zigbee2MQTT example", "examples/zigbee2mqtt.py", 1_000_000, zigbee_messages(), 1),
        ("readings a second, 20 in a message", "benchmarks/gateway.py", 250_000, gateway_messages(), 20),
    ):
        topic, count = bench.topic(0), bench.size(messages)
        send(bench.broker, topic, itertools.islice(itertools.cycle(made), count))
        rates = rates_of(bench, topic, REPOSITORY / contract, count, count * readings)
        yield compared(f"{what} | Python consumer, same work", *rates, "at least 0.8")


def rates_of(bench: Bench, topic: str, contract: Path, messages: int, rows: int) -> list[list]:
    """Rows a second of the stream and of the Python consumer, after the first quarter of the topic's messages."""
    options = ["--readings", contract, "--once", "--max-offsets-per-trigger", messages // 4]
    python = ["benchmarks/python_contracts.py", contract.stem, bench.broker, topic]
    return alternate(
        lambda: rate_and_seconds(rows, rows // 4, *bench.stream(topic), *options)[0],
        lambda: rate_and_seconds(rows, rows // 4, *python, bench.new("python"), messages)[0],
    )


def zigbee_messages() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(1)
    for number in range(100_000):
        device = {
            "friendlyName": f"room {number % 90}",
            "ieeeAddr": f"0x00158d0001{number % 90:06x}",
            "model": "WSDCGQ11LM",
        }
        values = {"temperature": round(rng.uniform(0, 40), 2), "humidity": round(rng.uniform(20, 90), 2)}
        values |= {"pressure": round(rng.uniform(950, 1050), 1), "battery": rng.randrange(100), "voltage": 2995}
        unknown = {"power_outage_count": rng.randrange(9), "trigger_count": number % 7}
        record = values | unknown | {"last_seen": 1763625600000 + number, "linkquality": rng.randrange(255)}
        record["device"] = device | {"manufacturerName": "LUMI"}
        yield f"zigbee2mqtt/room {number % 90}", json.dumps(record, separators=(",", ":")).encode()


def gateway_messages() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(1)
    for number in range(20_000):
        readings = [
            {
                "ts": 1763625600000 + number,
                "id": f"sensor-{each}",
                "t": round(rng.uniform(0, 40), 2),
                "rh": rng.randrange(99),
            }
            for each in range(20)
        ]
        record = {"gateway": f"gw-{number % 50}", "readings": readings}
        yield record["gateway"], json.dumps(record, separators=(",", ":")).encode()


def cold(bench: Bench) -> Iterator[tuple]:
    """A million records from the start of the process, against Spark's shortest job; two million that are all invalid,
    against as many that are valid.
    """
    topic = bench.topic(bench.size(1_000_000))
    ours, shortest = alternate(
        lambda: seconds(bench.stream(topic, "--once")), lambda: seconds(bench.shortest(topic, "--once"))
    )
    yield compared("seconds for a million records from a cold start | shortest job", ours, shortest, "at most 0.7")
    topics = [bench.topic(bench.size(2_000_000), invalid_fraction=fraction) for fraction in (1, 0)]
    invalid, valid = alternate(
        *(lambda topic=topic: seconds(bench.stream(topic, "--once")) for topic in topics), rounds=1
    )
    yield compared("seconds for two million records that are all invalid | all valid", invalid, valid, "none")


def idle(bench: Bench) -> Iterator[tuple]:
    """The CPU usage of an idle stream on a topic of one record."""
    yield alone("% of a core, idle on a topic", idle_percent(bench, bench.stream(bench.topic(1))), "at most 3")


def idle_percent(bench: Bench, command: list) -> float:
    """The CPU usage of an idle stream, in % of a core."""
    with running(*command) as process:
        wait_for_rows(places(command)[0])
        time.sleep(SETTLED)
        return cpu_percent(process.pid, bench.size(45))


def files(bench: Bench) -> Iterator[tuple]:
    """Large and small files, timed from the start of the process, compared with Spark's shortest job on files; then the CPU
    usage of an idle stream that has read all files of the folder.
    """
    for what, count, size, rounds, goal in (
        ("1 GB of JSON lines in 1,000 files", 1000, 1_000_000, 2, 1.0),
        ("30,000 files of one line", 30_000, 200, 1, 0.6),
    ):
        folder = bench.folder_of_files(bench.size(count), size)
        commands = [bench.bronze(folder) for _ in range(rounds)]
        unused = iter(commands)
        ours, shortest = alternate(
            lambda: seconds([*next(unused), "--once"]),  # noqa: B023 # called within this iteration
            lambda: seconds(bench.shortest_bronze(folder, "--once")),  # noqa: B023
            rounds=rounds,
        )
        yield compared(f"seconds for {what} | shortest job", ours, shortest, f"at most {goal}")
    yield alone(
        "% of a core, idle with a folder of 30,000 files already read",
        idle_percent(bench, commands[-1]),
        "at most 10",
    )


def readers(bench: Bench) -> Iterator[tuple]:
    """read_silver.py --limit 20 on 20 million rows and on 20 thousand, and a session that prints one row."""
    tables = [bench.new("large"), bench.new("small")]
    for table, rows in zip(tables, (bench.size(20_000_000), 20_000)):
        run("benchmarks/make_table.py", table, rows)
    large, small, bare = alternate(
        *(lambda table=table: seconds(["read_silver.py", "--table", table, "--limit", 20]) for table in tables),
        lambda: seconds(["benchmarks/shortest_job.py", "row", tables[1]]),
    )
    yield compared("seconds for read_silver.py on 20 million rows | on 20 thousand", large, small, "at most 1.2")
    yield compared(
        "seconds for read_silver.py on 20 thousand rows | a session that prints one row", small, bare, "at most 0.25"
    )


def producer(bench: Bench) -> Iterator[tuple]:
    """kafka_producer.py --rate 0 against confluent-kafka with the same records."""
    count = bench.size(300_000)
    topic = bench.topic(1)

    def confluent() -> float:
        begin = time.monotonic()
        send(bench.broker, topic, itertools.islice(SIMULATOR.messages(DEVICES, seed=1), count))
        return count / (time.monotonic() - begin)

    def ours() -> float:
        _, lines = run(*bench.produce(topic, 0, "--count", count, "--seed", 1))
        times = [second for second, line in lines if " sent, " in line]
        return count / (times[-1] - times[0])

    yield compared(
        "messages a second from kafka_producer.py --rate 0 | confluent-kafka", *alternate(ours, confluent), "none"
    )


def soak(bench: Bench) -> Iterator[tuple]:
    """3,000 small batches in a row: how long they take, and how disk and memory usage grow.

    The tables keep five minutes of history instead of two hours, so that the run, which takes an hour, shows what
    the clean-ups leave behind. There is one clean-up every thousand batches.
    """
    batches, records = bench.size(3000), 200
    topic = bench.topic(records)
    command = bench.stream(topic, "--once", "--max-offsets-per-trigger", records)
    table, checkpoint = places(command)
    run(*command)
    for path in (table, quarantine_of(str(table))):
        DeltaTable(path).alter.set_table_properties(
            {
                "delta.logRetentionDuration": "interval 5 minutes",
                "delta.deletedFileRetentionDuration": "interval 5 minutes",
            }
        )
    bench.fill(topic, batches * records)
    taken, samples = [], []
    with running(*command) as process:
        for second in batch_lines(process):
            taken.append(second)
            if len(taken) % (batches // 60) == 0:
                samples.append(
                    [
                        size_of(table / "_delta_log"),
                        size_of(checkpoint),
                        size_of(table),
                        len(DeltaTable(table).file_uris()),
                        memory_of(process.pid),
                    ]
                )
    # The first 10 are a warm-up.
    first, last = [statistics.mean(part) for part in (taken[10:110], taken[-100:])]
    yield compared(f"seconds of the last 100 of {batches:,} batches | of the first 100", [last], [first], "at most 1.2")
    # There are sixty samples of each, twenty per third. The sixth is taken after a tenth of the batches.
    *sizes, live_files, memory = zip(*samples)
    for name, size in zip(("_delta_log", "the checkpoint", "the table's folder"), sizes):
        yield compared(
            f"peak bytes in {name} in the last third of {batches:,} batches | middle third",
            [max(size[40:])],
            [max(size[20:40])],
            "bounded",
        )
    yield alone(f"peak live files in {batches:,} batches", max(live_files), "under 100")
    yield compared(
        f"MB of memory used by the consumer's processes after {batches:,} batches | after {batches // 10:,}",
        [memory[-1]],
        [memory[5]],
        "flat",
    )


MEASURES = {
    measure.__name__: measure
    for measure in (live, idle, partitions, start, sustained, contracts, key, cold, files, readers, producer, soak)
}

if __name__ == "__main__":
    run_main(main)
