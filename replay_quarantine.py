"""Judges rejected records again by the current contract, and moves the valid ones from the quarantine to the table.

    lake/silver/sensor_data_quarantine ──> lake/silver/sensor_data

Correct the contract first, and restart the stream, so that new records are judged by it, too. A row that moves keeps its origin and
its ingest_time. The others stay, and get their new reason. Each record ends up in exactly one of the two tables, even if the script
is killed: the next run finishes or undoes the interrupted part. The stream may keep running; it waits while a part of the
quarantine (at most 200,000 rows or 500 MB) is moved. docs/rejected.md says what never moves, and what to do in a bucket.

    python3 replay_quarantine.py lake/silver/sensor_data --dry-run
    python3 replay_quarantine.py lake/silver/sensor_data
    python3 replay_quarantine.py lake/silver/sensor_data --reason unknown_type --since "2026-11-20 08:00:00"
    python3 replay_quarantine.py lake/bronze/sensor_data --readings my.py
"""

import argparse
import time
from collections import Counter

from pipeline.contract.columns import BEFORE
from pipeline.contract.contract import Contract, add_readings_option, in_file, load_contract
from pipeline.contract.fields import sql_text
from pipeline.delta.replay import Replay, Verdict, replaying
from pipeline.delta.tables import CONTRACT, MODE, TablePair, bronze_tables, properties_of, silver_tables
from pipeline.paths import local_path
from pipeline.readers.printing import read_table, show_lines
from pipeline.sample.report import with_examples
from pipeline.spark.private import free_checkpoints
from pipeline.spark.session import build_spark
from pipeline.terminal.arguments import argument_parser, table_location, utc_time
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say, warn
from pipeline.terminal.script import run
from pipeline.terminal.signals import StopFlag, Stopped, on_stop_signal

from pyspark.sql import SparkSession

STREAMS = "python3 spark_kafka_consumer.py or python3 streaming_files_to_delta_bronze.py"


def main() -> None:
    options = parse_options()
    contract = load_contract(options.readings)
    spark = build_spark("replay-quarantine", verbose=options.verbose)
    tables = tables_at(spark, options, contract)
    replay = Replay(spark, tables, contract, selection(options))
    if options.dry_run:
        preview(replay)
    else:
        move(replay)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("table", type=table_location, metavar="TABLE", help="path of the table (not of its quarantine)")
    add_readings_option(parser)
    parser.add_argument(
        "--reason",
        action="append",
        metavar="REASON",
        help="judge only the records with this reject_reason; may be given several times",
    )
    parser.add_argument(
        "--since",
        type=utc_time,
        metavar="T",
        help='judge only records with an ingest_time of T (in UTC) or later, such as "2026-11-20 08:00:00"',
    )
    parser.add_argument(
        "--until", type=utc_time, metavar="T", help="judge only records with an ingest_time before T (in UTC)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; show how many would move, and examples of those that would not",
    )
    return parser.parse_args()


def tables_at(spark: SparkSession, options: argparse.Namespace, contract: Contract) -> TablePair:
    """The table and its quarantine. Raises PipelineError if there are none, or if the contract does not suit them."""
    columns = read_table(spark, options.table, STREAMS).columns
    make_tables = silver_tables if "offset" in columns else bronze_tables
    tables = make_tables(options.table, contract.columns, None, bool(contract.array))
    rejected = read_table(spark, tables.quarantine, STREAMS).columns
    if not {"ingest_time", "raw", "reject_reason", *tables.origin} - {"element"} <= {*rejected}:
        raise PipelineError(
            f"{options.table} is not a table of this pipeline, so its rejected records can't be replayed."
        )
    properties = properties_of(spark, options.table) or {}
    with in_file(options.readings):
        contract.check(spark, has_keys="kafka_key" in columns, has_arrays=properties.get(MODE) != "with --multiline")
    if properties.get(CONTRACT, contract.id) != contract.id:
        warn(f"The stream of {options.table} last ran with a different contract from the one in {options.readings}.")
    return tables


def selection(options: argparse.Namespace) -> str:
    """SQL: whether a row of the quarantine is to be judged again."""
    conditions = ["true"]
    if options.reason:
        conditions.append(f"reject_reason IN ({', '.join(map(sql_text, options.reason))})")
    if options.since is not None:
        conditions.append(f"ingest_time >= timestamp_micros({options.since})")
    if options.until is not None:
        conditions.append(f"ingest_time < timestamp_micros({options.until})")
    return " AND ".join(conditions)


def preview(replay: Replay) -> None:
    """Prints the verdicts on the selected records, with an example of each kind that is not valid."""
    verdicts, examples = Counter[Verdict](), dict[Verdict, str]()
    for part in replay.parts():
        judged = replay.judge(replay.quarantine.where(f"{replay.selected} AND {part}"))
        for before, now, count, example in with_examples(judged, replay.contract, BEFORE, "reject_reason"):
            if before is not None:  # otherwise, the reading was originally accepted
                verdicts[Verdict(before, now)] += count
                examples.setdefault(Verdict(before, now), example or "")
        free_checkpoints(replay.spark)
    if verdicts:
        lines = [(*verdict, count, examples[verdict]) for verdict, count in verdicts.most_common()]
        lines = [(before, now or "valid", count, example) for before, now, count, example in lines]
        show_lines(replay.spark, ("reject_reason", "now", "readings", "example"), lines)
        say("")
    say(
        f"{moved(verdicts):,} of {verdicts.total():,} rejected readings would move to {replay.tables.table}. Nothing was written."
    )


def move(replay: Replay) -> None:
    """Moves the valid ones of the selected records, part by part, until a signal arrives."""
    stopping, tables = StopFlag(), replay.tables
    on_stop_signal(stopping.set)
    verdicts = Counter[Verdict]()
    if local_path(tables.table) is None:
        warn(
            f"{tables.table} can't be locked. Make sure that neither its stream nor another replay is running: otherwise, readings "
            f"could be written twice or lost."
        )
    with replaying(replay.spark):
        try:
            with tables.write_lock(stopping):
                if finished := replay.prepare():
                    say(f"Finished or undid an interrupted replay of {finished:,} rows.")
                parts = replay.parts()
            for number, part in enumerate(parts, 1):
                if stopping.is_set():
                    raise Stopped
                begin = time.monotonic()
                with tables.write_lock(stopping):
                    found = replay.move(part)
                verdicts += found
                say(
                    f"part {number} of {len(parts)}: {found.total():,} readings, {moved(found):,} moved, "
                    f"{time.monotonic() - begin:.1f} s"
                )
        except Stopped:
            say("Stopped. The next run continues with the remaining records.")
    if verdicts:
        lines = [(before, now or "moved", count) for (before, now), count in verdicts.most_common()]
        say("")
        show_lines(replay.spark, ("reject_reason", "now", "readings"), lines)
        say("")
    say(f"{moved(verdicts):,} of {verdicts.total():,} rejected readings moved to {tables.table}.")


def moved(verdicts: Counter[Verdict]) -> int:
    return sum(count for verdict, count in verdicts.items() if verdict.now is None)


if __name__ == "__main__":
    run(main)
