"""JSON files -> Bronze: streams newly added files of sensor readings into a Delta table.

    input/sensor_data/*.json, *.json.gz ──> lake/bronze/sensor_data
                                      └───> lake/bronze/sensor_data_quarantine

A file holds one JSON object per line or, with --multiline, one JSON value: an object or an array of objects,
pretty-printed or not. Each record is checked against the contract in readings.py (--readings). Valid readings are
appended to the table; all other records go to its quarantine, unchanged and with a reason. Every record ends up in one
of the two, exactly once, no matter what is killed. A broken .gz, or a file with a line of more than 8 MB (with
--multiline, a file of more than 8 MB), is reported and goes to the quarantine as a whole (unreadable_file); the stream
continues with the other files. A disk or store error stops the stream, and the next start reads the file.

A file is read once, and is identified by its name. Content added later is not read, but is reported. So write a
file elsewhere, or under a name or in a folder that begins with "." or "_", and rename it once it is complete.

    python3 streaming_files_to_delta_bronze.py
    python3 streaming_files_to_delta_bronze.py --once
    python3 streaming_files_to_delta_bronze.py --input /data/readings --multiline
"""

import argparse

from pipeline.contract.contract import load_contract
from pipeline.delta.tables import bronze_tables
from pipeline.files.folder import list_new_files
from pipeline.files.source import FileSource
from pipeline.paths import BRONZE, REPOSITORY
from pipeline.spark.session import build_spark
from pipeline.streaming.query import add_stream_options, parse_stream_options, run_until_stopped, trigger_of
from pipeline.terminal.arguments import argument_parser, at_least, location
from pipeline.terminal.script import run


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    spark = build_spark("files-to-bronze", verbose=options.verbose)
    new_files = list_new_files(spark, options)
    source = FileSource(spark, options)
    run_until_stopped(
        spark,
        [(new_files, trigger_of(options))],
        source,
        bronze_tables(options.table, contract.columns, options.keep_history, bool(contract.array)),
        contract,
        options,
    )


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--input",
        type=location,
        default=str(REPOSITORY / "input" / "sensor_data"),
        help="folder to read new files from",
    )
    parser.add_argument("--multiline", action="store_true", help="a file is one JSON value, an object or an array")
    parser.add_argument(
        "--archive",
        type=location,
        metavar="FOLDER",
        help="move files there, keeping their full path, some time after their records were written",
    )
    add_stream_options(parser, BRONZE, trigger="5 seconds")
    parser.add_argument(
        "--max-files-per-trigger",
        type=at_least(1),
        metavar="N",
        default=1000,
        help="maximum number of files per batch",
    )
    parser.add_argument(
        "--max-unpacked",
        type=at_least(1),
        metavar="MB",
        default=1000,
        help="maximum size of an unpacked .gz file, counting each line as at least 50 bytes; a larger one goes to the quarantine as "
        "unreadable_file",
    )
    return parse_stream_options(parser)


if __name__ == "__main__":
    run(main)
