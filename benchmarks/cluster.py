"""The pipeline on a Spark cluster: two workers, the lake in a bucket, and a worker killed while each stream works.

Starts an S3 server, a Kafka broker, a standalone master and two workers on free ports of this machine. Each worker has
one core and is pinned to it. Runs the commands of docs/cluster.md with its settings: both streams, whose second worker
is killed with kill -9 and restarted, and all readers. Checks with a reader that does not use Spark that every record is
in a table or its quarantine, exactly once. Then measures the Kafka stream on two workers and on one. If a record is
missing or duplicated, or something does not work, ends with exit code 1 and a message.

    python3 -m benchmarks.cluster
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.paths import REPOSITORY, quarantine_of
from pipeline.terminal.arguments import argument_parser, at_least
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say
from pipeline.terminal.script import run

import boto3
from deltalake import DeltaTable
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from local_kafka import free_ports, is_free

PAGE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
BRONZE, CONSUMER = "streaming_files_to_delta_bronze.py", "spark_kafka_consumer.py"
FILES, LINES, MESSAGES = 12, 5_000, 120_000  # to be read while a worker is killed
BATCHES = 2  # of the backlog, each of a stream's usual size; the first is a warm-up and does not count
PATIENCE = 900  # seconds until a step counts as hung, far more than any step takes


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--backlog",
        type=at_least(10_000),
        default=2_000_000,
        metavar="N",
        help="messages that the throughput is measured with",
    )
    options = parser.parse_args()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "sensors",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start_servers()
            account = {"files -> Bronze": read_files(cluster), "Kafka -> Silver": read_messages(cluster)}
            run_readers(cluster, account)
            rates = measure(cluster, options.backlog)
        finally:
            for name in reversed(list(cluster.processes)):  # the scripts first, the S3 server last
                cluster.stop(name)
    say(f"\n{'stream':<20}" + "".join(f"{name:>12}" for name in ("sent", "table", "quarantine", "missing", "twice")))
    for stream, counts in account.items():
        say(f"{stream:<20}" + "".join(f"{count:>12,}" for count in counts))
    say(
        f"\nKafka -> Silver: {rates[2]:,.0f} rows/s on two workers, {rates[1]:,.0f} on one: "
        f"{rates[2] / rates[1]:.2f} times as many."
    )
    if any(missing or twice for *_, missing, twice in account.values()):
        raise PipelineError("Records are missing or duplicated; see the table above.")


class Cluster:
    """The servers and the scripts as processes. Each has its own process group, and its log in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.s3_port, self.kafka_port, self.master_port = free_ports(3)
        self.s3, self.master = f"http://127.0.0.1:{self.s3_port}", f"spark://127.0.0.1:{self.master_port}"
        self.broker = f"localhost:{self.kafka_port}"
        settings = re.search(r"^spark\.master .*?(?=^```)", PAGE, re.MULTILINE | re.DOTALL)[0]
        self.settings = folder / "cluster.conf"
        self.settings.write_text(
            settings.replace("spark://127.0.0.1:7077", self.master).replace("http://127.0.0.1:9000", self.s3)
        )

    def start_servers(self) -> None:
        self.start("s3", "moto_server", "-H", "127.0.0.1", "-p", self.s3_port)
        self.start("kafka", "python3", "local_kafka.py", "--port", self.kafka_port, "--data-dir", self.folder / "kafka")
        self.start(
            "master",
            "spark-class",
            "org.apache.spark.deploy.master.Master",
            "--host",
            "127.0.0.1",
            "--port",
            self.master_port,
            "--webui-port",
            0,
            "--properties-file",
            self.settings,
        )
        for name, port in (("s3", self.s3_port), ("kafka", self.kafka_port), ("master", self.master_port)):
            while is_free(port):
                if self.processes[name].poll() is not None:
                    raise PipelineError(f"{name} did not start: {self.log(name).read_text()[-500:]}")
                time.sleep(0.5)
        self.bucket = boto3.resource("s3", "us-east-1", endpoint_url=self.s3).create_bucket(Bucket="lake")
        self.start_worker(1)
        self.start_worker(2)

    def start_worker(self, number: int) -> None:
        name = f"worker {number}"
        self.start(
            name,
            "taskset",
            "-c",
            number - 1,
            "spark-class",
            "org.apache.spark.deploy.worker.Worker",
            "--host",
            "127.0.0.1",
            "--webui-port",
            0,
            "--cores",
            1,
            "--memory",
            "2g",
            "--work-dir",
            self.folder / f"{name} files",
            "--properties-file",
            self.settings,
            self.master,
        )

    def start(self, name: str, *command, **options) -> subprocess.Popen:
        with self.log(name).open("w") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                cwd=REPOSITORY,
                start_new_session=True,
                **{"stdout": log, "stderr": log} | options,
            )
        return self.processes[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def stop(self, name: str, stop_signal: signal.Signals = signal.SIGTERM) -> None:
        """Stops a process and its children, such as a worker's executor; kills whatever does not stop."""
        process = self.processes.pop(name)
        for group_signal in (stop_signal, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, group_signal)
                process.wait(60)

    def run(self, name: str, *command, see: Callable[[str], None] = say) -> str:
        """Returns the output of a command, calling `see` with each line. Raises PipelineError if it fails."""
        process = self.start(name, "timeout", PATIENCE, *command, stdout=subprocess.PIPE, text=True)
        output = ""
        for line in process.stdout:
            output += line
            see(line.rstrip())
        if code := process.wait():
            errors = re.findall(r"^error: (.*)", self.log(name).read_text(), re.MULTILINE)
            raise PipelineError(f"{name} exited with code {code}: {' '.join(errors) or 'it gives no reason'}")
        return output

    def produce(self, topic: str, partitions: int, count: int) -> None:
        """Sends `count` messages to a new topic, a twentieth of them invalid."""
        with KafkaAdminClient(bootstrap_servers=self.broker) as admin:
            admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}})
        self.run(
            "producer",
            "python3",
            "kafka_producer.py",
            "--bootstrap-servers",
            self.broker,
            "--topic",
            topic,
            "--rate",
            0,
            "--count",
            count,
            "--invalid-fraction",
            0.05,
            see=lambda line: None,
        )

    def documented_line(self, script: str) -> list[str]:
        """The command that docs/cluster.md gives for a script, with the settings of this cluster."""
        [line] = re.findall(rf"^spark-submit --properties-file cluster.conf {script}.*", PAGE, re.MULTILINE)
        return [str(self.settings) if word == "cluster.conf" else word for word in shlex.split(line)]


def read_files(cluster: Cluster) -> tuple[int, ...]:
    """Puts files into the bucket, reads them into Bronze, and returns the counts of their lines."""
    files = [f"2026-11-20T08:{number:02}:00Z.json" for number in range(FILES)]  # named as gateways name them
    for file in files:
        # 101 % is out of range.
        lines = [
            {
                "timestamp": "2026-11-20T08:00:00Z",
                "device_id": f"line-{line}",
                "building": "A",
                "type": "humidity",
                "value": 43.5 if line % 20 else 101,
                "unit": "%",
            }
            for line in range(LINES)
        ]
        cluster.bucket.put_object(Key=f"input/{file}", Body="\n".join(map(json.dumps, lines)).encode())
    table = run_with_a_kill(cluster, BRONZE, "--max-files-per-trigger", 2)
    sent = {(f"s3a://lake/input/{file}", f"line-{line}") for file in files for line in range(LINES)}
    return balance(
        cluster,
        table,
        sent,
        lambda row: (row["source_file"], row.get("device_id") or json.loads(row["raw"])["device_id"]),
    )


def read_messages(cluster: Cluster) -> tuple[int, ...]:
    """Sends messages to Kafka, reads them into Silver, and returns the counts of their offsets."""
    cluster.produce("sensor_data", 3, MESSAGES)
    table = run_with_a_kill(
        cluster, CONSUMER, "--bootstrap-servers", cluster.broker, "--max-offsets-per-trigger", MESSAGES // 6
    )
    with KafkaConsumer(bootstrap_servers=cluster.broker) as consumer:
        ends = consumer.end_offsets([TopicPartition("sensor_data", partition) for partition in range(3)])
    sent = {(place.topic, place.partition, offset) for place, end in ends.items() for offset in range(end)}
    return balance(cluster, table, sent, lambda row: (row["topic"], row["partition"], row["offset"]))


def run_with_a_kill(cluster: Cluster, script: str, *options) -> str:
    """Runs a stream until it has read everything, and kills the second worker in its third batch. Returns its table."""

    def kill_once(line: str) -> None:
        say(line)
        if line.startswith("batch 1:"):
            cluster.stop("worker 2", signal.SIGKILL)
            cluster.start_worker(2)
            say("Worker 2 was killed and started again.")

    command = cluster.documented_line(script)
    cluster.run(script, *command, "--once", *options, see=kill_once)
    if "Lost executor" not in cluster.log(script).read_text():
        raise PipelineError(f"{script} did not notice that the worker was killed: it did no work there.")
    return command[command.index("--table") + 1]


def balance(cluster: Cluster, table: str, sent: set, origin: Callable[[dict], tuple]) -> tuple[int, ...]:
    """Counts the records: sent, in the table, in the quarantine, missing, and duplicated or unknown."""
    store = {"AWS_ENDPOINT_URL": cluster.s3, "AWS_ALLOW_HTTP": "true"}
    accepted, rejected = (
        [
            origin(row)
            for row in DeltaTable(path.replace("s3a:", "s3:"), storage_options=store).to_pyarrow_table().to_pylist()
        ]
        for path in (table, quarantine_of(table))
    )
    arrived = Counter(accepted + rejected)
    return (
        len(sent),
        len(accepted),
        len(rejected),
        len(sent - arrived.keys()),
        sum(times > 1 for times in arrived.values()) + len(arrived.keys() - sent),
    )


def run_readers(cluster: Cluster, account: dict[str, tuple[int, ...]]) -> None:
    """Runs the reader commands of docs/cluster.md. The row counts that they print must match the `account`."""
    bronze, silver = (counts[1:3] for counts in account.values())
    for line, expected in {
        "read_bronze.py": bronze,
        "read_silver.py": silver,
        "read_delta.py --lake": bronze + silver,
        "read_delta.py .* --history": (),
        "read_delta.py .* --version": (),
    }.items():
        command = cluster.documented_line(line)
        say(f"\n{' '.join(command[3:])}")
        output = cluster.run("reader", *command).replace(",", "")
        if missing := [rows for rows in expected if not re.search(rf"\b{rows}\b", output)]:
            raise PipelineError(f"{' '.join(command[3:])} does not show {missing}, the row counts of its tables.")


def measure(cluster: Cluster, backlog: int) -> dict[int, float]:
    """Rows per second of the Kafka stream by number of workers, computed from the times in its own output."""
    cluster.produce("backlog", 4, backlog)  # four partitions, so that two workers get the same share
    batch = backlog // BATCHES + 100  # spare: Spark rounds down per partition, which would leave a few for another
    rates = {}
    for workers in (2, 1):
        say(f"Reading a backlog of {backlog:,} messages with {workers} worker{'s' * (workers > 1)}:")
        output = cluster.run(
            CONSUMER,
            *cluster.documented_line(CONSUMER),
            "--once",
            "--bootstrap-servers",
            cluster.broker,
            "--topic",
            "backlog",
            "--max-offsets-per-trigger",
            batch,
            "--table",
            f"s3a://lake/by_{workers}",
            "--checkpoint",
            f"s3a://lake/checkpoint_{workers}",
        )
        warm = re.findall(r"^batch \d+: ([\d,]+) rows in.*, ([\d.]+) s, ", output, re.MULTILINE)[1:]
        rates[workers] = sum(int(rows.replace(",", "")) for rows, _ in warm) / sum(float(took) for _, took in warm)
        if workers == 2:
            cluster.stop("worker 2")
    return rates


if __name__ == "__main__":
    run(main)
