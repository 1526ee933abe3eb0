"""What the tests share: one SparkSession, one real broker made from docker-compose.yml, and scripts run as processes."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.session import build_spark
from local_kafka import free_ports

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds; a limit for what hangs, far above what any step takes


class Script:
    """A script of the project as a process of its own, whose output can be waited for."""

    def __init__(self, name: str, *arguments, folder: Path = REPOSITORY, env: dict | None = None):
        self.process = subprocess.Popen([sys.executable, "-u", str(folder / name), *map(str, arguments)], env=env,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/",
                                        start_new_session=True)
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.output.count(text) < times:
            assert self.process.poll() is None and time.monotonic() < deadline, f"no {text!r} in:\n{self.output}"
            time.sleep(0.1)

    def stop(self, stop_signal: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal; returns the exit code."""
        self.process.send_signal(stop_signal)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code


def run_script(name: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs a script to its end; its exit code, stdout and stderr."""
    return subprocess.run([sys.executable, str(REPOSITORY / name), *map(str, arguments)], capture_output=True, text=True,
                          cwd="/", timeout=PATIENCE, stdin=subprocess.DEVNULL, **options)


@pytest.fixture
def start():
    """Starts scripts that are killed at the end of the test, should they still run."""
    scripts = []

    def start_script(*arguments, **options) -> Script:
        scripts.append(Script(*arguments, **options))
        return scripts[-1]

    yield start_script
    for script in scripts:
        if script.process.poll() is None:
            script.process.kill()
            script.wait()


@pytest.fixture(scope="session")
def spark():
    session = build_spark("tests")
    yield session
    session.stop()


@pytest.fixture(scope="session")
def broker(tmp_path_factory):
    """The address of a running local_kafka.py."""
    [port] = free_ports(1)
    kafka = Script("local_kafka.py", "--port", port, "--data-dir", tmp_path_factory.mktemp("kafka"))
    try:
        kafka.wait_for("Kafka is ready")
        yield f"localhost:{port}"
    finally:
        assert kafka.stop() == 0, kafka.output
