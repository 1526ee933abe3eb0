"""The whole pipeline in one command, without Docker where there is none.

    kafka_producer.py ──> input/sensor_data/*.json ──> streaming_files_to_delta_bronze.py ──> lake/bronze/sensor_data
    kafka_producer.py ──> Kafka ──> spark_kafka_consumer.py ────────────────────────────────> lake/silver/sensor_data

It uses the Kafka that answers on localhost:9092 (--port); where none does, it starts local_kafka.py. It makes the topic if
it is missing, starts both streams and two simulators, one for the folder and one for Kafka, and marks each line they print with the
script's name. Ctrl+C, or the end of --duration, stops what it started, in order, and shows the newest rows of both tables. When a
part dies, it says which, stops the others and ends with exit code 1.

    python3 run_pipeline.py
    python3 run_pipeline.py --duration 120 --rate 50 --invalid-fraction 0.1
"""

import common.process  # isort: skip  # before all else: a Ctrl+C during the other imports is clean, too

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

from common.class_archive import use_archive
from common.console import PipelineError, argument_parser, at_least, fraction, port_number, run, say
from common.java import DELTA, KAFKA_SOURCE, find_java, spark_jars
from common.process import REPOSITORY, Interrupt, StopFlag, on_stop_signal
from common.tables import BRONZE, SILVER
from common.topics import Topic
from local_kafka import answers

STOP_SECONDS = 120  # what a stream may need to finish its batch


def main() -> None:
    options = parse_options()
    use_archive(find_java(), spark_jars(DELTA, KAFKA_SOURCE))  # once, before both streams need them at the same time
    stopping = StopFlag()
    on_stop_signal(stopping.set)

    parts = []
    try:
        if not answers(options.port):
            parts.append(Part("local_kafka.py", "--port", str(options.port)))
            while not answers(options.port) and not stopping.is_set():
                require_alive(parts)
                stopping.wait(0.5)
        if not stopping.is_set():
            broker = f"localhost:{options.port}"
            Topic(broker).wait(seconds=30, create=True)
            parts.append(Part("streaming_files_to_delta_bronze.py"))
            parts.append(Part("spark_kafka_consumer.py", "--bootstrap-servers", broker))
            readings = ("--rate", str(options.rate), "--invalid-fraction", str(options.invalid_fraction))
            parts.append(Part("kafka_producer.py", "--to-folder", str(REPOSITORY / "input" / "sensor_data"), *readings))
            parts.append(Part("kafka_producer.py", "--bootstrap-servers", broker, *readings))
        end = time.monotonic() + (options.duration or float("inf"))
        while not stopping.wait(0.5) and time.monotonic() < end:
            require_alive(parts)
    finally:
        say("Stopping …")
        for part in reversed(parts):  # the producer first, Kafka last
            part.stop()
    on_stop_signal(Interrupt())
    for script, table in (("read_bronze.py", BRONZE), ("read_silver.py", SILVER)):
        if os.path.exists(table):  # not where it was stopped before the first batch
            say(f"\n{script}")
            reader = subprocess.Popen([sys.executable, REPOSITORY / script])
            try:
                reader.wait()
            finally:
                reader.terminate()
                reader.wait()


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--duration", type=at_least(1, float), metavar="SECONDS", help="stop by itself after so long")
    parser.add_argument("--rate", type=at_least(0, float), default=1, metavar="PER_SECOND",
                        help="messages per second of the producer")
    parser.add_argument("--invalid-fraction", type=fraction, default=0, metavar="F",
                        help="share of the producer's messages that break a rule")
    parser.add_argument("--port", type=port_number, default=9092, help="port of this machine that Kafka listens on")
    return parser.parse_args()


class Part:
    """A script of the pipeline as a process of its own, each line of its output marked with its name."""

    def __init__(self, script: str, *arguments: str):
        self.script = script
        # A session of its own, so that Ctrl+C in the terminal reaches this script alone, which stops them in order.
        self.process = subprocess.Popen([sys.executable, "-u", REPOSITORY / script, *arguments], stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        self.printer = threading.Thread(target=self._print_lines, daemon=True)
        self.printer.start()

    def _print_lines(self) -> None:
        for line in self.process.stdout or ():
            say(f"{self.script:<35}| {line.rstrip()}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)  # which in its first moments, unlike SIGINT, says nothing
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            say(f"{self.script} did not stop within {STOP_SECONDS} s and is killed; its next start goes on from there.")
            self.process.kill()
        self.printer.join(timeout=5)


def require_alive(parts: list[Part]) -> None:
    for part in parts:
        if part.process.poll() is not None:
            part.printer.join(timeout=5)
            raise PipelineError(f"{part.script} has ended with exit code {part.process.returncode}; what it said stands "
                                f"above. The other parts are stopped.")


if __name__ == "__main__":
    run(main)
