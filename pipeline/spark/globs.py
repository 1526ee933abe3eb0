"""File names that Hadoop would interpret as glob patterns."""

import re

# Files in a batch if some of their names contain wildcards. Spark lists the whole batch once more for each such file.
MAX_PATTERNS = 100


def is_pattern(path: str) -> bool:
    """Whether Hadoop would interpret a path as a pattern, because it contains one of the wildcards."""
    return escape_glob(path) != path


def escape_glob(path: str) -> str:
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", path)
