"""The live status of a script that waits for something."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from pipeline.terminal.messages import is_screen


@contextmanager
def in_progress(only_on_terminal: bool = False) -> Iterator[Callable[[str], None]]:
    """Provides a function that shows on stderr what the script is waiting for; "" hides the status.

    On a terminal, the status is updated in place and shows the elapsed time. Elsewhere, each message is printed once as a line, or
    not at all if `only_on_terminal`.
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
    with ExitStack() as live:

        def show(what: str) -> None:
            nonlocal shown
            if what == shown:
                return
            shown = what
            live.close()
            if what:
                fits = len(what) < console.width - len("⠋  0:00:00 ")
                if not fits:
                    console.print(what, markup=False, highlight=False)
                # Transient, and active only while there is something to show, because it hides the cursor and writes
                # ten times a second.
                progress = Progress(
                    SpinnerColumn(),
                    TextColumn("{task.description}", markup=False),
                    TimeElapsedColumn(),
                    console=console,
                    transient=True,
                    redirect_stdout=sys.stdout.isatty(),
                )
                progress.add_task(what if fits else "")
                live.enter_context(progress)

        yield show
