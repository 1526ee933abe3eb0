"""The command line: a script's manual, and the types of its options."""

import argparse
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """Adds the default to the help text, except for switches and optional values."""
        return (
            (action.help or "")
            if action.default is None or action.default is False
            else super()._get_help_string(action) or ""
        )


def argument_parser(manual: str) -> argparse.ArgumentParser:
    """A parser whose `--help` shows the script's module docstring, followed by the options and their defaults. Includes
    --verbose.
    """
    parser = argparse.ArgumentParser(description=manual, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--verbose", action="store_true", help="show the traceback of an error, and Spark's own log, if any"
    )
    return parser


def location(value: str) -> str:
    """The type of an option that takes a path. URIs (`s3a://…`) are kept; local paths are made absolute."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not in UTF-8, which Java needs for file names") from None
    if not value:
        raise argparse.ArgumentTypeError("it must not be empty")
    if uri := re.fullmatch(r"([a-zA-Z][\w+.-]+):/(?!/)(.*)", value, re.DOTALL):  # file:/data, as Java writes it
        return f"{uri[1]}:///{uri[2]}"
    return value if "://" in value else os.path.abspath(os.path.expanduser(value))


def local_folder(value: str) -> str:
    """The type of an option that takes a local folder."""
    if "://" in value:
        raise argparse.ArgumentTypeError(f"{value!r} is not a folder on this machine")
    return location(value)


def table_location(value: str) -> str:
    """The type of an option that takes the path of a Delta table."""
    if "`" in value:
        raise argparse.ArgumentTypeError(f'{value!r} has a "`", which Delta does not allow in the path of a table')
    return location(value)


def at_least(
    minimum: float, number: Callable[[str], float] = int, at_most: float = 2**31 - 1
) -> Callable[[str], float]:
    """The type of an option that takes a number from `minimum` to `at_most`, whose default is Spark's limit for rows and files."""

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


def utc_time(value: str) -> int:
    """The type of an option that takes a time, in UTC unless it has an offset: microseconds since 1970."""
    try:
        time = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{value!r} is not a time such as "2026-11-20 08:00:00"') from None
    since_1970 = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)) - datetime(
        1970, 1, 1, tzinfo=timezone.utc
    )
    return since_1970 // timedelta(microseconds=1)
