"""Running a script's `main`: error messages and exit codes."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

from pipeline.terminal.errors import PipelineError, first_line, root_cause
from pipeline.terminal.messages import warn
from pipeline.terminal.signals import Interrupt, ignore_stop_signals, on_stop_signal

from py4j.protocol import Py4JNetworkError


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether an error was caused by Ctrl+C: py4j sometimes closes the connection that PySpark's cleanup needs."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def run(main: Callable[[], None]) -> None:
    """Runs a script. Its exit code is 0 at its end and after Ctrl+C or SIGTERM, 1 after an error, whose message is printed to
    stderr, and 141 if nobody reads its output any more.

    `--verbose` on the command line adds the traceback. New files are accessible only to the script's user and group.
    """
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
        if _is_interrupted(error):
            return
        message = str(error)
        if isinstance(error, (Py4JNetworkError, ConnectionRefusedError)):
            message = (
                "Spark's JVM has died; perhaps it ran out of memory, or the system killed it. Nothing is lost: "
                "start again. --verbose shows what it said last."
            )
        elif not isinstance(error, PipelineError):
            message = f"{first_line(root_cause(error))} (--verbose shows all of it)"
        warn(f"error: {message}")
        sys.exit(1)
    finally:
        ignore_stop_signals()
