"""The live page, and its queries."""

from importlib.util import find_spec


def is_installed() -> bool:
    """Whether the page has the libraries that it needs."""
    return all(map(find_spec, ("streamlit", "deltalake", "duckdb", "altair")))
