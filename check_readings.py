"""Tests a contract on a sample of records, or drafts one from it. Writes nothing.

It prints how many records are accepted, the reasons for rejecting the others (each with an example), the fields outside the
contract, and the first accepted records. A sample is a file with a record per line, or the newest messages of a topic.

    python3 check_readings.py sample.jsonl --readings my.py
    python3 check_readings.py --topic sensor_data --newest 500
    python3 check_readings.py sample.jsonl --draft > my.py
"""

import argparse
import sys

from pipeline.contract.contract import add_readings_option, in_file, load_contract
from pipeline.kafka.topics import Topic, add_topic_options
from pipeline.sample.draft import draft_contract
from pipeline.sample.records import of_file, of_topic
from pipeline.sample.report import report
from pipeline.spark.session import READER_JVM, build_spark
from pipeline.terminal.arguments import argument_parser, at_least, location
from pipeline.terminal.script import run


def main() -> None:
    options = parse_options()
    contract = None if options.draft else load_contract(options.readings)
    topic = None if options.sample else Topic.of(options)
    if topic:
        topic.wait(options.wait)
    spark = build_spark("check-readings", READER_JVM, options.verbose)
    records = of_topic(spark, topic, options.newest) if topic else of_file(spark, options.sample, options.multiline)
    if contract is None:
        columns = ["raw", "kafka_key"] if topic else ["raw"]
        rows = records.where("raw IS NOT NULL").select(columns).limit(options.newest).collect()
        keys = [row.kafka_key and bytes(row.kafka_key) for row in rows] if topic else []
        sys.stdout.write(draft_contract([bytes(row.raw) for row in rows], options.sample or str(topic), keys))
        return
    with in_file(options.readings):
        contract.check(spark, has_keys=topic is not None, has_arrays=not options.multiline)
    report(records, contract)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "sample", nargs="?", type=location, metavar="FILE", help="the sample; without it, --topic is read"
    )
    parser.add_argument("--multiline", action="store_true", help="the file is one JSON value, an object or an array")
    parser.add_argument("--draft", action="store_true", help="print a draft contract for the sample, not a report")
    add_readings_option(parser)
    parser.add_argument(
        "--newest",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="number of messages to read from the topic, or of records to draft a contract from",
    )
    add_topic_options(parser)
    options = parser.parse_args()
    if options.sample and any(argument.partition("=")[0] == "--topic" for argument in sys.argv):
        parser.error("the sample is either FILE or --topic")
    return options


if __name__ == "__main__":
    run(main)
