"""Errors for people, and the facts in an error of Java."""

from collections.abc import Iterator
from typing import Any


class PipelineError(Exception):
    """Something that a user can fix: one sentence that says what happened, where, and what to do next."""


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
