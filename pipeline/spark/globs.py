"""File names that Hadoop would take for patterns."""

import re

# Files in a batch if some of their names contain wildcards. Spark lists the whole batch once more for each such file.
MAX_PATTERNS = 100


def is_pattern(path: str) -> bool:
    """Whether Hadoop would take a path for a pattern, because it contains one of its wildcards."""
    return escape_glob(path) != path


def escape_glob(path: str) -> str:
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", path)
