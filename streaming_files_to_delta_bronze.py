"""JSON files -> Bronze: streams newly added files of sensor readings into a Delta table.

    input/sensor_data/*.json, *.json.gz ──> lake/bronze/sensor_data
                                      └───> lake/bronze/sensor_data_quarantine

A file holds one JSON object per line; with --multiline it holds one JSON value, an object or an array of objects,
pretty-printed or not. Each record is checked against the contract in readings.py (--readings): a valid reading is appended to the
table, any other record to the quarantine beside it, unchanged and with the reason. Every record is in one of the two,
exactly once, whatever is killed. A file that can't be read to its end, or has a line (with --multiline: or is itself) of
more than 8 MB, is named and in the quarantine as a whole (unreadable_file), and the others go on.

Files are taken once, by name: what a file gains after it was read is not seen. So write a file elsewhere, or under a
name that begins with "." or "_", and rename it when it is complete.

    python3 streaming_files_to_delta_bronze.py
    python3 streaming_files_to_delta_bronze.py --once
    python3 streaming_files_to_delta_bronze.py --input /data/readings --multiline
"""

import common.process  # isort: skip  # noqa: F401 # first, so that Ctrl+C during the other imports is clean too

import argparse
import os
import re
from typing import Any

from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, argument_parser, at_least, location, run, warn
from common.contract import load_contract
from common.internals import FileSystem
from common.json_files import escape_glob, find_multiline, read_lines, read_values
from common.process import REPOSITORY, StopFlag
from common.session import build_spark
from common.streams import add_stream_options, run_until_stopped, trigger_of
from common.tables import BRONZE, bronze_tables

MOST_PATTERNS = 100
TAKEN_NAMES = "*.{[jJ][sS][oO][nN]{,[lL]},[nN][dD][jJ][sS][oO][nN]}{,.[gG][zZ]}"  # .json, .jsonl, .ndjson, and with .gz


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    spark = build_spark("files-to-bronze", verbose=options.verbose)
    new_files = list_new_files(spark, options)
    source = FileSource(options.multiline)
    run_until_stopped(spark, [(new_files, trigger_of(options))], source, bronze_tables(options.table, contract.columns), contract, options)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--input", type=location, default=str(REPOSITORY / "input" / "sensor_data"),
                        help="folder that the files are put into")
    parser.add_argument("--multiline", action="store_true", help="a file is one JSON value, an object or an array")
    add_stream_options(parser, BRONZE, str(REPOSITORY / "checkpoints" / "bronze_sensor"), trigger="5 seconds")
    parser.add_argument("--max-files-per-trigger", type=at_least(1), metavar="N", default=1000,
                        help="the most files that one batch takes")
    return parser.parse_args()


def list_new_files(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """New files as a stream: `path`, `length`, `modificationTime` (both of now, each time that they are looked at), and
    `ingest_time`, the start of the batch that takes the file.

    Not what is in them, so that a file that can't be read stops no batch: FileSource reads them.
    """
    if not FileSystem(spark, options.input).is_folder(options.input):
        raise PipelineError(f"No folder {options.input}. Make it, or name another with --input.")
    for place, _, names in os.walk(options.input):  # of a URI there is nothing
        for name in names:
            if re.search("[\ud800-\udfff]", name):
                path = os.path.join(place, name).encode(errors="backslashreplace").decode()
                warn(f"{path} can't be read: its name is not in UTF-8. Rename it.")
    # Of n files whose paths look like patterns Spark makes a list of n * n.
    most_files = options.max_files_per_trigger if escape_glob(options.input) == options.input else min(
        options.max_files_per_trigger, MOST_PATTERNS)
    return (
        spark.readStream.format("binaryFile")
        .schema("path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY")
        .option("pathGlobFilter", TAKEN_NAMES)
        .option("recursiveFileLookup", "true")
        .option("maxFilesPerTrigger", most_files)
        # By default a file that is a week older than the newest one seen is left out, be that one's time in the future.
        .option("maxFileAge", "36500d")
        .option("ignoreMissingFiles", "true")  # renamed or removed since it was listed
        .load(escape_glob(options.input))
        .select("path", "length", "modificationTime", F.current_timestamp().alias("ingest_time"))
    )


class FileSource:
    """Files, whose names come in the batches, as the source of a stream (common/source.py)."""

    def __init__(self, is_multiline: bool):
        self.is_multiline = is_multiline
        self.read = read_values if is_multiline else read_lines
        self.mode = "with --multiline" if is_multiline else "without --multiline"
        self.taken: set[Row] = set()  # the files of the running batch, as they were when it began

    def read_batch(self, batch: DataFrame) -> DataFrame:
        self.taken = set(batch.drop("ingest_time").collect())
        return self.read(batch, careful=False)

    def read_again(self, batch: DataFrame, error: Exception) -> DataFrame:
        return self.read(batch, careful=True)

    def identity(self) -> dict[str, str]:
        return {}

    def is_made_anew(self, identity: dict[str, str], written_from: dict[str, str], unread: dict[str, Any]) -> bool:
        return False

    def check_unread(self, unread: dict[str, Any], checkpoint: str) -> None:
        pass

    def wait_out(self, error: Exception, stopping: StopFlag) -> None:
        raise error

    def after_batch(self, batch: DataFrame, reasons: set[str], quarantine: str) -> None:
        """Names files that changed while they were taken, and those that should be read with --multiline."""
        paths = {file.path for file in self.taken}
        for file in set(batch.drop("ingest_time").collect()) - self.taken:
            if file.path in paths:
                warn(f"{file.path} has changed since it was taken, and what it has gained is not read. Write a file under a "
                     f'name that begins with "_", and rename it when it is complete.')
        if not self.is_multiline and "malformed_json" in reasons:
            for path in find_multiline(batch, quarantine):
                warn(f"{path} holds one JSON value, and its lines were read as records. They are in the quarantine; start with "
                     f"--multiline, and give the file a new name.")

    def note(self, progress: dict[str, Any]) -> None:
        pass

    def lag(self, progress: dict[str, Any]) -> dict[str, int]:
        return {}


if __name__ == "__main__":
    run(main)
