"""The scripts in odd places and locales, in minimal environments, and stopped at various moments."""

import argparse
import errno
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from functools import reduce
from pathlib import Path

from pipeline.spark import class_archive, scratch
from pipeline.spark.java import DELTA, KAFKA_SOURCE, cache_folder, find_java, require_known, require_own, spark_jars
from pipeline.streaming.errors import explain
from pipeline.streaming.start import lock_checkpoint, require_separate_places
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports

import psutil
import pytest

from helpers.files import put
from helpers.processes import PATIENCE, REPOSITORY, Script, run_script
from helpers.records import reading

CONSUMER, PRODUCER, BRONZE = "spark_kafka_consumer.py", "kafka_producer.py", "streaming_files_to_delta_bronze.py"
VALID, BROKEN = reading(), b"{"


ODD = "größe é 'q\" $x [a]{b}"


def test_every_place_may_have_blanks_quotes_and_other_letters_in_every_locale(tmp_path, spark):
    """For HOME, the jar folder, TMPDIR, JAVA_HOME, the repository, the input, the table and the checkpoint at once."""
    places = {name: tmp_path / f"{name} {ODD}" for name in ("home", "cache", "tmp", "repository", "input")}
    for place in places.values():
        place.mkdir()
    for file in cache_folder().iterdir():
        os.symlink(file, places["cache"] / file.name)
    java = Path(spark._jvm.System.getProperty("java.home"))
    os.symlink(java, tmp_path / f"java {ODD}")
    for name in ("pipeline", "readings.py", BRONZE, "read_bronze.py"):
        (shutil.copytree if "." not in name else shutil.copy)(REPOSITORY / name, places["repository"] / name)
    readings = shutil.copy(REPOSITORY / "readings.py", tmp_path / f"readings {ODD}.py")
    put(places["input"], "größe é.json", reading(device_id="größe"))
    env = os.environ | {
        "HOME": str(places["home"]),
        "PIPELINE_CACHE": str(places["cache"]),
        "TMPDIR": str(places["tmp"]),
        "JAVA_HOME": str(tmp_path / f"java {ODD}"),
        "LC_ALL": "POSIX",
        "PYTHONIOENCODING": "ascii",
    }
    table, script = tmp_path / f"table {ODD}", places["repository"] / BRONZE
    run = run_script(
        script,
        "--input",
        places["input"],
        "--table",
        table,
        "--checkpoint",
        tmp_path / f"checkpoint {ODD}",
        "--readings",
        readings,
        "--once",
        env=env,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "1 rows in, 1 accepted" in run.stdout
    del env["PYTHONIOENCODING"]
    shown = run_script(places["repository"] / "read_bronze.py", "--table", table, env=env, encoding="utf-8")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "größe é.json" in shown.stdout and f"1 rows in {table}\n" in shown.stdout
    assert list(places["tmp"].iterdir()) == []


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"HOME": "/proc"}, ["The folder /proc/.ivy2 for Spark's jars can't be created", "export PIPELINE_CACHE="]),
        (
            {"PIPELINE_CACHE": "/dev/null"},
            ["The folder /dev/null for Spark's jars can't be created", "export PIPELINE_CACHE="],
        ),
        ({"PIPELINE_CACHE": "/tmp/a:b"}, ['has a ":" in its path', "export PIPELINE_CACHE="]),
    ],
    ids=["home", "file", "colon"],
)
def test_a_place_that_cannot_hold_the_jars_is_said_with_the_way_out(environment, words):
    run = run_script("read_silver.py", env=os.environ | environment)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert all(word in run.stderr for word in words), run.stderr


@pytest.mark.parametrize(
    "script, option",
    [(BRONZE, "--table"), (CONSUMER, "--table"), ("read_silver.py", "--table"), ("read_delta.py", None)],
)
@pytest.mark.parametrize(
    "value, complaint",
    [("a`b", 'has a "`"'), ("a\udcff", "is not in UTF-8"), ("", "it must not be empty")],
    ids=["backtick", "no UTF-8", "empty"],
)
def test_a_path_that_cannot_be_is_refused_at_the_start(script, option, value, complaint, run_here):
    run = run_here(script, *filter(None, [option]), value)
    assert run.returncode == 2 and complaint in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "option, place, table",
    [
        ("--checkpoint", "t", "t"),
        ("--checkpoint", "t/checkpoint", "t"),
        ("--checkpoint", "t_quarantine/checkpoint", "t_quarantine"),
        ("--checkpoint", "other/checkpoint", "other"),
        ("--checkpoint", "link/checkpoint", "other"),
        ("--archive", "other/sub/old", "other"),
        ("--input", "other/_sub/../new", "other"),
        ("--checkpoint", "file:{}/t", "t"),
        ("--input", "file://{}/other/new", "other"),
    ],
)
def test_a_folder_that_a_clean_up_of_a_table_would_delete_is_refused(tmp_path, option, place, table, run_here):
    (tmp_path / "other" / "_delta_log").mkdir(parents=True)
    for folder in ("in", "other/new", "other/_sub"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other")
    options = {"--input": tmp_path / "in", "--table": tmp_path / "t", "--checkpoint": tmp_path / "c"} | {
        option: place.format(tmp_path) if "{}" in place else tmp_path / place
    }
    run = run_here(BRONZE, *itertools.chain(*options.items()), "--once")
    assert run.returncode == 1 and run.stderr.startswith(f"error: {option} {tmp_path}/"), run.stderr
    assert f"must not be in the table {tmp_path}/{table}, " in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_a_hidden_folder_of_the_table_may_have_the_checkpoint():
    require_separate_places(argparse.Namespace(table="/lake/t", checkpoint="/lake/t/_checkpoint"))
    # Object stores are not checked.
    require_separate_places(argparse.Namespace(table="s3a://lake/t", checkpoint="s3a://lake/t/checkpoint"))


@pytest.mark.parametrize("name", ["{}/link", "{}/./checkpoint/", "file:{}/checkpoint", "file://{}/link"])
def test_a_checkpoint_is_locked_however_it_is_named(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint")
    with (
        lock_checkpoint(str(tmp_path / "checkpoint")),
        pytest.raises(PipelineError, match="Another stream is using the checkpoint"),
    ):
        with lock_checkpoint(name.format(tmp_path)):
            pass


def test_a_folder_that_others_could_change_is_trusted_with_nothing(tmp_path, monkeypatch):
    open_folder, own, stranger = tmp_path / "open", tmp_path / "own", tmp_path / "stranger's"
    for folder in (open_folder, own, stranger):
        folder.mkdir(mode=0o755)
    open_folder.chmod(0o777)
    if os.getuid() == 0:
        os.chown(stranger, 12_345, -1)
        (tmp_path / "link").symlink_to(stranger)
        for folder in (stranger, tmp_path / "link"):
            with pytest.raises(PipelineError, match=r"belongs to another user \(12345\)"):
                require_own(folder, "--data-dir")
    require_own(own, "--data-dir")
    monkeypatch.setenv("PIPELINE_CACHE", str(open_folder))
    with pytest.raises(PipelineError, match="open can be changed by any user of this machine.* PIPELINE_CACHE"):
        cache_folder()


def test_a_jar_that_is_not_the_one_that_was_tested_is_never_run(tmp_path, monkeypatch):
    for name, problem in (
        ("kafka-clients-3.9.2.jar", "a different SHA-256 sum"),
        ("kafka-clients-9.jar", "no SHA-256 sum"),
    ):
        (tmp_path / name).write_bytes(b"class Hostile")
        with pytest.raises(PipelineError, match=f"{name} is not the file .*has {problem} for it"):
            require_known([tmp_path / name])
    require_known(map(Path, spark_jars(DELTA, KAFKA_SOURCE)))


def test_a_folder_that_is_not_ours_keeps_no_file_open(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    before = os.listdir("/proc/self/fd")
    assert not scratch._lock(tmp_path) and not scratch._lock(tmp_path / "gone")
    assert os.listdir("/proc/self/fd") == before
    os.close(descriptor)


def test_temporary_files_of_a_killed_script_go_at_the_next_start_and_those_of_a_running_one_stay(tmp_path):
    def start() -> tuple[subprocess.Popen, Path]:
        code = "import time; from pipeline.spark.scratch import scratch_folder; print(scratch_folder(), flush=True); time.sleep(600)"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        folder = Path(process.stdout.readline().strip())
        (folder / "shuffle").write_text("records")
        return process, folder

    (killed, left), (running, used) = start(), start()
    killed.kill()
    killed.wait()
    new, folder = start()
    assert sorted(tmp_path.iterdir()) == sorted([used, folder]) and oct(folder.stat().st_mode)[-3:] == "700"
    for process in (running, new):
        process.terminate()
        process.wait()
    assert not left.exists()


@pytest.mark.parametrize("mask, closed", [(0o022, 0o007), (0o077, 0o077)])
def test_tables_and_checkpoints_are_closed_to_strangers(tmp_path, mask, closed):
    (tmp_path / "input").mkdir()
    put(tmp_path / "input", "1.json", VALID, BROKEN)
    run = run_script(
        BRONZE,
        "--input",
        tmp_path / "input",
        "--table",
        tmp_path / "lake/bronze",
        "--checkpoint",
        tmp_path / "lake/checkpoint",
        "--once",
        umask=mask,
    )
    assert run.returncode == 0, run.stderr
    files = [tmp_path / "lake", *(tmp_path / "lake").rglob("*")]
    assert len(files) > 20 and [file for file in files if file.stat().st_mode & closed] == []


def test_a_training_run_that_fails_leaves_no_archive_and_the_next_start_tries_again(tmp_path, capsys):
    archive = tmp_path / "classes.jsa"
    class_archive._make(archive, "-Xmx")  # fails: the path is not a valid size
    assert list(tmp_path.iterdir()) == [] and "could not be built (exit code 1)" in capsys.readouterr().err


def test_each_virtual_environment_has_an_archive_of_its_own_which_follows_its_jars(tmp_path, monkeypatch):
    """Java would refuse another environment's archive, and every start would take twice as long."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(class_archive, "_make", lambda archive, option: archive.touch())  # only names matter

    def archives(environment: str, made_at: int) -> list[str]:
        jars = tmp_path / environment
        jars.mkdir(exist_ok=True)
        os.utime(jars, (made_at, made_at))
        monkeypatch.setattr(class_archive, "SPARK_JARS", jars)
        [_, used] = class_archive.use_archive(find_java(), ["some.jar"]).split("=")
        assert Path(used).exists()
        return [used, *sorted(map(str, (tmp_path / "cache").glob("*.jsa")))]

    first, *_ = archives("one", made_at=1)
    assert archives("one", made_at=1) == [first, first]
    second, *both = archives("two", made_at=1)
    assert len(both) == 2 and second != first
    again, *both = archives("one", made_at=2)
    assert len(both) == 2 and again not in (first, second) and first not in both


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
    kept = Script(
        "local_kafka.py", "--port", other, "--data-dir", tmp_path / "kept", interpreter=("nohup", sys.executable, "-u")
    )
    for script in (stopped, kept):
        script.wait_for("Kafka is ready")
        script.process.send_signal(signal.SIGHUP)
    assert stopped.wait() == 0 and "have stopped" in stopped.output
    assert kept.process.poll() is None and kept.stop() == 0
    assert [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ] == []


def test_a_signal_that_comes_while_a_loop_looks_at_its_flag_stops_it():
    """With threading.Event this hangs, because its `set` waits for a lock that the loop may hold."""
    code = """if True:
        import random, signal
        from pipeline.terminal.signals import StopFlag
        for _ in range(400):
            flag = StopFlag()
            signal.signal(signal.SIGALRM, lambda *_: flag.set())
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
            while not flag.wait(1e-6):
                pass
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=PATIENCE).returncode == 0


def test_a_script_whose_output_nobody_reads_any_more_does_not_end_as_if_all_were_well(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from pipeline.terminal.messages import say
        from pipeline.terminal.script import run
        run(lambda: [say("line") for _ in iter(int, 1)])
    """)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(PATIENCE)) == (b"", 141)


@pytest.mark.parametrize(
    "setup, call",
    [
        ("spark = build_spark('test', READER_JVM)", "spark.range(10).agg({'id': 'max'}).collect()"),
        ("Half = type('', (), {'__init__': sleep, '__del__': sleep})", "Half()"),
        ("Half = type('', (), {'__init__': sleep, '__del__': sleep}); Interrupt.AGAIN = (1e-6, 0.001)", "Half()"),
    ],
    ids=["Spark", "__del__", "__del__, and too early"],
)
def test_a_signal_in_the_midst_of_a_call_ends_a_script_without_a_word(setup, call, tmp_path):
    """Without precautions, about one signal in twenty becomes a py4j error, or one is lost in __del__."""
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import os, random, signal, sys, threading, time
        from contextlib import suppress
        sys.path.insert(0, {str(REPOSITORY)!r})
        from pipeline.readers.latest import READER_JVM, build_spark
        from pipeline.terminal.signals import Interrupt
        from pipeline.terminal.script import has_no_end, run

        def sleep(_):
            time.sleep(0.005)

        def main():
            has_no_end()
            threading.Timer(random.uniform(0, 0.15), os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                {call}

        {setup}
        for _ in range(60):
            with suppress(Exception):  # the connection may still be broken off by the last signal
                {call}
            run(main)
            print("ended")
    """)
    run = run_script(script, timeout=100)
    assert (run.returncode, run.stderr, run.stdout.count("ended")) == (0, "", 60)


@pytest.mark.parametrize("moment", [0.3, 1, 2, 3.5, 6, 12])
def test_every_script_stops_at_any_moment_and_leaves_nothing_behind(broker, silver, tmp_path, moment):
    """Stops all scripts at once, each with a different signal and number of key presses at each moment."""
    mark, (topic, options) = uuid.uuid4().hex, silver
    env = os.environ | {"MARK": mark}
    port, page_port = free_ports(2)
    commands = [
        [BRONZE, "--table", tmp_path / "bronze", "--checkpoint", tmp_path / "bronze_checkpoint"],
        [CONSUMER, *options],
        ["read_silver.py", "--table", tmp_path / "none"],
        ["read_delta.py", "--lake", tmp_path],
        ["read_bronze.py", "--table", tmp_path / "bronze", "--follow"],
        ["dashboard.py", "--lake", tmp_path, "--port", page_port],
        [PRODUCER, *topic, "--create-topic"],
        ["local_kafka.py", "--port", port, "--data-dir", tmp_path / "kafka"],
    ]
    scripts = [Script(*command, env=env) for command in commands]
    time.sleep(moment)
    for number, script in enumerate(scripts):
        stop_signal = (signal.SIGINT, signal.SIGTERM)[(number + int(moment)) % 2]
        for _ in range(1 + (number + int(moment * 2)) % 2):
            if script.process.poll() is None:
                # As from a terminal or a service manager: mostly to all processes of the script.
                (os.killpg if number % 3 else os.kill)(script.process.pid, stop_signal)
            time.sleep(0.05)
    for script in scripts:
        # A script that was stopped before its end says so, and so does any script that had not begun.
        code, has_end = script.wait(), script in (scripts[2], scripts[3])
        assert (
            code == 0
            or code == 1
            and "error: No " in script.output
            or code in (130, 143)
            and (has_end or not script.output)
        ), (script.process.args, code, script.output)
        assert "Traceback" not in script.output and "ignored" not in script.output, script.output
    left = [
        process.cmdline()
        for process in psutil.process_iter()
        if process.pid != os.getpid() and is_marked(process, mark)
    ]
    assert left == []


def is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("MARK") == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


PLACE = "/data/Concurrent No space left on device (Permission denied)/metadata already exists/silver"


@pytest.mark.parametrize(
    "kind, message, told",
    [
        ("java.io.IOException", "No space left on device", "There is no space left for"),
        ("java.io.IOException", f"{PLACE}/part-1.parquet: Disk quota exceeded", "There is no space left for"),
        ("java.io.FileNotFoundException", f"{PLACE}/part-1.parquet (Permission denied)", "This user may not write to"),
        ("java.io.IOException", f"Mkdirs failed to create file:{PLACE}/_delta_log", "This user may not write to"),
        ("java.io.IOException", f"{PLACE}: Read-only file system", "This user may not write to"),
        ("java.lang.IllegalStateException", "Incomplete log file", "The checkpoint .* is damaged"),
        (
            "java.lang.IllegalStateException",
            "[MALFORMED_LOG_FILE] Log file was malformed",
            "The checkpoint .* is damaged",
        ),
        (
            "java.io.IOException",
            f"{PLACE}_checkpoint/offsets/7 already exists",
            "Another stream is using the checkpoint",
        ),
        ("java.lang.OutOfMemoryError", f"Java heap space {PLACE}", "Spark.s JVM does not have enough"),
        ("java.io.IOException", f"{PLACE}/part-1.parquet: Input/output error", "The operating system reports an error"),
        ("java.net.SocketException", "Too many open files", "The operating system reports an error"),
        ("java.io.IOException", f"{PLACE}/metadata already exists/more", None),
        ("java.lang.IllegalStateException", f"cannot read {PLACE}/Incomplete log file", None),
    ],
)
def test_an_error_is_recognised_by_what_it_is_and_not_by_words_of_a_path(spark, kind, message, told):
    error = Exception("of Java")
    error.java_exception = reduce(getattr, kind.split("."), spark._jvm)(message)
    explanation = explain(error, PLACE, f"{PLACE}_checkpoint")
    assert explanation is None if told is None else re.match(told, explanation), explanation


@pytest.mark.parametrize(
    "number, told",
    [
        (errno.ENOSPC, "There is no space left for"),
        (errno.EACCES, "This user may not"),
        (errno.EIO, f"The operating system reports an error .{re.escape(PLACE)}/x: Input/output error"),
    ],
)
def test_an_error_of_python_is_recognised_too(number, told):
    assert re.match(told, explain(OSError(number, os.strerror(number), f"{PLACE}/x"), PLACE, f"{PLACE}_checkpoint"))
