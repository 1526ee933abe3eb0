"""File names that Hadoop would interpret as glob patterns."""

import re

# Files per batch if some of their names contain wildcards. For each such file, Spark lists the whole batch once more.
MAX_PATTERNS = 100


def is_pattern(path: str) -> bool:
    """Whether Hadoop would interpret a path as a pattern, because it contains one of the wildcards."""
    return escape_glob(path) != path


def escape_glob(path: str) -> str:
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", path)
