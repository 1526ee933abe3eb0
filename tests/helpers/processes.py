"""Running the scripts as processes, and waiting for them."""

import fcntl
import functools
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE = 400  # seconds until a step counts as hung, far more than any step takes


def until(holds: Callable) -> None:
    """Waits until `holds` returns true."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Script:
    """A script of the project, run as a process. Tests can wait for its output."""

    def __init__(
        self,
        name: str,
        *arguments,
        folder: Path = REPOSITORY,
        env: dict | None = None,
        interpreter: Iterable = (sys.executable, "-u"),
    ):
        self.process = subprocess.Popen(
            [*map(str, interpreter), str(folder / name), *map(str, arguments)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            start_new_session=True,
        )
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

    def counts(self) -> tuple[int, int]:
        """How many messages a finished producer has sent, and how many were acknowledged."""
        counts = re.findall(r"^([\d,]+) sent, ([\d,]+) acknowledged\.$", self.output, re.MULTILINE)[-1]
        return tuple(int(count.replace(",", "")) for count in counts)

    def stop(self, stop_signal: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(stop_signal)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        return code


def run_script(name: str, *arguments, prefix: Iterable = (), **options) -> subprocess.CompletedProcess:
    """Runs a script to its end, optionally under the command `prefix`; returns its exit code, stdout and stderr."""
    return subprocess.run(
        [*prefix, sys.executable, str(REPOSITORY / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        **{"cwd": "/", "timeout": PATIENCE, "stdin": subprocess.DEVNULL} | options,
    )


@functools.cache
def manual(script: str) -> str:
    """The output of a script for --help."""
    run = run_script(script, "--help")
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def acknowledged(*producers: Script) -> int:
    """Stops the producers. Returns how many messages were acknowledged, which must be as many as were sent."""
    for producer in producers:
        assert producer.stop() == 0, producer.output
    counts = [producer.counts() for producer in producers]
    assert all(sent == acknowledged for sent, acknowledged in counts)
    return sum(sent for sent, _ in counts)


def on_terminal(
    width: int, script: str, *arguments, folder: Path = REPOSITORY, watch: Callable = lambda text, process: None
) -> str:
    """The output of a script on a terminal of `width` columns. `watch` gets the output so far and may end it."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }
    with subprocess.Popen(
        [sys.executable, folder / script, *map(str, arguments)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
    ) as process:
        os.close(terminal)
        output = b""
        with suppress(OSError):  # at the end of the terminal
            while chunk := os.read(ours, 65_536):
                output += chunk
                watch(output.decode(errors="replace"), process)
    os.close(ours)
    assert process.returncode == 0, output
    return output.decode()
