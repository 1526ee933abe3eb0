"""A full disk, and files and folders without permissions."""

import os
import subprocess

import pytest

from helpers.files import put
from helpers.processes import acknowledged, run_script
from helpers.records import reading
from helpers.topics import origins

CONSUMER, PRODUCER = "spark_kafka_consumer.py", "kafka_producer.py"


@pytest.fixture
def disk(tmp_path):
    """A small file system, and a function that remounts it with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder, lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    subprocess.run(["umount", folder], check=True)


# Root may read and write everywhere unless it drops these capabilities.
AS_ANYONE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]


def stopped(command: list, prefix: list | None = None) -> str:
    """Runs a script that has to stop with an error, and returns its message."""
    run = run_script(*command, prefix=(AS_ANYONE if os.geteuid() == 0 else []) if prefix is None else prefix)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_a_folder_of_the_input_that_may_not_be_read_is_named(tmp_path):
    closed = tmp_path / "input" / "lost+found"
    closed.mkdir(parents=True)
    closed.chmod(0)
    said = stopped(
        [
            "streaming_files_to_delta_bronze.py",
            "--input",
            closed.parent,
            "--table",
            tmp_path / "t",
            "--checkpoint",
            tmp_path / "c",
            "--once",
        ]
    )
    assert f"This user may not read the folder {closed}. Give the user permission" in said
    closed.chmod(0o700)


@pytest.mark.parametrize("name", ["one.json", "packed.json.gz"])
@pytest.mark.parametrize("fault, said", [("Permission denied", "Permission denied"), ("EIO", "Input/output error")])
def test_a_file_that_may_not_or_cannot_be_read_is_condemned_for_nothing_and_read_later(
    spark, tmp_path, name, fault, said, run_here
):
    folder, table = tmp_path / "input", tmp_path / "t"
    folder.mkdir()
    options = [
        "streaming_files_to_delta_bronze.py",
        "--input",
        folder,
        "--table",
        table,
        "--checkpoint",
        tmp_path / "c",
        "--once",
    ]
    put(folder, name, reading())
    put(folder, "other.json", reading())
    if fault == "EIO":
        prefix = [
            "strace",
            "-f",
            "-qq",
            "--seccomp-bpf",
            "-o",
            "/dev/null",
            "-P",
            folder / name,
            "-e",
            "trace=read,pread64",
            "-e",
            "inject=read,pread64:error=EIO",
        ]
        if subprocess.run(["strace", "-f", "true"], capture_output=True).returncode:
            pytest.skip("needs strace, and the right to use it")
    else:
        (folder / name).chmod(0)
        prefix = AS_ANYONE if os.geteuid() == 0 else []
    error = stopped(options, prefix)
    assert f"{folder}/{name} can't be read at the moment: " in error and said in error and "Nothing is lost" in error, (
        error
    )
    (folder / name).chmod(0o600)
    run = run_here(*options)
    assert (run.returncode, run.stderr) == (0, "") and "2 rows in, 2 accepted" in run.stdout


def test_a_full_and_a_closed_disk_stop_the_job_with_a_message_and_all_is_there_afterwards(
    spark, broker, silver, disk, produce, account
):
    folder, remount = disk
    options = [*silver[0], "--table", folder / "silver", "--checkpoint", folder / "checkpoint"]
    command = [CONSUMER, *options, "--once", "--max-offsets-per-trigger", 20_000]
    send = [PRODUCER, *silver[0], "--create-topic", "--rate", 0, "--invalid-fraction", 0.05, "--count"]
    run_script(*send, 20_000)
    producer = produce(silver[0])

    folder.chmod(0o555)
    assert f"{folder}/.checkpoint.lock, the lock of the checkpoint, can't be written: Permission denied" in stopped(
        command
    )
    folder.chmod(0o755)
    assert run_script(*command).returncode == 0
    run_script(*send, 60_000)
    (folder / "silver").chmod(0o555)
    assert f"This user may not write to {folder}/silver (" in stopped(command)
    (folder / "silver").chmod(0o755)

    filler = folder / "filler"
    filler.write_bytes(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize - 600_000))
    for _ in range(2):
        complaint = stopped(command)
        assert f"There is no space left for {folder}/" in complaint and "Nothing is lost" in complaint
    filler.unlink()
    remount("size=100m")
    delivered = acknowledged(producer)
    run = run_script(*command)
    assert (run.returncode, run.stderr) == (0, "")
    in_topic, *arrived = origins(spark, broker, options)
    account("a full disk, twice", in_topic, *arrived)
    assert len(in_topic) == 80_000 + delivered
