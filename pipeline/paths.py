"""Where things are: the repository, the tables of the lake, and local paths."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def local_path(path: str) -> str | None:
    """The path of a local file in Python's notation (for /data, file:/data, file:///data); None for other stores."""
    path = re.sub("^file:(//)?(?=/)", "", path)
    return None if "://" in path else path


LAKE = REPOSITORY / "lake"
BRONZE = str(LAKE / "bronze" / "sensor_data")
SILVER = str(LAKE / "silver" / "sensor_data")


def quarantine_of(table: str) -> str:
    """The path of the quarantine that belongs to `table`."""
    return table.rstrip("/") + "_quarantine"
