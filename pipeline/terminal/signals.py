"""A script as a process: Ctrl+C, SIGTERM and SIGHUP at any moment, and independence of the locale.

This is imported before everything else (by pipeline/__init__.py), because other imports take a second. The effect of a
signal depends on what has to be cleaned up: it ends the process immediately while modules are imported, raises
KeyboardInterrupt under `pipeline.terminal.script.run`, is postponed in `delay_stop_signals`, and sets a StopFlag where a
loop checks one (`on_stop_signal(stopping.set)`).
"""

import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pipeline.paths import REPOSITORY

# The last one arrives when a terminal closes; nohup ignores it.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) != signal.SIG_IGN))
received: list[int] = []  # the stop signals since the script began
SAME_PRESS_SECONDS = 2  # seconds within which a second signal has no additional effect


def on_stop_signal(action: Callable[[], object]) -> None:
    """Makes Ctrl+C, SIGTERM and SIGHUP call `action` from now on."""

    def handle(stop_signal: int, _: object) -> None:
        received.append(stop_signal)
        if stop_signal == signal.SIGHUP:  # further output has nowhere to go
            for number in filter(os.isatty, (1, 2)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        action()

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, handle)


class StopFlag:
    """Like threading.Event, but safe to set in a signal handler: Event.set acquires a lock that the interrupted thread may hold."""

    def __init__(self) -> None:
        self._is_set, self._set_at = False, float("inf")
        self._reader, self._writer = os.pipe()

    def set(self) -> None:
        if not self._is_set:
            self._is_set, self._set_at = True, time.monotonic()
            os.write(self._writer, b".")

    def is_set(self) -> bool:
        return self._is_set

    def seconds(self) -> float:
        """Seconds since the flag was set; negative if it is not."""
        return time.monotonic() - self._set_at

    def wait(self, seconds: float) -> bool:
        """Waits up to `seconds` for the flag to be set. Returns whether it is set."""
        pipe = select.poll()
        pipe.register(self._reader, select.POLLIN)
        pipe.poll(max(0, seconds) * 1000)
        return self._is_set

    def __del__(self) -> None:
        os.close(self._reader)
        os.close(self._writer)


class Stopped(Exception):
    """Ends an activity because a StopFlag was set."""


def ignore_stop_signals() -> None:
    """Called at the end of a script, which takes a moment and must not be interrupted by a second key press."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


class Interrupt:
    """Raises KeyboardInterrupt, once for several signals in a row, because another one would interrupt the cleanup.

    If Python can't propagate it, for example in a callback of the garbage collector, the signal is repeated a moment later.
    """

    AGAIN = (0.001, 0.001)  # seconds until the signal is repeated, and between further attempts

    def __init__(self) -> None:
        self.raised_at = float("-inf")
        signal.signal(signal.SIGALRM, self._raise_again)
        sys.unraisablehook = self._unraisable

    def __call__(self) -> None:
        if time.monotonic() - self.raised_at > SAME_PRESS_SECONDS:
            self.raised_at = time.monotonic()
            raise KeyboardInterrupt

    def _unraisable(self, lost: "sys.UnraisableHookArgs") -> None:
        if lost.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, *self.AGAIN)
        else:
            sys.__unraisablehook__(lost)

    def _raise_again(self, _: int, frame: FrameType | None) -> None:
        # On a busy machine, the timer may fire while one of these two is still running, which can't propagate it
        # either.
        if not frame or frame.f_code not in (Interrupt._unraisable.__code__, Interrupt._raise_again.__code__):
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.raised_at = float("-inf")
            signal.raise_signal(signal.SIGINT)


@contextmanager
def delay_stop_signals() -> Iterator[None]:
    """Delays stop signals until the end of the context, then raises KeyboardInterrupt if there was one."""
    seen = []
    before = {stop_signal: signal.getsignal(stop_signal) for stop_signal in STOP_SIGNALS}
    on_stop_signal(lambda: seen.append(True))
    try:
        yield
    except Exception:
        if not seen:  # otherwise the signal caused it; a service manager also sends it to the JVM
            raise
    finally:
        for stop_signal, handler in before.items():
            signal.signal(stop_signal, handler)
    if seen:
        raise KeyboardInterrupt


def _use_utf8() -> None:
    """Makes Python and the JVMs that it starts use UTF-8 for file names, arguments and output, whatever the locale."""
    if sys.getfilesystemencoding() != "utf-8":  # Python itself uses UTF-8 only for the locales C and POSIX
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    for number in range(3):  # the next file opened would get the number of a closed one
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or open(1, "w"), sys.stderr or open(2, "w")
    os.environ["LC_ALL"] = "C.UTF-8"  # Java can neither list nor open a file whose name the locale can't encode
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # PYTHONIOENCODING may set an encoding that lacks a character


# Not in a test that imports a script.
if Path(getattr(sys.modules["__main__"], "__file__", "")).resolve().parent == REPOSITORY:
    on_stop_signal(lambda: os._exit(128 + received[0]))
    _use_utf8()
