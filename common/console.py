"""What every script of the pipeline says and how it ends: its manual, its errors, its exit code."""

import argparse
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from py4j.protocol import Py4JNetworkError

from common.process import Interrupt, ignore_stop_signals, on_stop_signal


class PipelineError(Exception):
    """Something that a user can fix: one sentence that says what happened, where, and what to do next."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """Names the default of an option that has one; a switch and an option that may be left out have none."""
        return (action.help or "") if action.default is None or action.default is False else super()._get_help_string(action) or ""


def argument_parser(manual: str) -> argparse.ArgumentParser:
    """A parser whose `--help` is the script's module docstring, followed by the options and their defaults; with --verbose."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error, and Spark's own log where it runs")
    return parser


def location(value: str) -> str:
    """The type of an option that takes a path: a URI as it is (`s3a://…`), a path of this machine made absolute."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not in UTF-8, which Java needs for file names") from None
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    if uri := re.fullmatch(r"([a-zA-Z][\w+.-]+):/(?!/)(.*)", value, re.DOTALL):  # file:/data, as Java writes it
        return f"{uri[1]}:///{uri[2]}"
    return value if "://" in value else os.path.abspath(os.path.expanduser(value))


def local_path(path: str) -> str | None:
    """The path as this machine's own tools take it, however it is written (/data, file:/data, file:///data); None for another store's."""
    path = re.sub("^file:(//)?(?=/)", "", path)
    return None if "://" in path else path


def local_folder(value: str) -> str:
    """The type of an option that takes a folder of this machine."""
    if "://" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is not a folder on this machine")
    return location(value)


def table_location(value: str) -> str:
    """The type of an option that takes the path of a Delta table."""
    if "`" in value:
        raise argparse.ArgumentTypeError(f'{value!r} has a "`", which Delta does not allow in the path of a table')
    return location(value)


def at_least(minimum: float, number: Callable[[str], float] = int, at_most: float = 2**31 - 1) -> Callable[[str], float]:
    """The type of an option that takes a number from `minimum` to `at_most`; by default the most that Spark takes for rows or files."""

    def parse(value: str) -> float:
        try:
            parsed = number(value)
        except ValueError:
            parsed = None
        if parsed is None or not minimum <= parsed < float("inf"):
            kind = "a whole number" if number is int else "a number"
            raise argparse.ArgumentTypeError(f"{value!r} is not {kind} of {minimum} or more")
        if parsed > at_most:
            raise argparse.ArgumentTypeError(f"{value!r} is more than {at_most}")
        return parsed

    return parse


fraction = at_least(0, float, at_most=1)
port_number = at_least(1, at_most=65_535)


def java_causes(error: BaseException) -> Iterator[Any]:
    """An error of Java, as py4j gives it, and its causes, the innermost last; none of an error of Python."""
    java = getattr(error, "java_exception", None) or getattr(error, "_origin", None)
    while java is not None:
        yield java
        java = java.getCause()


def root_cause(error: BaseException) -> str:
    """The message of an error; of an error of Java that of its innermost cause."""
    if causes := list(java_causes(error)):
        return (causes[-1].getMessage() or causes[-1].toString()).strip()
    return str(error).strip() or type(error).__name__


def java_class(error: BaseException) -> str:
    """The class of the innermost cause of an error of Java; "" for one of Python."""
    causes = list(java_causes(error))
    return causes[-1].getClass().getName() if causes else ""


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def say(line: str) -> None:
    print(line, flush=True)


def warn(line: str) -> None:
    """Prints a line to stderr. It may quote a file's name or an error, so no control character of it reaches the screen."""
    print(without_controls(line), file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    """The text with "�" for what would steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def is_screen(stream: TextIO) -> bool:
    """Whether text can be replaced in place there: a terminal that is able to, and has no other live view on it."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not hasattr(stream, "rich_proxied_file")


@contextmanager
def in_progress(only_on_terminal: bool = False) -> Iterator[Callable[[str], None]]:
    """Gives a function that says on stderr what is being waited for, "" for nothing.

    On a terminal in place, with the time that has passed; elsewhere a line, once for each text, or none if `only_on_terminal`.
    """
    if not is_screen(sys.stderr):
        said = {""}

        def note(what: str) -> None:
            if what not in said and not only_on_terminal:
                said.add(what)
                print(what, file=sys.stderr, flush=True)
        yield note
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    console, shown = Console(stderr=True), ""
    progress: Progress | None = None

    def show(what: str) -> None:
        nonlocal shown, progress
        if what == shown:
            return
        shown = what
        if progress:
            progress.stop()
            progress = None
        if what:
            fits = len(what) < console.width - len("⠋  0:00:00 ")
            if not fits:
                console.print(what, markup=False, highlight=False)
            # Transient, and only while there is something to show: it hides the cursor, and writes ten times a second.
            progress = Progress(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=console,
                                transient=True, redirect_stdout=sys.stdout.isatty())
            progress.add_task(what if fits else "")
            progress.start()
    try:
        yield show
    finally:
        show("")


def _broken_off(error: BaseException | None) -> bool:
    """Whether Ctrl+C has led to an error: py4j sometimes closes the connection by which PySpark then tidies up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def run(main: Callable[[], None]) -> None:
    """Runs a script: 0 at its end and on Ctrl+C or SIGTERM, 1 after an error, which it prints to stderr as a sentence, 141 if nobody
    reads its output any more.

    `--verbose` on the command line adds the traceback. Users who are neither the script's own nor of its group can't read its files.
    """
    on_stop_signal(Interrupt())
    os.umask(os.umask(0o007) | 0o007)
    if "--verbose" not in sys.argv:
        logging.basicConfig(handlers=[logging.NullHandler()])  # py4j logs tracebacks of what reaches us as an exception
    try:
        main()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)  # a stream has to be started again
    except Exception as error:
        if "--verbose" in sys.argv:
            traceback.print_exc()
        if _broken_off(error):
            return
        message = str(error)
        if isinstance(error, (Py4JNetworkError, ConnectionRefusedError)):
            message = ("Spark's JVM has died; perhaps the system killed it, or its memory did not suffice. Nothing is lost: "
                       "start again. --verbose shows what it said last.")
        elif not isinstance(error, PipelineError):
            message = f"{first_line(root_cause(error))} (--verbose shows all of it)"
        warn(f"error: {message}")
        sys.exit(1)
    finally:
        ignore_stop_signals()
