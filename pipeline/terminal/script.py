"""Running a script's `main`: error messages and exit codes."""

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from pipeline.terminal.errors import PipelineError, first_line, root_cause
from pipeline.terminal.messages import warn
from pipeline.terminal.signals import Interrupt, ignore_stop_signals, on_stop_signal, received

from py4j.protocol import Py4JNetworkError


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an error was caused by Ctrl+C: py4j sometimes closes the connection that PySpark's cleanup needs."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


_has_no_end = False


def has_no_end() -> None:
    """Says that the running script never ends on its own, so that stopping it counts as success."""
    global _has_no_end
    _has_no_end = True


def _message(error: Exception) -> str:
    if isinstance(error, PipelineError):
        return str(error)
    if isinstance(error, (Py4JNetworkError, ConnectionRefusedError)):
        return (
            "Spark's JVM has died; perhaps it ran out of memory, or the system killed it. Nothing is lost: "
            "start again. --verbose shows its last messages."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO) and not error.filename:
        return f"The output can't be written: {error.strerror}. Send it somewhere else, or free up some space."
    return f"{first_line(root_cause(error))} (--verbose shows all of it)"


def run(main: Callable[[], None]) -> None:
    """Runs a script. Its exit code is 0 on success; 1 after an error, whose message is printed to stderr; 130 or 143 if Ctrl+C or
    SIGTERM stopped it before it finished (0 if it `has_no_end`), and 141 if nobody reads its output any more.

    `--verbose` on the command line adds the traceback. New files are accessible only to the script's user and group.
    """
    global _has_no_end
    _has_no_end = False
    received.clear()
    on_stop_signal(Interrupt())
    os.umask(os.umask(0o007) | 0o007)
    if "--verbose" not in sys.argv:
        logging.basicConfig(handlers=[logging.NullHandler()])  # py4j logs tracebacks of errors that it also raises
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
        if not _is_interrupted(error):
            warn(f"error: {_message(error)}")
            sys.exit(1)
    finally:
        ignore_stop_signals()
    if received and not _has_no_end:
        sys.exit(128 + received[0])
