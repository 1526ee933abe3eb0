"""What the tests share: one SparkSession, one real broker made from docker-compose.yml, and scripts run as processes."""

import argparse
import functools
import gc
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.delta.tables import bronze_tables, silver_tables
from pipeline.files.folder import list_new_files
from pipeline.files.source import FileSource
from pipeline.kafka.source import KafkaSource
from pipeline.kafka.stream import streams_of
from pipeline.kafka.topics import Topic
from pipeline.paths import quarantine_of
from pipeline.spark.class_archive import use_archive
from pipeline.spark.java import DELTA, KAFKA_SOURCE, find_java, spark_jars
from pipeline.spark.session import build_spark
from pipeline.streaming.checkpoints import Checkpoint, Start, check_start
from pipeline.streaming.query import AVAILABLE_NOW, run_query
from pipeline.streaming.source import Source
from pipeline.streaming.writer import NoMetrics, TableWriter
from pipeline.terminal.ports import free_ports
from pipeline.terminal.signals import STOP_SIGNALS, StopFlag

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from pyspark.sql import SparkSession

from readings import CONTRACT

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds; a limit for what hangs, far above what any step takes


def until(holds: Callable) -> None:
    """Returns once `holds` is true."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Script:
    """A script of the project as a process of its own, whose output can be waited for."""

    def __init__(
        self,
        name: str,
        *arguments,
        folder: Path = REPOSITORY,
        env: dict | None = None,
        interpreter: Iterable = (sys.executable, "-u"),
    ):
        self.process = subprocess.Popen(
            [*map(str, interpreter), str(folder / name), *map(str, arguments)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            start_new_session=True,
        )
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.output.count(text) < times:
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {text!r} in:\n{self.output}"
            time.sleep(0.1)

    def counts(self) -> tuple[int, int]:
        """What a producer that has ended has sent, and what was acknowledged."""
        counts = re.findall(r"^([\d,]+) sent, ([\d,]+) acknowledged\.$", self.output, re.MULTILINE)[-1]
        return tuple(int(count.replace(",", "")) for count in counts)

    def stop(self, stop_signal: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal; returns the exit code."""
        self.process.send_signal(stop_signal)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code


def run_script(name: str, *arguments, prefix: Iterable = (), **options) -> subprocess.CompletedProcess:
    """Runs a script, by the command `prefix` if told, to its end; its exit code, stdout and stderr."""
    return subprocess.run(
        [*prefix, sys.executable, str(REPOSITORY / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        **{"cwd": "/", "timeout": PATIENCE, "stdin": subprocess.DEVNULL} | options,
    )


@functools.cache
def manual(script: str) -> str:
    """What a script prints for --help."""
    run = run_script(script, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", help="more kills, larger files and more hostile records, for half an hour"
    )


def pytest_configure(config):
    if not config.option.long:
        # A test runs for seconds, in which Java's best compiler (C2) takes the cores from what it compiles.
        os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")


def pytest_sessionstart(session):
    """What a first start has to download and to prepare is there before several processes want it."""
    if not hasattr(session.config, "workerinput"):
        use_archive(find_java(), spark_jars(DELTA, KAFKA_SOURCE))


def pytest_terminal_summary(terminalreporter):
    lines = [
        line
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        if report.when == "call"
        for name, line in report.user_properties
        if name == "account"
    ]
    if not lines:
        return
    terminalreporter.section("nothing lost, nothing twice")
    for line in [("fault", "sent", "table", "quarantine", "missing", "duplicates"), *lines]:
        terminalreporter.write_line(
            f"{line[0]:<96}" + "".join(f"{cell:>12,}" if type(cell) is int else f"{cell:>12}" for cell in line[1:])
        )


def pytest_collection_modifyitems(items: list) -> None:
    """The largest records come first, while the memory of Spark's JVM is still free."""
    items.sort(key=lambda item: (item.path.name != "test_hostile_records.py", "large_record" not in item.name))


@pytest.fixture
def account(record_property):
    """Notes what became of the records that were sent, prints it at the end of the run, and lets none be lost or
    doubled.

    A record goes by its origin: (topic, partition, offset) or (file, line).
    """

    def note(fault: str, sent: Iterable, table: Iterable, quarantine: Iterable) -> None:
        table, quarantine = list(table), list(quarantine)
        arrived = Counter(table + quarantine)
        missing = set(sent) - arrived.keys()
        duplicates = {origin for origin, times in arrived.items() if times > 1}
        record_property("account", [fault, len(set(sent)), len(table), len(quarantine), len(missing), len(duplicates)])
        assert (missing, duplicates, arrived.keys() - set(sent)) == (set(), set(), set())

    return note


@pytest.fixture
def start():
    """Starts scripts that are killed at the end of the test, should they still run."""
    scripts = []

    def start_script(*arguments, **options) -> Script:
        scripts.append(Script(*arguments, **options))
        return scripts[-1]

    yield start_script
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
            script.wait()


@pytest.fixture
def produce(start):
    """Starts a producer of 200 messages a second, 5 % of them invalid, into the topic that its options name."""
    return lambda topic: start("kafka_producer.py", *topic, "--create-topic", "--rate", 200, "--invalid-fraction", 0.05)


def acknowledged(*producers: Script) -> int:
    """Stops the producers; how many messages they report as acknowledged, which has to be all that they have sent."""
    for producer in producers:
        assert producer.stop() == 0, producer.output
    counts = [producer.counts() for producer in producers]
    assert all(sent == acknowledged for sent, acknowledged in counts)
    return sum(sent for sent, _ in counts)


@pytest.fixture(scope="session")
def spark():
    session = build_spark("tests")
    yield session
    session.stop()


@pytest.fixture
def run_here(request, capsys):
    """As `run_script`, in this process and in the session of the tests: for what a script does, where its start is not
    the point.
    """

    def run(name: str, *arguments) -> subprocess.CompletedProcess:
        def session(*_, **__):
            session = request.getfixturevalue("spark")
            session._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # as in a new process
            return session

        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        capsys.readouterr()
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("pipeline.spark.session.build_spark", session)
                patch.setattr("pipeline.readers.latest.build_spark", session)
                patch.setattr(SparkSession, "stop", lambda _: None)
                patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a script sets: put back at its end
                patch.setattr(sys, "argv", [str(REPOSITORY / name), *map(str, arguments)])
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for each in gc.get_objects():  # which a script leaves to the end of its process
                if issubclass(type(each), Topic):
                    each.close()
        return subprocess.CompletedProcess([name, *arguments], code, *capsys.readouterr())

    return run


class GivenRecords(Source):
    """A source whose batches are records already."""

    mode = "as given"


def bronze_writer(spark, table: Path, contract=CONTRACT) -> TableWriter:
    """Writes batches of records to a Bronze table."""
    start = Start(Checkpoint(spark, f"{table}_checkpoint"), {}, {})
    return TableWriter(bronze_tables(str(table), contract.columns), contract, GivenRecords(), start)


def run_streams(spark, streams: Iterable, source, tables, options, writer_type=TableWriter) -> None:
    """Runs streams over all that is there, as a start of their script with --once does."""
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # as in a new process
    start = check_start(spark, source, tables, CONTRACT, options.checkpoint)
    for stream, trigger in streams:
        _, error = run_query(
            stream, trigger, writer_type(tables, CONTRACT, source, start), options.checkpoint, StopFlag(), NoMetrics()
        )
        if isinstance(source, KafkaSource) and source.reader:
            source.reader.close()
            source.reader = None
        if error:
            raise error


@pytest.fixture
def ingest(spark, tmp_path):
    """A folder, and a function that runs the stream over all that is new in it: the rows that came to each table."""
    folder = tmp_path / "input"
    folder.mkdir()
    options = argparse.Namespace(
        input=str(folder),
        table=str(tmp_path / "bronze"),
        checkpoint=str(tmp_path / "checkpoint"),
        once=True,
        max_files_per_trigger=1000,
        max_unpacked=1000,
        archive=None,
        multiline=False,
    )

    def rows():
        return [
            spark.read.format("delta").load(path).count() if Path(path, "_delta_log").exists() else 0
            for path in (options.table, quarantine_of(options.table))
        ]

    def stream(multiline: bool = False) -> None:
        options.multiline = multiline
        run_streams(
            spark,
            [(list_new_files(spark, options), AVAILABLE_NOW)],
            FileSource(spark, options),
            bronze_tables(options.table, CONTRACT.columns),
            options,
        )

    def run(multiline: bool = False, **others: object) -> tuple[int, int]:
        before = rows()
        vars(options).update(others)
        stream(multiline)
        accepted, rejected = (now - then for now, then in zip(rows(), before))
        return accepted, rejected

    run.stream, run.rows = stream, rows  # for tables that can't be counted before
    return folder, run


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """The address of a running local_kafka.py."""
    [port] = free_ports(1)
    kafka = Script(
        "local_kafka.py", "--port", port, "--data-dir", tmp_path_factory.mktemp("kafka") / "größe é 'q\" \\ =:#"
    )
    try:
        kafka.wait_for("Kafka is ready")
        yield f"localhost:{port}"
    finally:
        assert kafka.stop() == 0, kafka.output


topic_numbers = itertools.count()


@pytest.fixture
def silver(broker, tmp_path):
    """The options of a producer and a consumer on a topic and a table of their own."""
    topic = ["--bootstrap-servers", broker, "--topic", f"readings_{next(topic_numbers)}"]
    return topic, [*topic, "--table", tmp_path / "silver", "--checkpoint", tmp_path / "checkpoint"]


def tables(spark, options: list) -> tuple:
    """The table and the quarantine that the options of a stream name."""
    table = str(options[options.index("--table") + 1])
    return tuple(spark.read.format("delta").load(path) for path in (table, f"{table}_quarantine"))


def topic_offsets(broker: str, topic: str, end: bool = True) -> dict[int, int]:
    """The end of each partition, or its beginning."""
    with KafkaConsumer(bootstrap_servers=broker) as consumer:
        places = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
        offsets = consumer.end_offsets(places) if end else consumer.beginning_offsets(places)
        return {place.partition: offset for place, offset in offsets.items()}


def origins(spark, broker: str, options: list) -> tuple[list, list, list]:
    """(topic, partition, offset) of what is in the topic, in the table and in the quarantine."""
    topic = options[options.index("--topic") + 1]
    first, end = (topic_offsets(broker, topic, end) for end in (False, True))
    sent = [(topic, partition, offset) for partition in end for offset in range(first[partition], end[partition])]
    return sent, *(
        [tuple(row) for row in table.select("topic", "partition", "offset").collect()]
        for table in tables(spark, options)
    )


class World:
    """A topic with a table, and what is in both. The stream runs in the session of the tests."""

    def __init__(self, spark, topic: Topic, table: Path, checkpoint: Path):
        self.spark, self.topic, self.broker = spark, topic, topic.servers
        self.options = argparse.Namespace(
            table=str(table), checkpoint=str(checkpoint), once=True, max_offsets_per_trigger=100
        )

    def make(self, partitions: int = 1, **configs: str) -> None:
        with KafkaAdminClient(bootstrap_servers=self.broker) as admin:
            admin.create_topics(
                {
                    self.topic.name: {
                        "num_partitions": partitions,
                        "replication_factor": 1,
                        "configs": {name.replace("_", "."): value for name, value in configs.items()},
                    }
                },
                wait_for_metadata=True,
            )

    def send(self, *records: bytes | None, partition: int = 0, key: bytes | None = None, **settings) -> None:
        with KafkaProducer(bootstrap_servers=self.broker, **settings) as producer:
            for record in records:
                producer.send(self.topic.name, record, key=key, partition=partition)

    def transaction(self) -> KafkaProducer:
        """A producer with a transaction that has begun."""
        producer = KafkaProducer(bootstrap_servers=self.broker, transactional_id=uuid.uuid4().hex)
        producer.init_transactions()
        producer.begin_transaction()
        return producer

    def consume(self, writer_type: type = TableWriter, accept_data_loss: bool = False) -> tuple[int, int]:
        """Runs the stream over all that is there, as a new start of the script does; the rows that came to each table."""
        before = self.rows()
        self.options.accept_data_loss = accept_data_loss
        source = KafkaSource(self.topic, accept_data_loss, group=self.topic.name)
        run_streams(
            self.spark,
            streams_of(self.spark, source, self.options),
            source,
            silver_tables(self.options.table, CONTRACT.columns),
            self.options,
            writer_type,
        )
        accepted, rejected = (len(now) - len(then) for now, then in zip(self.rows(), before))
        return accepted, rejected

    def rows(self) -> tuple[list, list]:
        """(partition, offset) of the rows of both tables."""
        paths = (self.options.table, quarantine_of(self.options.table))
        return tuple(
            [tuple(row) for row in self.spark.read.format("delta").load(path).select("partition", "offset").collect()]
            if Path(path, "_delta_log").exists()
            else []
            for path in paths
        )

    def kept(self) -> list[tuple[int, int]]:
        """(partition, offset) of what a plain consumer finds in the topic."""
        with KafkaConsumer(
            self.topic.name,
            bootstrap_servers=self.broker,
            auto_offset_reset="earliest",
            isolation_level=self.topic.isolation_level,
            consumer_timeout_ms=2000,
        ) as consumer:
            return [(message.partition, message.offset) for message in consumer]

    def check(self, account, what: str) -> None:
        """Holds the tables against what is in the topic."""
        account(what, self.kept(), *self.rows())


@pytest.fixture
def world(spark, broker, tmp_path):
    """A function that makes a World whose Kafka client has these properties."""
    topics = []

    def make_world(**properties: str) -> World:
        name = f"world_{next(topic_numbers)}"
        topics.append(Topic(broker, name, {key.replace("_", "."): value for key, value in properties.items()}))
        return World(spark, topics[-1], tmp_path / name / "silver", tmp_path / name / "checkpoint")

    yield make_world
    for topic in topics:
        topic.close()


def world_of(spark, options: list) -> World:
    """The topic and the table of a stream, whose script has these options (`silver`)."""
    _, broker, _, topic, _, table, _, checkpoint = options
    world = World(spark, Topic(broker, topic), table, checkpoint)
    world.options.max_offsets_per_trigger = 100_000
    return world
