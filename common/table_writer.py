"""Writing a micro-batch of a stream: each record into a table or its quarantine, exactly once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from common.console import PipelineError
from common.readings import with_reject_reason
from common.tables import TOPIC_ID, WRITER, as_identifier, clean_up, create_table, quarantine_of, state_of
from common.topics import Topic

SMALL_BATCH = 10  # tasks that Spark would read it with; such a batch is one file, another one a file for each core
# Rejected records that are kept in memory while a batch is written, by all cores together: so many, of so many bytes at
# most. Where there are more, the batch is read again for them.
MOST_KEPT = 200_000
LONGEST_KEPT = 500
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
        self.appended_to: set[str] = set()  # those of the two tables that this process has written to
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
        spark = batch.sparkSession
        if batch_id == 0:
            owner = {WRITER: self.checkpoint_id} | ({TOPIC_ID: self.topic_id} if self.topic_id else {})
            # The table last: as long as it is not this stream's, nothing was written.
            for table, columns in ((self.quarantine, self.quarantine_columns), (self.table, self.columns)):
                create_table(spark, table, columns, owner, self.adopts)
        for careful in (False, True) if self.read_records else (True,):
            version, last_batch = state_of(spark, self.table, self.checkpoint_id)
            try:
                records = self.read_records(batch, careful) if self.read_records else batch
                counts, rejected = self._write_accepted(records, batch_id, is_repeated=batch_id <= last_batch)
                break
            except (PySparkException, Py4JJavaError):
                if careful:
                    raise
        # An id never comes back: if it is the same now, all of these records are of the same topic.
        if self.topic and self.topic.id() != self.topic_id:
            spark.sql(f"RESTORE TABLE {as_identifier(self.table)} TO VERSION AS OF {version}")
            raise PipelineError(f"{self.topic} was deleted while it was read.")
        if counts.keys() - {None}:
            self._append(rejected, self.quarantine, self.quarantine_columns, batch_id)
        if batch_id % CLEAN_UP_AFTER == CLEAN_UP_AFTER - 1:
            for table in (self.quarantine, self.table):
                clean_up(spark, table)
        # Delta would work this out as the next batch begins; now the records of this one are already visible.
        for table in (self.table, self.quarantine):
            state_of(spark, table, self.checkpoint_id)
        self.counts[batch_id] = counts
        self.batches += 1

    def _write_accepted(self, records: DataFrame, batch_id: int, is_repeated: bool) -> tuple[dict[str | None, int], DataFrame]:
        """Appends the valid ones of `records` to the table, unless the batch is there already.

        Returns the number of records by their reject_reason (None: accepted), and the rejected ones as the quarantine takes
        them. One pass over the records finds all three: what is rejected is little as a rule, and kept in memory.
        """
        spark = records.sparkSession
        cores = spark.sparkContext.defaultParallelism
        is_small = records._jdf.queryExecution().toRdd().getNumPartitions() <= SMALL_BATCH
        records = with_reject_reason(records.coalesce(1 if is_small else cores))
        is_rejected = F.col("reject_reason").isNotNull()
        rejected = records.where(is_rejected).select(*StructType.fromDDL(self.quarantine_columns).names)
        is_kept = is_rejected & (F.coalesce(F.octet_length("raw"), F.lit(0)) <= LONGEST_KEPT)
        most_kept = min(100_000, MOST_KEPT // cores)  # of each task, and Spark's limit
        seen = Observation()
        accepted = records.observe(
            seen,
            # Exact for so few reasons; it counts null too, and takes less time than a count for each.
            F.expr("approx_top_k(reject_reason, 100, 1000)").alias("counts"),
            F.max_by(F.struct(*rejected.columns), F.when(is_kept, 1), most_kept).alias("kept"),
        ).where(~is_rejected).withColumn("raw_json", F.col("raw").cast("string"))
        with _code_generation(spark):
            if is_repeated:
                accepted.write.format("noop").mode("overwrite").save()
            else:
                self._append(accepted, self.table, self.columns, batch_id)
        java = spark._jvm.scala.concurrent
        try:
            found = java.Await.result(seen._jo.future(), java.duration.Duration.create(60, "seconds"))
        except Py4JJavaError as error:
            # Another stream with this checkpoint has just written the batch: then Delta skips it, and nothing is seen.
            raise RuntimeError("a concurrent stream has written the batch") from error
        if found.length() == 0:  # Spark has seen in the plan that it accepts nothing, and left out what observes it
            return dict(map(tuple, records.groupBy("reject_reason").count().collect())), rejected
        counts = {row.get(0): row.get(1) for row in found.getList(0)}
        kept = found.getList(1)  # None for none
        if kept and len(kept) == sum(rows for reason, rows in counts.items() if reason):
            rejected = DataFrame(spark._jsparkSession.createDataFrame(kept, rejected._jdf.schema()), spark).coalesce(1)
        return counts, rejected

    def _append(self, records: DataFrame, table: str, columns: str, batch_id: int) -> None:
        """Appends `records` to `table`, unless its log says that this stream's batch is there: a batch repeated after a
        crash."""
        # Delta counts the small files that this process writes. Those of earlier ones it merges at the first commit, which
        # takes the count below zero: by default it then merges at each commit, until the files are a large one.
        records.sparkSession.conf.set("spark.databricks.delta.autoCompact.modifiedPartitionsOnly.enabled",
                                      table not in self.appended_to)
        self.appended_to.add(table)
        (records.select(*StructType.fromDDL(columns).names).write.format("delta").mode("append")
         .options(txnAppId=self.checkpoint_id, txnVersion=batch_id).save(table))


@contextmanager
def _code_generation(spark: SparkSession) -> Iterator[None]:
    """Generates code for all that is run meanwhile, as is Spark's default."""
    setting = "spark.sql.codegen.factoryMode"
    usual = spark.conf.get(setting)
    spark.conf.set(setting, "FALLBACK")
    try:
        yield
    finally:
        spark.conf.set(setting, usual)
