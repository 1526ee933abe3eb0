"""Private APIs of PySpark's errors.

Without them, the cause of most errors, such as the name of a file, would be lost: PySpark shows the outermost message.
"""

from typing import Any


def java_exception(error: BaseException) -> Any:
    """The Java exception behind an error of py4j (`java_exception`) or of PySpark (`_origin`); None for other errors."""
    return getattr(error, "java_exception", None) or getattr(error, "_origin", None)
