"""Where things are: the repository, the tables of the lake, their checkpoints, and local paths."""

import os
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def local_path(path: str) -> str | None:
    """The path of a local file in Python's notation (for /data, file:/data, file:///data); None for other stores."""
    path = re.sub("^file:(//)?(?=/)", "", path)
    return None if "://" in path else path


def plain(path: str) -> str:
    """The path of a local file in Python's notation; other URIs unchanged."""
    return local_path(path) or path


LAKE = REPOSITORY / "lake"
BRONZE = str(LAKE / "bronze" / "sensor_data")
SILVER = str(LAKE / "silver" / "sensor_data")


def quarantine_of(table: str) -> str:
    """The path of the quarantine that belongs to `table`."""
    return table.rstrip("/") + "_quarantine"


def checkpoint_of(table: str) -> str:
    """The path of the checkpoint for the stream that writes `table`: in checkpoints/ for the tables of the lake, otherwise next
    to the table.
    """
    if table == BRONZE:
        return str(REPOSITORY / "checkpoints" / "bronze_sensor")
    if LAKE in Path(table).parents:
        return str(REPOSITORY / "checkpoints" / "_".join(Path(table).relative_to(LAKE).parts))
    return table.rstrip("/") + "_checkpoint"


def tables_in(lake: str) -> dict[str, str]:
    """The paths of the Delta tables in the local folder `lake`, by their names relative to it, sorted."""
    tables, visited = {}, set()
    for folder, subfolders, _ in os.walk(lake, followlinks=True):  # a table may be on another disk
        real = os.path.realpath(folder)
        if "_delta_log" in subfolders:
            tables[os.path.relpath(folder, lake)] = folder
        if "_delta_log" in subfolders or real in visited:  # a link may lead back to a parent folder
            subfolders.clear()
        visited.add(real)
        subfolders.sort()
    return tables
