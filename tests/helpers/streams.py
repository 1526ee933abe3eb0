"""Streams that run in the tests' session."""

from collections.abc import Iterable
from pathlib import Path

from pipeline.delta.tables import bronze_tables
from pipeline.kafka.source import KafkaSource
from pipeline.streaming.private import Checkpoint
from pipeline.streaming.query import run_query
from pipeline.streaming.source import Source
from pipeline.streaming.start import Start, check_start
from pipeline.streaming.writer import NoMetrics, TableWriter
from pipeline.terminal.signals import StopFlag

import pytest

from readings import CONTRACT


class GivenRecords(Source):
    """A source whose batches already are the records."""

    mode = "as given"


def bronze_writer(spark, table: Path, contract=CONTRACT) -> TableWriter:
    """A writer of batches of records to a Bronze table."""
    start = Start(Checkpoint(spark, f"{table}_checkpoint"), {}, {})
    return TableWriter(bronze_tables(str(table), contract.columns), contract, GivenRecords(), start)


def run_streams(spark, streams: Iterable, source, tables, options, writer_type=TableWriter) -> None:
    """Runs streams on everything available, as their script does with --once."""
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # as in a new process
    start = check_start(spark, source, tables, CONTRACT, options.checkpoint)
    for stream, trigger in streams:
        _, error = run_query(
            stream, trigger, writer_type(tables, CONTRACT, source, start), options.checkpoint, StopFlag(), NoMetrics()
        )
        if isinstance(source, KafkaSource) and source.last.reader:
            source.last.reader.close()
            source.last.reader = None
        if error:
            raise error


def plan(run, **options) -> None:
    """Lets a stream plan a batch, and stops it before any of the batch is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(**options)
