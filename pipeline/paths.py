"""Where things are: the repository, the tables of the lake, and paths as this machine's own tools take them."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def local_path(path: str) -> str | None:
    """The path as this machine's own tools take it, however it is written (/data, file:/data, file:///data); None for
    another store's.
    """
    path = re.sub("^file:(//)?(?=/)", "", path)
    return None if "://" in path else path


LAKE = REPOSITORY / "lake"
BRONZE = str(LAKE / "bronze" / "sensor_data")
SILVER = str(LAKE / "silver" / "sensor_data")


def quarantine_of(table: str) -> str:
    """The path of the table beside `table` that takes the records it rejects."""
    return table.rstrip("/") + "_quarantine"
