"""run_pipeline.py in a copy of the repository, as after a fresh clone."""

import os
import re
import shutil
import signal
import subprocess
import time
from urllib.request import urlopen

from pipeline.kafka.brokers import answers
from pipeline.terminal.ports import free_ports

import psutil
import pytest
from kafka import KafkaConsumer

from helpers.processes import REPOSITORY, Script, on_terminal
from run_pipeline import per_second


@pytest.fixture
def clone(tmp_path):
    """A copy of all files that are in git or would be added: no data from earlier runs."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.splitlines()
    for file in files:
        target = tmp_path / "clone" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / file, target)
    return tmp_path / "clone"


def processes_of(text: str) -> list[int]:
    """The ids of the processes with `text` in their command line."""
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if text in " ".join(process.info["cmdline"] or [])
    ]


def test_lines_that_come_together_make_no_rate_that_nothing_has():
    assert per_second([(0, 0), (0.01, 5000), (0.011, 10_000)]) == 10_000
    assert per_second([(0, 500), (8, 2500), (10, 2500)]) == 200


def test_one_command_runs_everything_and_ctrl_c_stops_all_of_it(clone):
    [port] = free_ports(1)
    pipeline = Script("run_pipeline.py", "--port", port, "--rate", 20, "--invalid-fraction", 0.2, folder=clone)
    try:
        pipeline.wait_for("local_kafka.py                     | Kafka is ready")
        pipeline.wait_for("streaming_files_to_delta_bronze.py | batch 1: ")
        pipeline.wait_for("spark_kafka_consumer.py            | batch", times=2)
        [page] = re.findall(r"^dashboard.py +\| (http://127.0.0.1:\d+) ", pipeline.output, re.MULTILINE)
        assert "<title>" in urlopen(page).read().decode()
        assert pipeline.stop(signal.SIGINT) == 0, pipeline.output
    finally:
        pipeline.process.kill()
    assert "Traceback" not in pipeline.output and "error" not in pipeline.output
    stopped = [
        line.split("|")[0].strip()
        for line in pipeline.lines[pipeline.lines.index("Stopping …\n") :]
        if "acknowledged." in line or " written." in line or "topped" in line
    ]
    assert stopped == [
        "kafka_producer.py",
        "kafka_producer.py --to-folder",
        "spark_kafka_consumer.py",
        "streaming_files_to_delta_bronze.py",
        "local_kafka.py",
    ]
    [accepted] = re.findall(rf"^([\d,]+) rows in {clone}/lake/bronze/sensor_data$", pipeline.output, re.MULTILINE)
    assert int(accepted.replace(",", "")) > 18  # more than those of the samples
    assert f" rows in {clone}/lake/silver/sensor_data_quarantine\n" in pipeline.output
    assert processes_of(str(clone)) == [] and not answers(port)


@pytest.mark.long
def test_a_terminal_shows_the_parts_in_place(clone):
    def stop_after_a_batch(text: str, process: subprocess.Popen) -> None:
        if re.search(r"spark_kafka_consumer.py +running +[\d.,]+ +\d+ ", text) and re.search(
            r"bronze.py +running +[\d.,]+", text
        ):
            process.send_signal(signal.SIGINT)

    (clone / "input" / "sensor_data" / "broken.json.gz").write_bytes(b"no gzip")
    output = on_terminal(160, "run_pipeline.py", "--port", free_ports(1)[0], folder=clone, watch=stop_after_a_batch)
    assert "part" in output and "rows/s" in output and "local_kafka.py                     |" not in output
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") and "Traceback" not in output and "rows in" in output
    assert re.search(
        r"bronze.py \| .*broken.json.gz .*unreadable_file", output[output.index("Stopping …") :], re.DOTALL
    ), output


@pytest.mark.parametrize("moment, presses", [(1, 1), (5, 2), (14, 1)])
def test_it_stops_at_any_moment_and_leaves_nothing_behind(clone, moment, presses):
    pipeline = Script("run_pipeline.py", "--port", free_ports(1)[0], folder=clone)
    time.sleep(moment)
    for press in range(presses):
        time.sleep(press * 0.05)
        pipeline.process.send_signal((signal.SIGTERM, signal.SIGINT)[press])
    assert pipeline.wait() == 0 or moment == 1 and pipeline.process.returncode == 143, pipeline.output
    assert "Traceback" not in pipeline.output and "error" not in pipeline.output, pipeline.output
    assert processes_of(str(clone)) == []


def test_when_a_part_dies_the_others_are_stopped_and_a_broker_that_was_there_is_left_alone(clone, broker):
    pipeline = Script("run_pipeline.py", "--port", broker.split(":")[1], "--duration", 600, folder=clone)
    try:
        pipeline.wait_for("spark_kafka_consumer.py            | batch")
        [consumer] = processes_of(f"{clone}/spark_kafka_consumer.py")
        os.kill(consumer, signal.SIGKILL)
        assert pipeline.wait() == 1
    finally:
        pipeline.process.kill()
    assert "error: spark_kafka_consumer.py exited with code -9" in pipeline.output
    assert "Traceback" not in pipeline.output and "local_kafka.py" not in pipeline.output
    assert processes_of(str(clone)) == []
    with KafkaConsumer(bootstrap_servers=broker) as consumer:
        assert "sensor_data" in consumer.topics()
