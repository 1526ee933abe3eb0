"""Printing lines to the terminal."""

import os
import re
import sys
from typing import TextIO


def say(line: str) -> None:
    print(line, flush=True)


def warn(line: str) -> None:
    """Prints a line to stderr, without control characters, because it may quote a file name or an error."""
    print(without_controls(line), file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    """The text with "�" in place of control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def is_screen(stream: TextIO) -> bool:
    """Whether text can be updated in place there: the stream is a capable terminal without another live view."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not hasattr(stream, "rich_proxied_file")
