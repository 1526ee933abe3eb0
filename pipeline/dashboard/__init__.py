"""The live page and its queries."""

from importlib.util import find_spec


def is_installed() -> bool:
    """Whether the libraries of the page are installed."""
    return all(map(find_spec, ("streamlit", "deltalake", "duckdb", "altair")))
