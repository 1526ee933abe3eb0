"""The start of a stream: its checkpoint is used by one process at a time, and only together with its own tables."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contract.contract import Contract
from pipeline.delta.commits import Commits, set_cut_aside, sync_commits
from pipeline.delta.private import version_and_last_batch
from pipeline.delta.tables import (
    CONTRACT,
    MODE,
    NO_WRITER,
    REPLACED,
    STARTS_AT,
    WRITER,
    TablePair,
    add_missing_columns,
    history_of,
    properties_of,
    set_properties,
)
from pipeline.paths import local_path, quarantine_of
from pipeline.spark.file_system import FileSystem
from pipeline.streaming.private import READ_AGAIN, Checkpoint
from pipeline.streaming.source import Source
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say

from filelock import FileLock, Timeout
from pyspark.sql import SparkSession


@contextmanager
def lock_checkpoint(path: str) -> Iterator[None]:
    """Locks the checkpoint at `path` against other processes of this machine. Raises PipelineError if it is locked already.

    Other stores (`s3a://…`) have no such lock: Spark lets only one of two streams write a batch into the checkpoint, and the
    other fails. In a store without atomic rename, both may succeed if they write at the same moment.
    """
    local = local_path(path)
    if local is None:
        yield
        return
    real = Path(os.path.realpath(local))  # the same path, whatever links lead to it
    place = real.with_name(f".{real.name}.lock")  # next to the checkpoint, which may be deleted or moved
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place, blocking=False).acquire()
    except Timeout:
        raise PipelineError(in_use_message(path)) from None
    except OSError as error:
        raise PipelineError(
            f"{place}, the lock of the checkpoint, can't be written: {error.strerror}. Make room for it, give this "
            f"user permission, or name another place with --checkpoint."
        ) from error
    with lock:
        yield


def require_separate_places(options: argparse.Namespace) -> None:
    """Raises PipelineError if the stream uses a folder inside a table, where VACUUM would delete it. Checks local paths only."""
    ours = {
        os.path.realpath(table) for table in map(local_path, (options.table, quarantine_of(options.table))) if table
    }
    for option in ("checkpoint", "input", "archive"):
        place = local_path(getattr(options, option, None) or "")
        inner = Path(os.path.realpath(place or ""), "…")  # the table's folder itself is not allowed either
        for table in inner.parents if place else ():
            is_table = str(table) in ours or (table / "_delta_log").is_dir()
            if is_table and inner.relative_to(table).parts[0][0] not in "._":  # VACUUM leaves such names alone
                raise PipelineError(
                    f"--{option} {place} must not be in the table {table}, whose clean-up would delete it. "
                    f"Name another place."
                )


def in_use_message(path: str) -> str:
    return (
        f"Another stream is using the checkpoint {path}. Stop that one, or give this one a --table and a --checkpoint "
        f"of its own."
    )


@dataclass(frozen=True)
class Start:
    """The result of the start checks: the stream's `checkpoint`, the `identity` of its source, and the contract and mode that it
    is `read_by`, the latter two as table properties.
    """

    checkpoint: Checkpoint
    identity: dict[str, str]
    read_by: dict[str, str]


def check_start(
    spark: SparkSession, source: Source, tables: TablePair, contract: Contract, checkpoint_path: str
) -> Start:
    """Checks that checkpoint, tables, source and contract belong together, and that the tables have the contract's columns.

    Raises PipelineError if continuing would lose records (read according to the checkpoint, but not in the tables) or write
    them twice.
    """
    checkpoint = Checkpoint(spark, checkpoint_path)
    checkpoint.drop_cut_id()
    relied_on = checkpoint.last_batch().get("versions", {})
    not_done = range(checkpoint.last_done + 1, checkpoint.last_begun() + 1)
    set_cut_aside(spark, tables.table, relied_on.get("table"), checkpoint.id(), not_done)
    set_cut_aside(spark, tables.quarantine, relied_on.get("quarantine"), checkpoint.id(), not_done)
    properties = {table: properties_of(spark, table) for table in (tables.table, tables.quarantine)}
    checkpoint.drop_cut_entries(_last_written(spark, checkpoint, properties))
    checkpoint = _finish_starting_over(spark, checkpoint, tables, properties)
    written_from = properties[tables.table] or {}
    # A new checkpoint without a batch begins at the place noted when a loss was accepted.
    unread = checkpoint.unread() or json.loads(written_from.get(STARTS_AT) or "{}")
    identity = source.identity()
    is_ours = written_from.get(WRITER, NO_WRITER) in (NO_WRITER, checkpoint.id())
    if is_ours and source.require_same_source(identity, written_from, unread):
        checkpoint = _start_over(spark, source, checkpoint, tables, properties, unread, identity | {STARTS_AT: ""})
        unread = {}
    _check_tables(spark, checkpoint, properties, tables)
    last_records = checkpoint.last_batch().get("last_records")
    planned = checkpoint.end_of(checkpoint.last_begun())
    place = source.require_unread_records(spark, tables, unread, planned, checkpoint.path, last_records)
    if place is not None:
        checkpoint = _start_over(spark, source, checkpoint, tables, properties, unread, {STARTS_AT: place})
    source.begin_at((properties[tables.table] or {}).get(STARTS_AT, ""))
    read_by = {CONTRACT: contract.id, MODE: source.mode}
    start = Start(checkpoint, identity, read_by)
    if written_from:
        _fit_table(spark, tables, written_from, start, source.notes)
    if of_quarantine := properties[tables.quarantine]:
        add_missing_columns(spark, tables.quarantine, tables.quarantine_columns)
        _set_changed(spark, tables.quarantine, of_quarantine, history_of(tables.keep_history))
    return start


def _last_written(spark: SparkSession, checkpoint: Checkpoint, properties: dict[str, dict[str, str] | None]) -> int:
    """The last batch in either table, given their `properties`. After a power cut, the quarantine may have a batch that the table
    lacks.
    """
    return max(
        (
            version_and_last_batch(spark, table, checkpoint.id())[1]
            for table, found in properties.items()
            if found is not None
        ),
        default=-1,
    )


def _start_over(
    spark: SparkSession,
    source: Source,
    checkpoint: Checkpoint,
    tables: TablePair,
    properties: dict[str, dict[str, str] | None],
    begin: dict[str, Any],
    changed: dict[str, str],
) -> Checkpoint:
    """Sets the checkpoint aside and frees its tables for a new one, which it returns.

    `begin`: where the unfinished batch begins. `changed`: further properties for the table.
    """
    if properties[tables.table] is None:  # nothing has been written yet
        if properties[tables.quarantine] is not None:
            properties[tables.quarantine] = set_properties(spark, tables.quarantine, {WRITER: NO_WRITER})
        return _set_aside(spark, checkpoint)
    written = _last_written(spark, checkpoint, properties)
    if written > checkpoint.last_done:  # the new checkpoint will know nothing about this batch
        source.take_back(spark, tables, begin, checkpoint.end_of(written))
    # A checkpoint that has written nothing may not own the table yet.
    replaced = (properties[tables.table] or {})[WRITER] or checkpoint.id() or NO_WRITER
    # This is a single commit. If a crash interrupts the steps after it, the next start completes them.
    changed = {WRITER: NO_WRITER, REPLACED: replaced} | changed
    properties[tables.table] = set_properties(spark, tables.table, changed)
    for table in (tables.table, tables.quarantine):
        version, _ = version_and_last_batch(spark, table, None)
        sync_commits(spark, table, range(max(0, version - 2), version + 1))  # includes the commit of `take_back`
    return _finish_starting_over(spark, checkpoint, tables, properties)


def _finish_starting_over(
    spark: SparkSession, checkpoint: Checkpoint, tables: TablePair, properties: dict[str, dict[str, str] | None]
) -> Checkpoint:
    """Frees the quarantine and sets the checkpoint aside if the table no longer belongs to them. Returns the checkpoint to use."""
    of_table, of_quarantine = properties[tables.table] or {}, properties[tables.quarantine]
    if of_table.get(WRITER) != NO_WRITER or REPLACED not in of_table:
        return checkpoint
    if of_quarantine is not None and of_quarantine.get(WRITER) == of_table[REPLACED]:
        properties[tables.quarantine] = set_properties(spark, tables.quarantine, {WRITER: NO_WRITER})
    if checkpoint.id() != of_table[REPLACED]:
        return checkpoint
    return _set_aside(spark, checkpoint)


def _set_aside(spark: SparkSession, checkpoint: Checkpoint) -> Checkpoint:
    say(f"The old checkpoint is now {checkpoint.set_aside()}.")
    return Checkpoint(spark, checkpoint.path)


def _check_tables(
    spark: SparkSession, checkpoint: Checkpoint, found: dict[str, dict[str, str] | None], tables: TablePair
) -> None:
    """`found`: the properties of both tables, None for a table that does not exist."""
    for table, properties in found.items():
        if properties is None and checkpoint.last_done >= 0:
            raise PipelineError(
                f"The checkpoint {checkpoint.path} has batches that were written to {table}, but there is no "
                f"such table. Put the table back, or {READ_AGAIN}."
            )
        # Files other than hidden ones, such as .gitkeep and an unfinished _delta_log.
        in_the_way = [name for name in FileSystem(spark, table).names_in(table) if name[0] not in "._"]
        if properties is None and in_the_way or properties is not None and WRITER not in properties:
            raise PipelineError(
                f"There is something at {table} that this pipeline did not create. Name another place with --table."
            )
        is_free = properties is not None and properties[WRITER] == NO_WRITER and checkpoint.last_done < 0
        if properties is not None and properties[WRITER] != checkpoint.id() and not is_free:
            raise PipelineError(
                f"The table {table} was not written with the checkpoint {checkpoint.path}, so rows could be written "
                f"twice. Give the checkpoint that belongs to it (--checkpoint), or {READ_AGAIN}."
            )
        version, written = (-1, -1) if properties is None else version_and_last_batch(spark, table, checkpoint.id())
        # A batch is in the table before it counts as done, and in the quarantine only if it has rejected records.
        is_older = table == tables.table and written < checkpoint.last_done
        if is_older or written > checkpoint.last_begun():
            raise PipelineError(
                f"The {'table' if is_older else 'checkpoint'} is an older copy: {table} has batch {written} of the "
                f"checkpoint {checkpoint.path}, which has {checkpoint.last_done}. Continuing would lose records. "
                f"Restore both and the quarantine as of the same moment, or {READ_AGAIN}."
            )
        if properties is not None:
            _check_commits(
                Commits(spark, table, version), checkpoint, "table" if table == tables.table else "quarantine"
            )


def _check_commits(commits: Commits, checkpoint: Checkpoint, role: str) -> None:
    """Raises PipelineError if a table has lost one of its newest commits or files, or has its last batch from another
    checkpoint. `role`: `table` or `quarantine`.
    """
    _, damage = commits.damage()
    if damage:
        raise PipelineError(
            f"The table {commits.table} is damaged: {damage}. Restore it and its checkpoint from a backup, or "
            f"{READ_AGAIN}."
        )
    note = checkpoint.last_batch()
    written = note.get("versions", {}).get(role, -1)
    if commits.newest < written:
        raise PipelineError(
            f"The table is an older copy: {commits.table} has version {commits.newest}, but the checkpoint "
            f"{checkpoint.path} belongs to version {written}. Continuing would lose records. Restore both tables and "
            f"the checkpoint as of the same moment, or {READ_AGAIN}."
        )
    if role == "table" and "batch" in note:
        planned = checkpoint.end_of(note["batch"])
        require_same_contents(
            commits, checkpoint, note["batch"], note["contents"] if planned == note["end"] else planned
        )


def require_same_contents(commits: Commits, checkpoint: Checkpoint, batch_id: int, contents: dict[str, Any]) -> None:
    """Raises PipelineError if the table has a batch with this number but other contents, written by a copy of the checkpoint."""
    if commits.contents_of(checkpoint.id() or "", batch_id) not in (None, contents):
        raise PipelineError(
            f"Batch {batch_id} in {commits.table} does not match the checkpoint {checkpoint.path}, because somebody "
            "used a copy of it. Continuing would lose records. Use the other copy, or "
            f"{READ_AGAIN}."
        )


def _fit_table(
    spark: SparkSession, tables: TablePair, properties: dict[str, str], start: Start, notes: dict[str, str]
) -> None:
    """Adapts the table, which has these `properties`, to the contract's columns, and adds the source's `notes`.

    Raises PipelineError if that is impossible, or if a batch is only partly written and would now be read with another
    contract or in another mode: some of its records would end up in both tables, or in none.
    """
    is_changed = any(properties.get(name, value) != value for name, value in start.read_by.items())
    if (
        is_changed
        and _last_written(spark, start.checkpoint, dict.fromkeys((tables.table, tables.quarantine), properties))
        > start.checkpoint.last_done
    ):
        raise PipelineError(
            f"The last batch of {tables.table} is unfinished, and was begun with a different contract or mode (now "
            f"{start.read_by[MODE]}). Run the stream once as before (--readings FILE --once), then with the new settings."
        )
    add_missing_columns(spark, tables.table, tables.columns)
    # An earlier start may not have known the identity.
    wanted = start.identity | properties | start.read_by | notes | history_of(tables.keep_history)
    _set_changed(spark, tables.table, properties, wanted)


def _set_changed(spark: SparkSession, table: str, properties: dict[str, str], wanted: dict[str, str]) -> None:
    """Sets those of the `wanted` properties that differ from the table's `properties`."""
    if changed := {name: value for name, value in wanted.items() if properties.get(name) != value}:
        set_properties(spark, table, changed)
