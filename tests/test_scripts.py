"""Each script as the user sees it: manual, options, errors and exit codes."""

import os
import signal
import stat
import subprocess
import sys

from pipeline.paths import BRONZE, SILVER, checkpoint_of
from pipeline.terminal.ports import free_ports

import pytest

from helpers.processes import REPOSITORY, manual, on_terminal, run_script

OPTIONS = {
    "kafka_producer.py": "--bootstrap-servers --topic --kafka-config --wait --rate --count --devices --seed --invalid-fraction "
    "--create-topic --to-folder --readings",
    "spark_kafka_consumer.py": "--bootstrap-servers --topic --kafka-config --wait --table --checkpoint --trigger --once "
    "--max-offsets-per-trigger --accept-data-loss",
    "streaming_files_to_delta_bronze.py": "--input --table --checkpoint --trigger --once --max-files-per-trigger --multiline",
    "read_bronze.py": "--table --limit --rejected --follow --format",
    "read_silver.py": "--table --limit --rejected --follow --format",
    "read_delta.py": "--limit --sort-by --version --timestamp --history",
    "local_kafka.py": "--port --data-dir",
    "run_pipeline.py": "--duration --plain",
    "dashboard.py": "--lake --port --bootstrap-servers --kafka-config",
}


@pytest.mark.parametrize("script", OPTIONS)
def test_help_is_the_manual_and_has_every_option(script):
    docstring = (REPOSITORY / script).read_text(encoding="utf-8").split('"""')[1]
    words = manual(script).split()
    assert docstring.strip() in manual(script)
    assert set(OPTIONS[script].split()) <= {*words, *(word.rstrip(",") for word in words)}


BAD_OPTIONS = [
    ["kafka_producer.py", "--rate", "-1"],
    ["kafka_producer.py", "--rate", "nan"],
    ["kafka_producer.py", "--invalid-fraction", "1.5"],
    ["kafka_producer.py", "--count", "many"],
    ["spark_kafka_consumer.py", "--trigger", "often"],
    ["spark_kafka_consumer.py", "--max-offsets-per-trigger", "0"],
    ["streaming_files_to_delta_bronze.py", "--max-files-per-trigger", "x"],
    ["read_bronze.py", "--limit", "0"],
    ["read_silver.py", "--unknown"],
    ["read_delta.py", "--history"],
    ["read_delta.py", "table", "--version", "1", "--timestamp", "2026-11-20"],
    ["local_kafka.py", "--port", "99999"],
    ["run_pipeline.py", "--duration", "0"],
    ["dashboard.py", "--lake", "s3a://bucket/lake"],
]


@pytest.mark.parametrize("command", BAD_OPTIONS, ids=" ".join)
def test_a_bad_option_ends_with_exit_code_2_and_names_it(command, run_here):
    run = run_here(*command)
    assert run.returncode == 2
    assert f"{command[0]}: error:" in run.stderr and "Traceback" not in run.stderr


def test_a_checkpoint_follows_from_its_table():
    for table, checkpoint in (
        (BRONZE, REPOSITORY / "checkpoints" / "bronze_sensor"),
        (SILVER, REPOSITORY / "checkpoints" / "silver_sensor_data"),
        (REPOSITORY / "lake" / "silver" / "zigbee2mqtt", REPOSITORY / "checkpoints" / "silver_zigbee2mqtt"),
        ("/data/readings", "/data/readings_checkpoint"),
        (REPOSITORY / "lake", REPOSITORY / "lake_checkpoint"),
        ("s3a://bucket/silver/readings/", "s3a://bucket/silver/readings_checkpoint"),
    ):
        assert checkpoint_of(str(table)) == str(checkpoint)


@pytest.mark.parametrize("stop_signal, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_that_is_stopped_before_its_end_says_so(start, tmp_path, stop_signal, code):
    job = start("kafka_producer.py", "--to-folder", tmp_path, "--count", 1000, "--rate", 10)
    job.wait_for("Writing to")
    assert job.stop(stop_signal) == code and " written.\n" in job.output
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
    assert start("kafka_producer.py", "--to-folder", tmp_path, "--count", 1).wait() == 0


def assert_is_one_sentence(run, *words: str) -> None:
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


@pytest.mark.parametrize("script", ["kafka_producer.py", "spark_kafka_consumer.py"])
def test_no_broker_is_said_with_the_way_out(script):
    [port] = free_ports(1)
    run = run_script(script, "--bootstrap-servers", f"localhost:{port}", "--wait", 0)
    assert_is_one_sentence(
        run, f"No Kafka broker answers on localhost:{port}", "docker compose up -d", "local_kafka.py"
    )


def test_a_terminal_sees_how_long_kafka_is_waited_for():
    def stop_soon(text: str, process: subprocess.Popen) -> None:
        if "0:00:01" in text:
            process.send_signal(signal.SIGINT)

    output = on_terminal(
        80, "kafka_producer.py", "--bootstrap-servers", f"localhost:{free_ports(1)[0]}", watch=stop_soon
    )
    assert "docker compose up -d" in output and "Waiting up to 30 s for it" in output.replace("\r\n", " ")
    assert output.rfind("\x1b[?25h") > output.rfind("\x1b[?25l") and "Traceback" not in output


@pytest.mark.parametrize("script", ["kafka_producer.py", "spark_kafka_consumer.py"])
def test_no_topic_is_said_with_the_way_out(script, broker, run_here):
    run = run_here(script, "--bootstrap-servers", broker, "--topic", "nowhere", "--wait", 0)
    assert_is_one_sentence(
        run, 'No topic "nowhere"', "or none that this user may see", f"kafka-python admin -b {broker} topics create"
    )


@pytest.mark.parametrize("script", ["read_bronze.py", "read_silver.py", "read_delta.py"])
def test_no_table_yet_is_said_with_the_way_out(script, tmp_path, run_here):
    arguments = [tmp_path / "none"] if script == "read_delta.py" else ["--table", tmp_path / "none"]
    assert_is_one_sentence(run_here(script, *arguments), f"No Delta table at {tmp_path}/none", "python3 s")


def test_a_port_in_use_is_said_with_the_way_out(broker, tmp_path):
    run = run_script("local_kafka.py", "--port", broker.split(":")[1], "--data-dir", tmp_path)
    assert_is_one_sentence(run, f"Port {broker.split(':')[1]} is in use", "--port")


def java_that_says(folder, modules: str) -> dict[str, str]:
    """An environment with a fake Java that lists these modules."""
    java = folder / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{modules}'\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return os.environ | {"JAVA_HOME": str(folder)}


@pytest.mark.parametrize(
    "modules, complaint",
    [
        ("java.base@11.0.2\njdk.incubator.vector@11.0.2", "is Java 11, but Spark needs Java 17, 21 or 25"),
        ("java.base@18.0.2\njdk.incubator.vector@18.0.2", "is Java 18, but Spark needs Java 17, 21 or 25"),
        ("java.base@25\njdk.incubator.vector@25", "is Java 25, which can corrupt data. Use 25.0.3 or later"),
        (
            "java.base@25.0.2\njdk.incubator.vector@25.0.2",
            "is Java 25.0.2, which can corrupt data. Use 25.0.3 or later",
        ),
        ("java.base@25.0.3\njava.sql@25.0.3", "lacks the module jdk.incubator.vector"),
        ("java.base@17.0.15\njava.sql@17.0.15", "lacks the module jdk.incubator.vector"),
        ("Unrecognized option: --list-modules", "is older than Java 9"),
    ],
)
def test_the_wrong_java_is_said_with_the_way_out(modules, complaint, tmp_path):
    run = run_script("streaming_files_to_delta_bronze.py", "--once", env=java_that_says(tmp_path, modules))
    assert_is_one_sentence(run, complaint)


def test_no_java_is_said_with_the_way_out(tmp_path):
    without_java = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"} | {"PATH": str(tmp_path)}
    assert_is_one_sentence(run_script("read_silver.py", env=without_java), "No Java found", "Install OpenJDK 17")


def test_jars_that_cannot_be_downloaded_are_said_with_the_way_out(tmp_path):
    offline = "-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=1"
    run = run_script("read_silver.py", env=os.environ | {"HOME": str(tmp_path), "JAVA_TOOL_OPTIONS": offline})
    notice, error = run.stderr.splitlines()
    assert run.returncode == 1 and notice.startswith("First start: downloading io.delta:delta-spark")
    assert error.startswith("error: Could not download io.delta:delta-spark") and "proxy" in error


def test_an_output_that_cannot_be_written_is_said(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, REPOSITORY / "kafka_producer.py", "--to-folder", tmp_path, "--count", "1"]
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (
        1,
        "error: The output can't be written: No space left on device. Send it somewhere else, or free up some space.\n",
    )
