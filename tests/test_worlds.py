"""The worlds of users: topics and folders of every shape, odd places and locales, and a stop at any moment.

The shapes go through the streams' own functions in one session of Spark; the scripts are processes where the process is
the point.
"""

import argparse
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, REPOSITORY, Script, origins, run_script, tables
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from test_files_to_bronze import put
from test_rules import reading

import streaming_files_to_delta_bronze as bronze_job
from common.checkpoints import check_start
from common.console import PipelineError
from common.java import cache_folder
from common.streams import run_query
from common.table_writer import TableWriter
from common.tables import bronze_tables, quarantine_of, silver_tables
from common.topics import Topic
from local_kafka import free_ports
from readings import CONTRACT
from spark_kafka_consumer import KafkaSource, read_topic

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"
VALID, BROKEN = reading(), b"{"


def run_stream(spark, stream, source, tables, options, writer_type=TableWriter) -> None:
    start = check_start(spark, source, tables, CONTRACT, options.checkpoint)
    _, error = run_query(stream, writer_type(tables, CONTRACT, source, start), options, threading.Event())
    if error:
        raise error


class World:
    """A topic of its own with a table, and what is in both."""

    def __init__(self, spark, broker: str, folder: Path, properties: dict[str, str]):
        self.spark, self.broker = spark, broker
        self.topic = Topic(broker, f"world_{uuid.uuid4().hex[:8]}", properties)
        self.options = argparse.Namespace(table=str(folder / "silver"), checkpoint=str(folder / "checkpoint"), once=True,
                                          accept_data_loss=False, max_offsets_per_trigger=100)

    def make(self, partitions: int = 1, **configs: str) -> None:
        with KafkaAdminClient(bootstrap_servers=self.broker) as admin:
            admin.create_topics({self.topic.name: {"num_partitions": partitions, "replication_factor": 1, "configs": {
                name.replace("_", "."): value for name, value in configs.items()}}}, wait_for_metadata=True)

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

    def consume(self, writer_type: type = TableWriter) -> tuple[int, int]:
        """Runs the stream over all that is there, as a new start of the script does; the rows that came to each table."""
        before = self.rows()
        run_stream(self.spark, read_topic(self.spark, self.topic, self.options), KafkaSource(self.topic, accept_data_loss=False),
                   silver_tables(self.options.table, CONTRACT.columns), self.options, writer_type)
        accepted, rejected = (len(now) - len(then) for now, then in zip(self.rows(), before))
        return accepted, rejected

    def rows(self) -> tuple[list, list]:
        """(partition, offset) of the rows of both tables."""
        paths = (self.options.table, quarantine_of(self.options.table))
        return tuple([tuple(row) for row in self.spark.read.format("delta").load(path).select("partition", "offset").collect()]
                     if Path(path).exists() else [] for path in paths)

    def check(self, account, what: str) -> None:
        """Holds the tables against what a plain consumer finds in the topic."""
        with KafkaConsumer(self.topic.name, bootstrap_servers=self.broker, auto_offset_reset="earliest",
                           isolation_level=self.topic.isolation_level, consumer_timeout_ms=2000) as consumer:
            account(what, [(message.partition, message.offset) for message in consumer], *self.rows())


@pytest.fixture
def world(spark, broker, tmp_path):
    """A function that makes a World whose Kafka client has these properties."""
    numbers = itertools.count()
    return lambda **properties: World(spark, broker, tmp_path / str(next(numbers)), {
        name.replace("_", "."): value for name, value in properties.items()})


@pytest.mark.parametrize("partitions", [1, 3, 50])
def test_an_empty_topic_stops_nothing_and_what_comes_later_is_read(world, account, partitions):
    world = world()
    world.make(partitions)
    assert [world.consume(), world.consume()] == [(0, 0), (0, 0)]
    world.send(VALID, BROKEN, partition=partitions - 1)
    assert [world.consume(), world.consume()] == [(1, 1), (0, 0)]
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, f"a topic of {partitions} partitions, empty at first")


def test_partitions_that_are_added_are_read(world, account):
    world = world()
    world.make(1)
    world.send(VALID)
    assert world.consume() == (1, 0)
    with KafkaAdminClient(bootstrap_servers=world.broker) as admin:
        admin.create_partitions({world.topic.name: 30})
    assert world.consume() == (0, 0)
    world.send(VALID, BROKEN, partition=29)
    assert world.consume() == (1, 1)
    world.check(account, "29 partitions added to a topic")


def test_a_batch_that_failed_for_want_of_a_record_goes_on(world, account):
    """As earlier versions left the checkpoint: the first batch is noted, and not done."""
    world = world()
    world.make(1)

    class Failing(TableWriter):
        def write(self, *batch):
            raise ValueError

    with pytest.raises(ValueError):
        world.consume(Failing)
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, "a checkpoint whose first batch failed")


def test_compressed_messages_are_read(world, account):
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        each = world()
        each.make(1, compression_type=codec)  # the broker does it
        each.send(*[VALID] * 20, BROKEN, linger_ms=50)
        assert each.consume() == (20, 1)
        # kafka-python reads gzip alone without another package.
        account(f"messages compressed by {codec}", [(0, offset) for offset in range(21)], *each.rows())


def test_tombstones_are_records_and_stop_nothing(world, account):
    world = world()
    world.make(2)
    world.send(None, None, key=b"sensor-001")
    assert world.consume() == (0, 2)
    world.check(account, "tombstones only")


def test_a_compacted_topic_is_read_over_its_gaps(world, account):
    world = world()
    # The newest segment is never compacted; a record that comes after 50 ms closes it.
    world.make(1, cleanup_policy="compact", segment_ms="50", min_cleanable_dirty_ratio="0.01", max_compaction_lag_ms="50",
               delete_retention_ms="0")
    for key in (b"a", b"b", b"a", b"b", b"a", b"c"):
        world.send(VALID, VALID, VALID, key=key)
        time.sleep(0.1)
    world.options.max_offsets_per_trigger = 4  # some batches then have a gap at their end, and others are nothing else
    deadline = time.monotonic() + PATIENCE
    while True:
        with KafkaConsumer(world.topic.name, bootstrap_servers=world.broker, auto_offset_reset="earliest",
                           consumer_timeout_ms=1000) as consumer:
            kept = [message.offset for message in consumer]
        if len(kept) < 10:
            break
        assert time.monotonic() < deadline
    assert world.consume() == (len(kept), 0)
    world.check(account, "a compacted topic")


def test_only_what_a_transaction_has_committed_is_read(world, account):
    world = world()
    world.make(2)
    with world.transaction() as producer:
        for commit in (True, False, True):
            for partition in (0, 0, 1):
                producer.send(world.topic.name, VALID, partition=partition)
            (producer.commit_transaction if commit else producer.abort_transaction)()
            producer.begin_transaction()
        assert world.consume() == (6, 0)
        producer.send(world.topic.name, VALID, partition=0).get()
        producer.abort_transaction()
        assert [world.consume(), world.consume()] == [(0, 0), (0, 0)]  # a batch of aborted records alone, and none
        producer.begin_transaction()
        producer.send(world.topic.name, VALID, partition=0).get()
        world.send(VALID, BROKEN, partition=0)  # has to wait for the transaction before it
        world.send(VALID, partition=1)
        assert world.consume() == (1, 0)
        producer.commit_transaction()
    assert world.consume() == (2, 1)
    world.check(account, "transactions, committed, aborted and open")


def test_a_first_batch_of_aborted_records_stops_nothing(world, account):
    world = world()
    world.make(1)
    with world.transaction() as producer:
        producer.send(world.topic.name, VALID).get()
        producer.abort_transaction()
    assert world.consume() == (0, 0)
    world.send(VALID)
    assert world.consume() == (1, 0)
    world.check(account, "aborted records at first")


def test_uncommitted_records_are_read_where_the_user_wants_them_and_committed_ones_wait_for_them(world, account):
    world, committed = world(isolation_level="read_uncommitted"), world()
    world.make(1)
    committed.topic.name, committed.options = world.topic.name, world.options
    world.send(VALID)
    with world.transaction() as producer:
        producer.send(world.topic.name, VALID).get()
        assert world.consume() == (2, 0)
        with pytest.raises(PipelineError, match="a transaction is still open in partition 0 from offset 1 on"):
            committed.consume()
        producer.abort_transaction()
    world.send(VALID)
    assert committed.consume() == (1, 0)
    world.check(account, "uncommitted records")


def test_an_isolation_level_that_there_is_not_is_said():
    with pytest.raises(PipelineError, match="isolation.level is serializable; it can be read_committed or"):
        Topic("localhost:9092", "t", {"isolation.level": "serializable"})


@pytest.fixture
def ingest(spark, tmp_path):
    """A folder, and a function that runs the stream over all that is new in it: the rows that came to each table."""
    folder = tmp_path / "input"
    folder.mkdir()
    options = argparse.Namespace(input=str(folder), table=str(tmp_path / "bronze"), checkpoint=str(tmp_path / "checkpoint"),
                                 once=True, max_files_per_trigger=1000)

    def rows():
        return [spark.read.format("delta").load(path).count() if Path(path, "_delta_log").exists() else 0
                for path in (options.table, quarantine_of(options.table))]

    def run(multiline: bool = False) -> tuple[int, int]:
        before = rows()
        run_stream(spark, bronze_job.list_new_files(spark, options), bronze_job.FileSource(multiline),
                   bronze_tables(options.table, CONTRACT.columns), options)
        accepted, rejected = (now - then for now, then in zip(rows(), before))
        return accepted, rejected

    return folder, run


@pytest.mark.parametrize("multiline", [False, True])
@pytest.mark.parametrize("nothing", [[], [b""], [b"\n \r\n\n"], [b"", b"\t", b"\n"]], ids=["no file", "empty", "blank", "several"])
def test_a_folder_with_nothing_in_it_stops_nothing_and_what_comes_later_is_read(ingest, nothing, multiline):
    folder, run = ingest
    for number, content in enumerate(nothing):
        (folder / f"nothing{number}.json").write_bytes(content)
    assert [run(multiline), run(multiline)] == [(0, 0), (0, 0)]
    put(folder, "something.json", VALID)
    assert run(multiline) == (1, 0)
    (folder / "nothing again.json").touch()
    assert run(multiline) == (0, 0)


NAMES = ["2026-11-20T08:00:00Z.json", "2026-11-20T08:00:00Z[UTC].json", "a:b*?.jsonl.gz", "capital.JSON", "Capital.JsonL",
         "capital.NDJSON.GZ", "größe é.json", "\U0001f600 \n.json", "100% + #&'\"\\.json", "sub:folder/deep er/x:y.ndjson",
         "sub [a]{b}*/plain.json", "sub [a]{b}*/x:y.json"]


@pytest.mark.parametrize("multiline", [False, True])
def test_files_of_every_name_are_read(ingest, spark, tmp_path, multiline):
    folder, run = ingest
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(VALID) if name.lower().endswith(".gz") else VALID)
    assert run(multiline) == (len(NAMES), 0)
    files = spark.read.format("delta").load(str(tmp_path / "bronze")).select("source_file").collect()
    assert sorted(row.source_file for row in files) == sorted(f"file:{folder}/{name}" for name in NAMES)


def test_a_batch_of_unreadable_files_alone_is_in_the_quarantine(ingest, capsys):
    folder, run = ingest
    (folder / "half.json.gz").write_bytes(gzip.compress(os.urandom(1000))[:500])
    (folder / "long.json").write_bytes(b"x" * 9_000_000)
    assert [run(), run()] == [(0, 2), (0, 0)]
    said = capsys.readouterr().err
    assert all(f"{folder}/{name} can't be read" in said for name in ("half.json.gz", "long.json"))
    put(folder, "good.json", VALID)
    assert run() == (1, 0)


def test_a_file_whose_name_is_not_in_utf8_is_named(ingest, capsys):
    folder, run = ingest
    put(folder, "good.json", VALID)
    (folder / os.fsdecode("größe.json".encode("latin-1"))).write_bytes(VALID)
    assert run() == (1, 0)
    assert r"gr\udcf6\udcdfe.json can't be read: its name is not in UTF-8" in capsys.readouterr().err


def test_thousands_of_files_are_read(ingest):
    folder, run = ingest
    for number in range(5000):
        (folder / f"{number}.json").write_bytes(VALID + b"\n\n" + (BROKEN if number % 100 == 0 else VALID) + b"\r\n")
    assert run() == (9950, 50)


def test_blank_lines_are_no_records(ingest):
    folder, run = ingest
    (folder / "blank.json").write_bytes(b"\r\n\n" + VALID + b"\r\n\r\n \t \n" + VALID + b"\n\n" + BROKEN + b"\n\n")
    assert run() == (2, 1)


PRETTY = json.dumps(json.loads(VALID), indent=2).encode()
MULTILINE = {
    "pretty.json": PRETTY,
    "pretty, other style.json": VALID.replace(b", ", b",\n"),
    "pretty, with a byte order mark.json": b"\xef\xbb\xbf" + PRETTY,
    "pretty, of Windows.json": PRETTY.replace(b"\n", b"\r\n"),
    "array.json": b"[" + VALID + b", " + VALID + b"]",
    "array in lines.json": b"[\n" + VALID + b",\n" + VALID + b"\n]\n",
    "pretty array.json": json.dumps([json.loads(VALID)] * 2, indent=2).encode(),
}
LINES = {
    "broken lines.json": VALID + b"\n{\n" + VALID[:30] + b"\n}\n[\n",
    "two values.json": PRETTY + b"\n" + PRETTY,
    "strings.json": b'["a",\n"b"]',
    "half.json": PRETTY[:-2],
}


def test_a_file_that_wants_multiline_is_named_once_and_no_other_is(ingest, capsys):
    folder, run = ingest
    for name, content in (MULTILINE | LINES).items():
        (folder / name).write_bytes(content)
    _, rejected = run()
    named = [line for line in capsys.readouterr().err.splitlines() if "--multiline" in line]
    assert sorted(line.split(" holds one JSON value")[0] for line in named) == sorted(f"file:{folder}/{name}" for name in MULTILINE)
    assert rejected > len(MULTILINE | LINES)
    assert run() == (0, 0) and capsys.readouterr().err == ""


def test_what_a_file_that_wants_multiline_holds_is_read_with_it(ingest):
    folder, run = ingest
    for name, content in MULTILINE.items():
        (folder / name).write_bytes(content)
    assert run(multiline=True) == (10, 0)


ODD = "größe é 'q\" $x [a]{b}"


def test_every_place_may_have_blanks_quotes_and_other_letters_in_every_locale(tmp_path, spark):
    """HOME, the folder of the jars, TMPDIR, JAVA_HOME, the repository, the input, the table and the checkpoint at once."""
    places = {name: tmp_path / f"{name} {ODD}" for name in ("home", "cache", "tmp", "repository", "input")}
    for place in places.values():
        place.mkdir()
    for file in cache_folder().iterdir():
        os.symlink(file, places["cache"] / file.name)
    java = Path(spark._jvm.System.getProperty("java.home"))
    os.symlink(java, tmp_path / f"java {ODD}")
    for name in ("common", "readings.py", BRONZE, "read_bronze.py"):
        (shutil.copytree if "." not in name else shutil.copy)(REPOSITORY / name, places["repository"] / name)
    readings = shutil.copy(REPOSITORY / "readings.py", tmp_path / f"readings {ODD}.py")
    put(places["input"], "größe é.json", reading(device_id="größe"))
    env = os.environ | {"HOME": str(places["home"]), "PIPELINE_CACHE": str(places["cache"]), "TMPDIR": str(places["tmp"]),
                        "JAVA_HOME": str(tmp_path / f"java {ODD}"), "LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}
    table, script = tmp_path / f"table {ODD}", places["repository"] / BRONZE
    run = run_script(script, "--input", places["input"], "--table", table, "--checkpoint", tmp_path / f"checkpoint {ODD}",
                     "--readings", readings, "--once", env=env)
    assert (run.returncode, run.stderr) == (0, "")
    assert "1 rows in, 1 accepted" in run.stdout
    del env["PYTHONIOENCODING"]
    shown = run_script(places["repository"] / "read_bronze.py", "--table", table, env=env, encoding="utf-8")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "größe é.json" in shown.stdout and f"1 rows in {table}\n" in shown.stdout
    assert list(places["tmp"].iterdir()) == []


@pytest.mark.parametrize("environment, words", [
    ({"HOME": "/proc"}, ["The folder /proc/.ivy2 for Spark's jars can't be made", "export PIPELINE_CACHE="]),
    ({"PIPELINE_CACHE": "/dev/null"}, ["The folder /dev/null for Spark's jars can't be made", "export PIPELINE_CACHE="]),
    ({"PIPELINE_CACHE": "/tmp/a:b"}, ['has a ":" in its path', "export PIPELINE_CACHE="]),
], ids=["home", "file", "colon"])
def test_a_place_that_cannot_hold_the_jars_is_said_with_the_way_out(environment, words):
    run = run_script("read_silver.py", env=os.environ | environment)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


@pytest.mark.parametrize("script, option", [(BRONZE, "--table"), (CONSUMER, "--table"), ("read_silver.py", "--table"),
                                            ("read_delta.py", None)])
@pytest.mark.parametrize("value, complaint", [("a`b", 'has a "`"'), ("a\udcff", "is not in UTF-8"), ("", "it is empty")],
                         ids=["backtick", "no UTF-8", "empty"])
def test_a_path_that_cannot_be_is_refused_at_the_start(script, option, value, complaint):
    run = run_script(script, *filter(None, [option]), value)
    assert run.returncode == 2 and complaint in run.stderr and "Traceback" not in run.stderr


def test_old_files_and_files_of_the_future_are_read(ingest):
    folder, run = ingest
    put(folder, "first.json", VALID)
    assert run() == (1, 0)
    for name, days in (("restored from a backup.json", -60), ("of a clock that is ahead.json", 200), ("of today.json", 0)):
        put(folder, name, VALID)
        moment = time.time() + days * 86_400
        os.utime(folder / name, (moment, moment))
        assert run() == (1, 0), name


def test_no_configuration_of_spark_makes_it_drop_what_it_cannot_read(spark, tmp_path):
    folder, conf = tmp_path / "input", tmp_path / "conf"
    folder.mkdir()
    conf.mkdir()
    (conf / "spark-defaults.conf").write_text("spark.sql.files.ignoreCorruptFiles true\nspark.sql.files.ignoreMissingFiles true\n")
    (folder / "half.json.gz").write_bytes(gzip.compress(b"\n".join(reading(value=n / 100) for n in range(3000)))[:-500])
    run = run_script(BRONZE, "--input", folder, "--table", tmp_path / "t", "--checkpoint", tmp_path / "c", "--once",
                     env=os.environ | {"SPARK_CONF_DIR": str(conf)})
    assert run.returncode == 0 and "half.json.gz can't be read" in run.stderr
    assert "1 rows in, 0 accepted, 1 rejected (unreadable_file 1)" in run.stdout


@pytest.mark.parametrize("place", ["a table of something else", "a folder with files"])
def test_what_is_at_the_table_and_not_of_this_pipeline_is_left_alone(spark, ingest, tmp_path, place):
    _, run = ingest
    table = tmp_path / "bronze"
    if place == "a folder with files":
        table.mkdir()
        (table / "thesis.pdf").touch()
    else:
        spark.range(3).write.format("delta").save(str(table))
    before = sorted(table.rglob("*"))
    for _ in range(2):
        with pytest.raises(PipelineError, match="There is something at .*bronze that no stream of this pipeline has made"):
            run()
    assert sorted(table.rglob("*")) == before


@pytest.mark.parametrize("table, checkpoint", [("t", "t"), ("t", "t/checkpoint"), ("t", "t_quarantine/checkpoint")])
def test_a_checkpoint_that_a_clean_up_of_the_table_would_delete_is_refused(tmp_path, table, checkpoint):
    run = run_script(BRONZE, "--table", tmp_path / table, "--checkpoint", tmp_path / checkpoint, "--once")
    assert run.returncode == 1 and "must not be in the table" in run.stderr and run.stderr.count("\n") == 1, run.stderr


@pytest.mark.parametrize("name", ["sénsor", "a b", "", ".", "x" * 250])
def test_a_topic_that_cannot_be_is_refused_at_the_start(name):
    run = run_script(PRODUCER, "--topic", name, "--create-topic")
    assert run.returncode == 2 and "is no name of a topic" in run.stderr


@pytest.mark.parametrize("servers", ["localhost", "localhost:kafka", "localhost:99999", "localhost:9092,other", "::1:9092"])
def test_an_address_that_cannot_be_is_said(servers):
    run = run_script(PRODUCER, "--bootstrap-servers", servers)
    assert run.returncode == 1 and "is no address of a Kafka broker, which is HOST:PORT" in run.stderr


def test_a_file_of_properties_may_come_from_windows(broker, silver, tmp_path):
    (tmp_path / "kafka.properties").write_bytes(f"bootstrap.servers={broker}\r\nretries=3\r\n".encode("utf-8-sig"))
    run = run_script(PRODUCER, *silver[0][2:], "--kafka-config", tmp_path / "kafka.properties", "--create-topic", "--count", 1)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_script_runs_without_its_standard_streams(closed, ingest, tmp_path):
    folder, ingest_all = ingest
    put(folder, "1.json", VALID)
    ingest_all()
    read = f"exec {sys.executable} {REPOSITORY}/read_bronze.py --table {tmp_path}/bronze {closed}"
    run = subprocess.run(["bash", "-c", read], capture_output=True, text=True, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, "") and ("1 rows in" in run.stdout) == (" >&-" not in f" {closed}")


def test_a_terminal_that_is_closed_stops_the_scripts_and_nohup_keeps_them(tmp_path):
    [port, other] = free_ports(2)
    stopped = Script("local_kafka.py", "--port", port, "--data-dir", tmp_path / "stopped")
    kept = Script("local_kafka.py", "--port", other, "--data-dir", tmp_path / "kept", interpreter=("nohup", sys.executable, "-u"))
    for script in (stopped, kept):
        script.wait_for("Kafka is ready")
        script.process.send_signal(signal.SIGHUP)
    assert stopped.wait() == 0 and "have stopped" in stopped.output
    assert kept.process.poll() is None and kept.stop() == 0
    assert [process for process in psutil.process_iter(["cmdline"])
            if str(tmp_path) in " ".join(process.info["cmdline"] or [])] == []


def test_topic_producer_and_consumer_start_in_every_order(spark, broker, silver, start, account):
    topic, options = silver
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")  # before the topic
    consumer.wait_for("No topic")
    assert run_script(PRODUCER, *topic, "--create-topic", "--count", 0).returncode == 0
    consumer.wait_for("Writing to")  # before the first message
    while not Path(options[-1], "commits", "0").exists():
        assert consumer.process.poll() is None, consumer.output
        time.sleep(0.1)
    consumer.stop(signal.SIGKILL)
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("Writing to")
    assert run_script(PRODUCER, *topic, "--count", 20, "--rate", 0, "--invalid-fraction", 0.5).returncode == 0
    consumer.wait_for(" rows in")
    assert consumer.stop() == 0 and "Traceback" not in consumer.output
    assert run_script(CONSUMER, *options, "--once").returncode == 0
    in_topic, *arrived = origins(spark, broker, options)
    account("a consumer before the topic and before the first message, killed in between", in_topic, *arrived)
    assert len(in_topic) == 20 and sum(table.count() for table in tables(spark, options)) == 20


@pytest.mark.parametrize("moment", [0.3, 1, 2, 3.5, 6, 12])
def test_every_script_stops_at_any_moment_and_leaves_nothing_behind(broker, silver, tmp_path, moment):
    """All of them at once, each with another signal and number of key presses at each moment."""
    mark, (topic, options) = uuid.uuid4().hex, silver
    env = os.environ | {"MARK": mark}
    [port] = free_ports(1)
    commands = [
        [BRONZE, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "bronze_checkpoint"],
        [CONSUMER, *options],
        ["read_silver.py", "--table", tmp_path / "none"],
        ["read_delta.py", "--lake", tmp_path],
        [PRODUCER, *topic, "--create-topic"],
        ["local_kafka.py", "--port", port, "--data-dir", tmp_path / "kafka"],
    ]
    scripts = [Script(*command, env=env) for command in commands]
    time.sleep(moment)
    for number, script in enumerate(scripts):
        stop_signal = (signal.SIGINT, signal.SIGTERM)[(number + int(moment)) % 2]
        for _ in range(1 + (number + int(moment * 2)) % 2):
            if script.process.poll() is None:
                # As a terminal or a service manager does, to all processes of the script.
                (os.killpg if number % 3 else os.kill)(script.process.pid, stop_signal)
            time.sleep(0.05)
    for script in scripts:
        code = script.wait()
        assert code == 0 or code == 1 and "error: No " in script.output, (script.process.args, code, script.output)
        assert "Traceback" not in script.output and "ignored" not in script.output, script.output
    left = [process.cmdline() for process in psutil.process_iter() if process.pid != os.getpid() and is_marked(process, mark)]
    assert left == []


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("MARK") == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
