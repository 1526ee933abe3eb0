"""Shared fixtures: one SparkSession, one real broker set up as in docker-compose.yml, and scripts run as processes."""

import argparse
import gc
import itertools
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pipeline.delta.tables import bronze_tables
from pipeline.files.folder import list_new_files
from pipeline.files.source import FileSource
from pipeline.kafka.topics import Topic
from pipeline.paths import quarantine_of
from pipeline.spark.class_archive import use_archive
from pipeline.spark.java import DELTA, KAFKA_SOURCE, find_java, spark_jars
from pipeline.spark.session import build_spark
from pipeline.streaming.query import AVAILABLE_NOW
from pipeline.terminal.ports import free_ports
from pipeline.terminal.signals import STOP_SIGNALS

import pytest
from pyspark.sql import SparkSession

from helpers.processes import REPOSITORY, Script
from helpers.streams import run_streams
from helpers.topics import World
from readings import CONTRACT


def pytest_addoption(parser):
    parser.addoption(
        "--long",
        action="store_true",
        help="all tests and all cases of the fault tests, with more kills, larger files and more hostile records",
    )


def pytest_configure(config):
    if not config.option.long:
        # A test runs for seconds. Java's best compiler (C2) would take the cores from the code that it compiles.
        os.environ.setdefault("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")


def pytest_xdist_auto_num_workers(config) -> int:
    """The number of processes for `-n logical`: a test spends a third of its time waiting, and needs up to 4 GB."""
    cores, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores * 3 // 2, memory // 4_000_000_000))


def pytest_sessionstart(session):
    """Does the downloads and preparation of a first start before several processes need them."""
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
    terminalreporter.section("nothing lost, nothing duplicated")
    for line in [("fault", "sent", "table", "quarantine", "missing", "duplicates"), *lines]:
        terminalreporter.write_line(
            f"{line[0]:<96}" + "".join(f"{cell:>12,}" if type(cell) is int else f"{cell:>12}" for cell in line[1:])
        )


def pytest_collection_modifyitems(config, items: list) -> None:
    """Without --long, leaves out tests marked as long and, of each fault test that needs Spark or Kafka, all cases but the first.

    Runs the tests with the largest records first, while the memory of Spark's JVM is still free, and then the files that take
    longest: at the end, they would keep one process busy and the others idle.
    """
    if not config.option.long:
        seen, left_out = set(), []
        for item in items:
            is_slow = item.path.parent.name == "faults" and {"spark", "broker", "start"} & {*item.fixturenames}
            if item.get_closest_marker("long") or is_slow and item.function in seen:
                left_out.append(item)
            seen.add(item.function)
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    first = ["test_hostile_records.py", "test_topics.py", "test_folders.py", "test_readers.py"]
    items.sort(
        key=lambda item: (
            first.index(item.path.name) if item.path.name in first else len(first),
            "large_record" not in item.name,
        )
    )


@pytest.fixture
def account(record_property):
    """Asserts that no record was lost or duplicated, and reports the counts at the end of the run.

    A record is identified by its origin: (topic, partition, offset) or (file, line).
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
    """A function that starts scripts. Those still running at the end of the test are killed."""
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
    """A function that starts a producer of 200 messages a second, 5 % of them invalid, with the given topic options."""
    return lambda topic: start("kafka_producer.py", *topic, "--create-topic", "--rate", 200, "--invalid-fraction", 0.05)


@pytest.fixture(scope="session")
def spark():
    session = build_spark("tests")
    yield session
    session.stop()


@pytest.fixture
def run_here(request, capsys):
    """Like `run_script`, but in this process and with the tests' session: for tests of what a script does, not of how
    it starts.
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
                patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # set by scripts; restored afterwards
                patch.setattr(sys, "argv", [str(REPOSITORY / name), *map(str, arguments)])
                runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for each in gc.get_objects():  # scripts leave them open until their process ends
                if issubclass(type(each), Topic):
                    each.close()
        return subprocess.CompletedProcess([name, *arguments], code, *capsys.readouterr())

    return run


@pytest.fixture
def ingest(spark, tmp_path):
    """A folder, and a function that runs the stream on its new files and returns how many rows each table gained."""
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
        keep_history=None,
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
            bronze_tables(options.table, CONTRACT.columns, options.keep_history),
            options,
        )

    def run(multiline: bool = False, **others: object) -> tuple[int, int]:
        before = rows()
        vars(options).update(others)
        stream(multiline)
        accepted, rejected = (now - then for now, then in zip(rows(), before))
        return accepted, rejected

    run.stream, run.rows, run.options = stream, rows, options  # `stream`: for tables that can't be counted beforehand
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
    """The options of a producer and of a consumer, with a topic and a table of their own."""
    topic = ["--bootstrap-servers", broker, "--topic", f"readings_{next(topic_numbers)}"]
    return topic, [*topic, "--table", tmp_path / "silver", "--checkpoint", tmp_path / "checkpoint"]


@pytest.fixture
def world(spark, broker, tmp_path):
    """A function that creates a World whose Kafka client has the given properties."""
    topics = []

    def make_world(**properties: str) -> World:
        # Spark hides table properties whose values contain "url" or "token".
        name = f"hourly_token_{next(topic_numbers)}"
        topics.append(Topic(broker, name, {key.replace("_", "."): value for key, value in properties.items()}))
        return World(spark, topics[-1], tmp_path / name / "silver", tmp_path / name / "checkpoint")

    yield make_world
    for topic in topics:
        topic.close()
