"""The shared implementation of read_bronze.py and read_silver.py."""

from pipeline.paths import quarantine_of
from pipeline.readers.printing import add_reader_options, newest_rows, read_table, show
from pipeline.spark.session import READER_JVM, build_spark
from pipeline.terminal.arguments import argument_parser, table_location
from pipeline.terminal.messages import say
from pipeline.terminal.script import has_no_end


def show_latest(manual: str, default_table: str, written_by: str) -> None:
    """Runs a reader script: options, session, the newest rows, the number of rows. `written_by`: the command that creates the
    table, for users who don't have one yet.
    """
    parser = argument_parser(manual)
    parser.add_argument("--table", type=table_location, default=default_table, help="Delta table")
    parser.add_argument("--rejected", action="store_true", help="show the table's quarantine instead")
    parser.add_argument(
        "--without",
        action="append",
        metavar="REASON",
        help="with --rejected, leave out records with this reject_reason, such as duplicate; may be given several times",
    )
    parser.add_argument("--raw", action="store_true", help="show whole records, as they arrived")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="keep running: on a terminal, show the newest rows in place; otherwise, print each new row as a line",
    )
    add_reader_options(parser)
    options = parser.parse_args()
    if options.without and not options.rejected:
        parser.error("--without needs --rejected, because accepted records have no reject_reason")
    if options.follow:
        has_no_end()

    spark = build_spark("reader", READER_JVM, options.verbose)
    if options.follow:
        from pipeline.readers.follow import follow

        follow(spark, options)
        return
    accepted = read_table(spark, options.table, written_by)
    rejected = read_table(spark, quarantine_of(options.table), written_by)
    show(newest_rows(spark, options), options.limit, options.format, whole=options.raw)
    if options.format == "table":
        say(f"{accepted.count():,} rows in {options.table}")
        say(f"{rejected.count():,} rows in {quarantine_of(options.table)}")
