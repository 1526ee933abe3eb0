"""Private APIs of Spark's file stream: the files planned for a micro-batch, and its log of the files that it has read.

Without them, a file that vanishes while its batch is running, or that changes later, would go unnoticed.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pipeline.paths import local_path, plain
from pipeline.spark.file_system import FileSystem
from pipeline.streaming.private import damaged_message, query_of
from pipeline.terminal.errors import PipelineError

from pyspark.sql import DataFrame, SparkSession


def planned_files(batch: DataFrame) -> list[str]:
    """The paths of the files planned for this micro-batch, as recorded in the checkpoint. The rows of the batch itself omit files
    that no longer exist.
    """
    leaves = query_of(batch)._jsq.streamingQuery().lastExecution().analyzed().collectLeaves()
    [files] = [leaf.relation().location() for leaf in map(leaves.apply, range(leaves.size()))]
    return sorted(files.rootPaths().mkString("\n").split("\n"))


class TakenFile(NamedTuple):
    """`entry`: the number of the log entry that lists the file. `modified`: its modification time in milliseconds since 1970."""

    entry: int
    modified: int


class FileLog:
    """Spark's log of the files that a stream has read, in its checkpoint (CompactibleFileStreamLog in its source): one entry per
    batch in the file N. Every tenth entry is the file N.compact instead, which also contains all earlier entries.
    """

    def __init__(self, spark: SparkSession, checkpoint: str):
        self.checkpoint, self.files = checkpoint, FileSystem(spark, checkpoint)
        self.local = local_path(checkpoint)  # which Python lists in a tenth of the time

    def after(self, last: int) -> tuple[int, dict[str, TakenFile]]:
        """The number of the newest entry, and the files of all entries after `last`, by path, in the order of the log."""
        names = {
            int(match[1]): match[0]
            for name in sorted(self._names())
            if (match := re.fullmatch(r"(\d+)(\.compact)?", name))
        }
        new = sorted(number for number in names if number > last)
        compact = max((number for number in new if names[number].endswith(".compact")), default=-1)
        taken: dict[str, TakenFile] = {}
        for number in new:
            if number >= compact:
                file = f"sources/0/{names[number]}"
                # Not splitlines(): a name may contain a Unicode line separator.
                lines = self._read(file).split("\n")[1:]
                try:
                    entries = [TakenFile(entry["batchId"], entry["timestamp"]) for entry in map(json.loads, lines)]
                    paths = [plain(unquote(json.loads(line)["path"])) for line in lines]
                except (ValueError, KeyError) as error:
                    raise PipelineError(
                        damaged_message(self.checkpoint, f"{file} does not have Spark's format")
                    ) from error
                taken |= {path: entry for path, entry in zip(paths, entries) if entry.entry > last}
        return new[-1] if new else last, taken

    def _names(self) -> list[str]:
        if self.local is None:
            return self.files.names_in(f"{self.checkpoint}/sources/0")
        return os.listdir(f"{self.local}/sources/0") if os.path.isdir(f"{self.local}/sources/0") else []

    def _read(self, file: str) -> str:
        if self.local is None:
            return self.files.read(f"{self.checkpoint}/{file}") or ""
        return Path(self.local, file).read_text(encoding="utf-8")
