"""Lines for the terminal."""

import os
import re
import sys
from typing import TextIO


def say(line: str) -> None:
    print(line, flush=True)


def warn(line: str) -> None:
    """Prints a line to stderr. It may quote a file's name or an error, so no control character of it reaches the
    screen.
    """
    print(without_controls(line), file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    """The text with "�" for what would steer a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def is_screen(stream: TextIO) -> bool:
    """Whether text can be replaced in place there: a terminal that is able to, and has no other live view on it."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not hasattr(stream, "rich_proxied_file")
