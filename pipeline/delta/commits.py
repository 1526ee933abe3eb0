"""The newest commits of a Delta table, read from its log: https://github.com/delta-io/delta/blob/master/PROTOCOL.md#delta-log-entries"""

import itertools
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.paths import local_path
from pipeline.spark.durable import sync
from pipeline.spark.file_system import FileSystem
from pipeline.terminal.messages import say

from pyspark.sql import SparkSession

NEWEST_COMMITS = 20  # commits that a start examines
# Suffix of a stream's id in Delta's transactions, for the differing verdicts of a batch that was read twice.
AGAIN = " again"
REPLAY = "pipeline.replay"  # the id of replays (pipeline/delta/replay.py) in Delta's transactions
REPLAY_NOTE = json.dumps({"replay": True})  # the note in all of their commits


class Commits:
    """The newest commits of the table at `path`, up to the version `newest`."""

    def __init__(self, spark: SparkSession, table: str, newest: int):
        self.table, self.newest, self.files = table, newest, FileSystem(spark, table)

    def actions(self, version: int) -> list[dict[str, Any]] | None:
        """The log entry of a version; [] if it is damaged, None if it does not exist (any more)."""
        text = self.files.read(f"{self.table}/_delta_log/{version:020}.json")
        try:
            return None if text is None else [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError:
            return []

    def contents_of(self, stream: str, batch_id: int) -> Any:
        """The contents recorded for a batch by `contents_note`; None if none of the newest commits has them."""
        for version in range(self.newest, max(self.newest - NEWEST_COMMITS, -1), -1):
            for action in self.actions(version) or ():
                with suppress(ValueError):  # another program's note
                    match json.loads(action.get("commitInfo", {}).get("userMetadata") or "null"):
                        case {"stream": writer, "batch": number, "contents": contents}:
                            if (writer, number) == (stream, batch_id):
                                return contents
        return None

    def version_of(self, stream: str, batch_id: int) -> int | None:
        """The version that the stream's batch has created; None if it is not among the newest commits."""
        for version in range(self.newest, max(self.newest - NEWEST_COMMITS, -1), -1):
            transactions = [action["txn"] for action in self.actions(version) or () if "txn" in action]
            if any((each["appId"], each["version"]) == (stream, batch_id) for each in transactions):
                return version
        return None

    def has_changed_rows_since(self, stream: str, batch_id: int, by_replay: bool) -> bool:
        """Whether anybody has changed or deleted rows since the stream wrote this recent batch to the table or, if `by_replay`, has
        replayed any.
        """
        written = self.version_of(stream, batch_id)
        first = max(self.newest - NEWEST_COMMITS, -1) if written is None else written
        return any(
            action.get("remove", {"dataChange": False}).get("dataChange", True)
            or by_replay
            and action.get("txn", {}).get("appId") == REPLAY
            for version in range(self.newest, first, -1)
            for action in self.actions(version) or ()
        )

    def damage(self) -> tuple[int, str]:
        """Returns the oldest damaged version among the newest commits, and a description; (-1, "") if all are intact."""
        found, removed = (-1, ""), set()
        for version in range(self.newest, max(self.newest - NEWEST_COMMITS, -1), -1):
            actions = self.actions(version)
            if actions is None and version < self.newest:  # removed by a clean-up, like all earlier ones
                break
            if not actions:
                found = (
                    version,
                    f"entry {version} of its log is {'missing' if actions is None else 'empty or truncated'}",
                )
            removed |= {action["remove"]["path"] for action in actions or () if "remove" in action}
            for add in (action["add"] for action in actions or () if "add" in action):
                path = self.path(add["path"])
                size = self.files.size(path)
                if add["path"] not in removed and size != add["size"]:
                    found = (
                        version,
                        f"{path} is missing" if size is None else f"{path} has {size:,} of {add['size']:,} bytes",
                    )
        return found

    def path(self, name: str) -> str:
        """The path of a data file, given its name in the log."""
        return unquote(name) if "://" in name or name.startswith("/") else f"{self.table}/{unquote(name)}"


def set_cut_aside(spark: SparkSession, table: str, relied_on: int | None, stream: str | None, batches: range) -> None:
    """Renames the newest commits of a local table if a power cut came before all of their files had reached the disk. The table
    is then as it was before those commits.

    `relied_on`: the version that the checkpoint depends on. It stays, and so do older versions. No commit is renamed unless
    all of them belong to these `batches` of the `stream`, which will be written again. If `relied_on` is None (unknown), only
    an incomplete commit that was to create the table is renamed.
    """
    log = Path(local_path(table) or "", "_delta_log")
    while local_path(table) and log.is_dir():
        newest = max((int(name[:20]) for name in os.listdir(log) if re.fullmatch(r"\d{20}\.json", name)), default=-1)
        commits = Commits(spark, str(log.parent), newest)
        damaged, problem = commits.damage()
        is_all = damaged == newest == 0 and commits.actions(0) == []
        if not is_all and (
            relied_on is None
            or damaged <= relied_on
            or not all(
                _is_written_again(commits.actions(version), stream, batches) for version in range(damaged, newest + 1)
            )
        ):
            return
        what_follows = "recreated" if is_all else f"rolled back to version {damaged - 1}"
        say(
            f"{table} is incomplete, perhaps after a power cut: {problem}. It is {what_follows}. The batch is rewritten, "
            "and an interrupted replay can be repeated, so nothing is lost."
        )
        (log / "_last_checkpoint").unlink(missing_ok=True)  # only a hint, which may point to a renamed version
        for version, file in itertools.product(range(newest, damaged - 1, -1), ("checkpoint.parquet", "crc", "json")):
            with suppress(FileNotFoundError):
                (log / f"{version:020}.{file}").rename(log / f".{version:020}.{file}.cut")


def _is_written_again(actions: list[dict[str, Any]] | None, stream: str | None, batches: range) -> bool:
    """Whether a commit belongs to one of these batches, or to a replay that was killed; or changed no rows, or can't be read."""
    transactions = [action["txn"] for action in actions or () if "txn" in action]
    changes = [action[kind] for action in actions or () for kind in ("add", "remove") if kind in action]
    notes = [action["commitInfo"].get("userMetadata") for action in actions or () if "commitInfo" in action]
    return (
        not any(change.get("dataChange", True) for change in changes)
        or REPLAY_NOTE in notes
        or any(each["appId"].removesuffix(AGAIN) == stream and each["version"] in batches for each in transactions)
    )


def contents_note(stream: str, batch_id: int, contents: dict[str, Any]) -> str:
    """The note in a commit that describes the records of a batch."""
    return json.dumps({"stream": stream, "batch": batch_id, "contents": contents})


def sync_commits(spark: SparkSession, table: str, versions: Iterable[int]) -> None:
    """Syncs everything that these versions of a local table have written. Does nothing for other stores."""
    folder = local_path(table)
    if folder is None:
        return
    for version in versions:
        commits = Commits(spark, folder, version)
        entry = f"{folder}/_delta_log/{version:020}"
        sync(
            [
                *(commits.path(action["add"]["path"]) for action in commits.actions(version) or () if "add" in action),
                *(f"{entry}.{kind}" for kind in ("json", "crc", "checkpoint.parquet")),
                f"{folder}/_delta_log/_last_checkpoint",
            ]
        )
