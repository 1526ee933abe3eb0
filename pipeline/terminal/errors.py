"""User-facing errors, and access to the details of Java errors."""

from collections.abc import Iterator
from typing import Any

from pipeline.terminal.private import java_exception


class PipelineError(Exception):
    """An error that the user can fix. The message says what happened, where, and what to do next."""


def java_causes(error: BaseException) -> Iterator[Any]:
    """A Java error as py4j provides it, followed by its causes, the innermost last. Empty for Python errors."""
    java = java_exception(error)
    while java is not None:
        yield java
        java = java.getCause()


def root_cause(error: BaseException) -> str:
    """The message of an error; for a Java error, that of its innermost cause."""
    if causes := list(java_causes(error)):
        return (causes[-1].getMessage() or causes[-1].toString()).strip()
    return str(error).strip() or type(error).__name__


def java_class(error: BaseException) -> str:
    """The class of the innermost cause of a Java error; "" for Python errors."""
    causes = list(java_causes(error))
    return causes[-1].getClass().getName() if causes else ""


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
