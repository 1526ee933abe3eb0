"""A disk that is full, and one that may not be written to."""

import os
import subprocess

import pytest
from conftest import origins, run_script

CONSUMER, PRODUCER = "spark_kafka_consumer.py", "kafka_producer.py"


@pytest.fixture
def disk(tmp_path):
    """A small file system, and a function that mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


def stopped(command: list) -> str:
    run = run_script(*command)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_a_full_and_a_closed_disk_stop_the_job_with_a_message_and_all_is_there_afterwards(
        spark, broker, silver, disk, account):
    (_, _, _, topic), _ = silver
    folder, remount = disk
    options = [*silver[0], "--table", folder / "silver", "--checkpoint", folder / "checkpoint"]
    command = [CONSUMER, *options, "--once", "--max-offsets-per-trigger", 20_000]
    send = [PRODUCER, *silver[0], "--create-topic", "--rate", 0, "--invalid-fraction", 0.05, "--count"]
    run_script(*send, 20_000)

    remount("ro")
    assert f"The checkpoint {folder}/checkpoint can't be made: Read-only file system" in stopped(command)
    remount("rw")
    assert run_script(*command).returncode == 0
    run_script(*send, 60_000)
    remount("ro")
    assert str(folder) in stopped(command)
    remount("rw")

    filler = folder / "filler"
    filler.write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - 600_000))
    for _ in range(2):
        complaint = stopped(command)
        assert f"There is no space left for {folder}/" in complaint and "Nothing is lost" in complaint
    filler.unlink()
    remount("size=100m")
    run = run_script(*command)
    assert (run.returncode, run.stderr) == (0, "")
    account("a disk that is full, twice", *origins(spark, broker, options))
