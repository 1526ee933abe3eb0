"""Writing a micro-batch of a stream: each record into a table or its quarantine, exactly once."""

import math
import threading
from collections.abc import Callable

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from common.console import PipelineError
from common.readings import with_reject_reason
from common.tables import TOPIC_ID, WRITER, clean_up, create_table, quarantine_of
from common.topics import Topic


ROWS_PER_FILE = 500_000  # some 2 MB (Bronze) or 7 MB (Silver), which auto compaction leaves alone
CLEAN_UP_AFTER = 1000  # batches, which are half an hour of the default trigger


class Stopped(Exception):
    """Ends a query between two batches."""


class TableWriter:
    """Writes each micro-batch of a stream to `table` and its quarantine: every record to one of them, exactly once.

    `columns`, `quarantine_columns`: DDL of the two tables; `raw_json` is the text of an accepted record.
    `read_records(batch, careful)`: makes of a micro-batch its records, the columns that `with_reject_reason` takes and
    the tables' own; without it the batch is the records. A repeated batch gives the same records. `careful` is true
    where reading them has failed before. `topic`: the one that the records come from, if any.
    """

    def __init__(self, table: str, columns: str, quarantine_columns: str,
                 read_records: Callable[[DataFrame, bool], DataFrame] | None = None, topic: Topic | None = None):
        self.table, self.columns = table, columns
        self.quarantine, self.quarantine_columns = quarantine_of(table), quarantine_columns
        self.read_records, self.topic = read_records, topic
        self.checkpoint_id: str | None = None  # known once the query has started
        self.topic_id = ""
        self.adopts = False  # whether the tables were another stream's before
        self.lock = threading.Lock()  # held while a batch is written
        self.stopping = threading.Event()
        self.counts: dict[int, dict[str | None, int]] = {}  # rows by reject_reason (None: accepted) of a written batch
        self.batches = 0
        self.error: Exception | None = None

    def __call__(self, batch: DataFrame, batch_id: int) -> None:
        with self.lock:
            try:
                if self.stopping.is_set():
                    raise Stopped  # before anything of this batch was written; the next start repeats it
                self.write(batch, batch_id)
            except Exception as error:
                self.error = error
                raise

    def write(self, batch: DataFrame, batch_id: int) -> None:
        """Writes one batch; called with the lock held."""
        if batch_id == 0:
            owner = {WRITER: self.checkpoint_id} | ({TOPIC_ID: self.topic_id} if self.topic_id else {})
            # The table last: as long as it is not this stream's, nothing was written.
            for table, columns in ((self.quarantine, self.quarantine_columns), (self.table, self.columns)):
                create_table(batch.sparkSession, table, columns, owner, self.adopts)
        records, counts = self._read(batch)
        try:
            # An id never comes back: if it is the same now, all of these records are of the same topic.
            if self.topic and self.topic.id() != self.topic_id:
                raise PipelineError(f"{self.topic} was deleted while it was read.")
            rejected = records.where("reject_reason IS NOT NULL")
            accepted = records.where("reject_reason IS NULL").withColumn("raw_json", F.col("raw").cast("string"))
            rows = counts.get(None, 0)
            self._append(rejected, sum(counts.values()) - rows, self.quarantine, self.quarantine_columns, batch_id)
            self._append(accepted, rows, self.table, self.columns, batch_id)
        finally:
            records.unpersist()
        if batch_id % CLEAN_UP_AFTER == CLEAN_UP_AFTER - 1:
            for table in (self.quarantine, self.table):
                clean_up(batch.sparkSession, table)
        self.counts[batch_id] = counts
        self.batches += 1

    def _read(self, batch: DataFrame) -> tuple[DataFrame, dict[str | None, int]]:
        """The batch's records with their reject_reason, kept on disk, and their number by it."""
        for careful in (False, True) if self.read_records else (True,):
            records = None
            try:
                records = with_reject_reason(self.read_records(batch, careful) if self.read_records else batch)
                return records.persist(StorageLevel.DISK_ONLY), _count(records)
            except (PySparkException, Py4JJavaError):
                if records:
                    records.unpersist()
                if careful:
                    raise

    def _append(self, records: DataFrame, rows: int, table: str, columns: str, batch_id: int) -> None:
        """Appends `records`, so many rows, to `table`, unless its log says that this stream's batch is there: a batch
        repeated after a crash."""
        if rows:
            (records.select(*StructType.fromDDL(columns).names).coalesce(math.ceil(rows / ROWS_PER_FILE))
             .write.format("delta").mode("append").options(txnAppId=self.checkpoint_id, txnVersion=batch_id).save(table))


def _count(records: DataFrame) -> dict[str | None, int]:
    return {row.reject_reason: row["count"] for row in records.groupBy("reject_reason").count().collect()}
