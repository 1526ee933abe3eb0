"""The ZooKeeper and Kafka of docker-compose.yml without Docker, on this machine alone.

All KAFKA_… and ZOOKEEPER_… settings come from docker-compose.yml, and so does the version (Confluent 7.9 is Kafka 3.9).
The first start downloads Kafka with the Ivy that comes with pyspark; only Java is required. The script says when Kafka is
ready, and restarts a server that has died. Ctrl+C stops Kafka, then ZooKeeper. Topics and messages are kept in --data-dir
for the next start. A second broker needs a --port and a --data-dir of its own.

    python3 local_kafka.py
    python3 local_kafka.py --port 9093 --data-dir ~/kafka-9093
"""

import argparse
import fcntl
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

from pipeline.kafka.brokers import answers
from pipeline.paths import REPOSITORY
from pipeline.spark.java import SCALA, find_java, require_own, resolve_jars
from pipeline.terminal.arguments import argument_parser, location, port_number
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say
from pipeline.terminal.ports import free_ports, is_free
from pipeline.terminal.script import has_no_end, run
from pipeline.terminal.signals import StopFlag, on_stop_signal

import javaproperties
import yaml

COMPOSE_FILE = REPOSITORY / "docker-compose.yml"
# The Kafka version in Confluent's images:
# https://docs.confluent.io/platform/current/installation/versions-interoperability.html
KAFKA_IN_CONFLUENT = {"7.9": "3.9.2"}
# How the image translates its ZOOKEEPER_… variables.
ZOOKEEPER_PROPERTIES = {
    "CLIENT_PORT": "clientPort",
    "TICK_TIME": "tickTime",
    "ADMIN_ENABLE_SERVER": "admin.enableServer",
    "AUTOPURGE_SNAP_RETAIN_COUNT": "autopurge.snapRetainCount",
    "AUTOPURGE_PURGE_INTERVAL": "autopurge.purgeInterval",
}
# A broker that was killed is turned away until ZooKeeper considers it dead, so it may need several attempts.
MAX_RESTARTS_PER_MINUTE = 8
STOP_SECONDS = 50  # for each of the two servers; run_pipeline.py allows two minutes for both
LOGGING = "org.slf4j:slf4j-simple:1.7.36"  # Kafka comes with slf4j 1.7, but without a logging backend


def main() -> None:
    options = parse_options()
    has_no_end()
    services = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))["services"]
    if "," in options.data_dir:
        raise PipelineError(
            f"Kafka can't use a folder with a comma in its path: choose a --data-dir other than {options.data_dir}."
        )
    os.makedirs(options.data_dir, exist_ok=True)
    require_own(options.data_dir, "--data-dir")
    lock_file = lock_folder(options)
    if not is_free(options.port):
        raise PipelineError(
            f"Port {options.port} is in use, perhaps by a Kafka broker that is already running. "
            f"Stop it, or choose another port with --port, and a --data-dir of its own."
        )
    jars = resolve_jars([f"org.apache.kafka:kafka_{SCALA}:{kafka_version(services['kafka']['image'])}", LOGGING])
    java = [find_java().path, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", os.pathsep.join(jars)]
    [zookeeper_port] = free_ports(1)
    environment = services["zookeeper"]["environment"]
    stopping = StopFlag()
    on_stop_signal(stopping.set)
    with Server(
        "ZooKeeper",
        [*java, "org.apache.zookeeper.server.quorum.QuorumPeerMain"],
        environment,
        zookeeper_properties(environment, zookeeper_port, options.data_dir),
        options.data_dir,
        lock_file,
    ) as zookeeper:
        while is_free(zookeeper_port) and not stopping.wait(0.2):
            zookeeper.keep_running()
        environment = services["kafka"]["environment"]
        properties = kafka_properties(environment, options.port, zookeeper_port, options.data_dir)
        with Server("Kafka", [*java, "kafka.Kafka"], environment, properties, options.data_dir, lock_file) as kafka:
            while not answers(options.port) and not stopping.wait(0.2):
                kafka.keep_running()
            if not stopping.is_set():
                say(
                    f"Kafka is ready on localhost:{options.port}. Its data and logs are in {options.data_dir}. Press Ctrl+C to stop."
                )
            while not stopping.wait(0.5):
                zookeeper.keep_running()
                kafka.keep_running()
    say("Kafka and ZooKeeper have stopped.")


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--port", type=port_number, default=9092, help="local port that Kafka listens on")
    parser.add_argument(
        "--data-dir",
        type=location,
        default=str(REPOSITORY / "kafka-data"),
        help="where topics, messages and logs are kept",
    )
    return parser.parse_args()


def lock_folder(options: argparse.Namespace) -> int:
    """Locks the data folder and returns the file that holds the lock. The servers inherit it, so that they keep the lock even if
    this script is killed. Raises PipelineError if another local Kafka holds it.
    """
    file = os.open(place := Path(options.data_dir, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PipelineError(
            f"The local Kafka on {place.read_text() or 'this machine'} is using {options.data_dir}. Use it, stop it, or "
            f"start a second one with a --port and a --data-dir of its own."
        ) from None
    place.write_text(f"localhost:{options.port}")
    return file


def kafka_version(image: str) -> str:
    """The version of Apache Kafka inside a Confluent image ("confluentinc/cp-kafka:7.9.1")."""
    version = re.search(r":(\d+\.\d+)", image)
    if not version or version[1] not in KAFKA_IN_CONFLUENT:
        raise PipelineError(
            f"{COMPOSE_FILE.name} has the image {image}, but local_kafka.py knows only Confluent "
            f"{', '.join(KAFKA_IN_CONFLUENT)}. Add it to KAFKA_IN_CONFLUENT."
        )
    return KAFKA_IN_CONFLUENT[version[1]]


def zookeeper_properties(environment: dict, port: int, data_dir: str) -> dict[str, object]:
    """ZooKeeper's properties from the service's environment, with this machine's port and folder."""
    settings = {
        name.removeprefix("ZOOKEEPER_"): value for name, value in environment.items() if name.startswith("ZOOKEEPER_")
    }
    if unknown := settings.keys() - ZOOKEEPER_PROPERTIES.keys():
        raise PipelineError(
            f"{COMPOSE_FILE.name} has ZOOKEEPER_{min(unknown)}, which local_kafka.py does not know. Add it to "
            f"ZOOKEEPER_PROPERTIES."
        )
    settings = {ZOOKEEPER_PROPERTIES[name]: value for name, value in settings.items()}
    return settings | {"clientPort": port, "clientPortAddress": "127.0.0.1", "dataDir": f"{data_dir}/zookeeper"}


def kafka_properties(environment: dict, port: int, zookeeper_port: int, data_dir: str) -> dict[str, object]:
    """Kafka's properties from the service's environment, as the image makes them: KAFKA_BROKER_ID is broker.id.

    Host names of containers and 0.0.0.0 become localhost. Port 9092 becomes `port`, and every other port becomes a free one.
    """
    signs = {"_": ".", "__": "_", "___": "-"}
    settings = {
        re.sub("_{1,3}", lambda match: signs[match[0]], name.removeprefix("KAFKA_").lower()): value
        for name, value in environment.items()
        if name.startswith("KAFKA_") and not name.endswith("_OPTS")
    }
    listeners = [name for name in ("listeners", "advertised.listeners") if name in settings]
    others = sorted({found for name in listeners for found in re.findall(r":(\d+)", settings[name])} - {"9092"})
    ports = {"9092": port} | dict(zip(others, free_ports(len(others))))
    for name in listeners:
        settings[name] = re.sub(r"//[^:]*:(\d+)", lambda match: f"//localhost:{ports[match[1]]}", settings[name])
    return settings | {"zookeeper.connect": f"localhost:{zookeeper_port}", "log.dirs": f"{data_dir}/kafka"}


class Server:
    """A Java server, run as a process inside a `with` block, with its properties in DATA_DIR/name.properties and its log in
    DATA_DIR/name.log. It inherits the open `lock_file`.
    """

    def __init__(
        self, name: str, command: list[str], environment: dict, properties: dict, data_dir: str, lock_file: int
    ):
        self.name, self.lock_file = name, lock_file
        self.log = Path(data_dir, f"{name.lower()}.log")
        settings = self.log.with_suffix(".properties")
        settings.write_text(javaproperties.dumps({key: str(value) for key, value in properties.items()}))
        self.command = [command[0], *shlex.split(environment.get("KAFKA_HEAP_OPTS", "")), *command[1:], str(settings)]
        self.ends: list[float] = []  # when the server ended, within the last minute
        self.log_begins = 0  # bytes of the log written by earlier starts
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        with self.log.open("ab") as output:
            self.log_begins = output.tell()
            # A session of its own, so that Ctrl+C in the terminal reaches only this script, which stops the servers in
            # order.
            return subprocess.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[self.lock_file]
            )

    def keep_running(self) -> None:
        """Starts it again if it has ended, as `restart: on-failure` does; PipelineError if it can't stay up."""
        if self.process.poll() is None:
            return
        if self.process.returncode < 0:
            reason = f"it was killed by signal {-self.process.returncode}"
        else:
            lines = self.log.read_bytes()[self.log_begins :].decode(errors="replace").splitlines()
            reason = next((line for line in lines if "ERROR" in line or "xception" in line), "it gave no reason")
        now = time.monotonic()
        self.ends = [moment for moment in self.ends if now - moment < 60]
        if len(self.ends) == MAX_RESTARTS_PER_MINUTE:
            raise PipelineError(f"{self.name} does not stay up: {reason}. Its log is {self.log}.")
        if not self.ends:
            say(f"{self.name} has ended: {reason}. Starting it again …")
        self.ends.append(now)
        self.process = self._start()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"{self.name} did not stop within {STOP_SECONDS} s and was killed.")
            self.process.kill()
            self.process.wait()


if __name__ == "__main__":
    run(main)
