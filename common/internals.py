"""The uses of private APIs of Spark, Delta and Hadoop while a script runs, with the reason for each.

common/session.py has those by which a session starts.
"""

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, cast

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JJavaError
from pyspark.java_gateway import ensure_callback_server_started
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql.streaming.query import StreamingQuery

from common.console import java_causes, java_class, root_cause


def without_pandas(module: str) -> None:
    """Imports a module as if pandas and what it needs were not installed."""
    hidden = ("numpy", "pandas", "pyarrow")
    there = {name: sys.modules.get(name) for name in hidden}
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: there is no such module
    importlib.import_module(module)
    for name, found in there.items():
        if found:
            sys.modules[name] = found
        else:
            del sys.modules[name]


# F.lit imports this module, only to know whether it may have been given something of theirs. Where they are installed, for
# dashboard.py, that would take a second of each start and print a warning about their versions.
without_pandas("pyspark.testing.utils")


def _java(spark: SparkSession) -> Any:
    """The classes of the session's JVM by their names: PySpark has no other way to what follows here."""
    return spark._jvm


OUT_OF_MEMORY = "java.lang.OutOfMemoryError"


class BrokenFileError(Exception):
    """A file has been read, but its content can't be unpacked."""


class FileSystem:
    """The file system of a path, as Spark sees it: Python alone does not reach every one of them (`s3a://…`)."""

    def __init__(self, spark: SparkSession, path: str, **settings: str):
        self._java = _java(spark)
        hadoop = self._java.org.apache.hadoop.conf.Configuration(spark._jsc.hadoopConfiguration())
        for name, value in settings.items():
            hadoop.set(name, value)
        self._files = self._path(path).getFileSystem(hadoop)

    def _path(self, path: str) -> Any:
        return self._java.org.apache.hadoop.fs.Path(path)

    def qualified(self, path: str) -> str:
        """The path with the file system's scheme, as the paths of what is in it come."""
        return self._files.makeQualified(self._path(path)).toString()

    def is_folder(self, path: str) -> bool:
        return self._files.exists(self._path(path)) and self._files.getFileStatus(self._path(path)).isDirectory()

    def names_in(self, folder: str) -> list[str]:
        """The names in a folder; none if there is no such folder."""
        return [status.getPath().getName() for status in self._statuses(folder)]

    def folders_in(self, folder: str) -> list[str]:
        """The paths of the folders in a folder."""
        return [status.getPath().toString() for status in self._statuses(folder) if status.isDirectory()]

    def _statuses(self, folder: str) -> list[Any]:
        return list(self._files.listStatus(self._path(folder))) if self.is_folder(folder) else []

    def read(self, path: str) -> str | None:
        """The text of a file; None if there is none."""
        if not self._files.exists(self._path(path)):
            return None
        with self._open(path) as content:
            return self._java.org.apache.commons.io.IOUtils.toString(content, "UTF-8")

    def unpacked_size(self, path: str, limit: int) -> int:
        """The bytes in a .gz file, read as Spark reads it; `limit` + 1 if there are more than `limit`.

        Raises BrokenFileError if it can't be unpacked, and Py4JJavaError if it can't be read.
        """
        hadoop, io = self._java.org.apache.hadoop, self._java.org.apache.commons.io
        codec = hadoop.io.compress.CompressionCodecFactory(self._files.getConf()).getCodec(self._path(path))
        with self._open(path) as content:
            # It knows its own errors: those of the disk, the store, the network. An error of another is the unpacking's.
            packed = io.input.TaggedInputStream(content)
            try:
                return io.IOUtils.copyLarge(codec.createInputStream(packed), io.output.NullOutputStream.INSTANCE, 0, limit + 1)
            except Py4JJavaError as error:
                is_io = self._java.java.io.IOException._java_lang_class.isInstance  # Hadoop makes an Error of an error of the disk
                if any(packed.isCauseOf(cause) or not is_io(cause) for cause in java_causes(error)):
                    raise
                raise BrokenFileError(root_cause(error)) from error

    @contextmanager
    def _open(self, path: str) -> Iterator[Any]:
        content = self._files.open(self._path(path))
        try:
            yield content
        finally:
            content.close()

    def write(self, path: str, text: str) -> None:
        """Creates or replaces a file. This is atomic on object stores; on HDFS a crash may leave half of the file."""
        content = self._files.create(self._path(path), True)
        try:
            content.write(text.encode())
        finally:
            content.close()

    def size(self, path: str) -> int | None:
        """The bytes in a file; None if there is none."""
        return self._files.getFileStatus(self._path(path)).getLen() if self._files.exists(self._path(path)) else None

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with all that is in it; does nothing if there is none."""
        self._files.delete(self._path(path), True)

    def rename(self, old: str, new: str) -> bool:
        """False if it can't be done; true, too, if there is nothing to rename."""
        return not self._files.exists(self._path(old)) or self._files.rename(self._path(old), self._path(new))


def _delta_log(spark: SparkSession, table: str) -> Any:
    """Delta's own view of a table. Its public API does not have the number of a stream's last batch."""
    return _java(spark).org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, table)


def state_of(spark: SparkSession, table: str, stream: str | None) -> tuple[int, int]:
    """The version of a table, and the number of the last batch that `stream` has written to it, or -1.

    What this session knows of the table, as its only writer: its log is not listed again.
    """
    snapshot = _delta_log(spark, table).unsafeVolatileSnapshot()
    last_batch = snapshot.transactions().get(stream)
    return snapshot.version(), last_batch.get() if last_batch.isDefined() else -1


class Commit(NamedTuple):
    """A version of a table: Delta's name for its operation, whether that has removed or restored rows, and the rows that it has
    added in these `files`. Files that were merged are none of both."""
    version: int
    operation: str
    has_changed_rows: bool
    files: list[str]
    rows: DataFrame


def newest_state(spark: SparkSession, table: str) -> tuple[str, int]:
    """The id of a table, which a recreated one has not, and its version, both as its log is now."""
    none = _java(spark).scala.Option.empty()
    snapshot = _delta_log(spark, table).update(False, none, none)
    return snapshot.metadata().id(), snapshot.version()


def commits_of(spark: SparkSession, table: str, first: int, last: int) -> Iterator[Commit]:
    """Those of the versions `first` to `last` of a table that its log still has, in order, after `newest_state`.

    Delta's public ways to the rows of a commit are the change data feed, which the table would have to write, and a streaming read,
    which can't begin right after a version and ends when somebody changes rows.
    """
    java, log = _java(spark), _delta_log(spark, table)
    changes = log.getChanges(first, last, java.scala.Option.empty(), False)
    while changes.hasNext():
        change = changes.next()
        actions = list(java.scala.jdk.javaapi.CollectionConverters.asJava(change._2()))
        by_kind: dict[str, list[Any]] = {kind: [action for action in actions if action.getClass().getSimpleName() == kind]
                                         for kind in ("AddFile", "RemoveFile", "CommitInfo")}
        operation = by_kind["CommitInfo"][0].operation() if by_kind["CommitInfo"] else ""
        added = [file for file in by_kind["AddFile"] if file.dataChange()]
        has_removed = any(file.dataChange() for file in by_kind["RemoveFile"])
        files = java.java.util.ArrayList()
        for file in added:
            files.add(file)
        rows = log.createDataFrame(log.unsafeVolatileSnapshot(), java.scala.jdk.javaapi.CollectionConverters.asScala(files).toSeq(),
                                   False, java.scala.Option.empty())
        yield Commit(change._1(), operation, has_removed or operation == "RESTORE", [file.path() for file in added],
                     DataFrame(rows, spark))


def protect_callbacks(spark: SparkSession) -> None:
    """Makes the port on which Spark's JVM calls `foreachBatch` ask for the session's secret; PySpark lets any user of the machine call it.

    Py4J has the check on Python's side, but its Java side forgets the secret as it is told the port (0.10.9.9).
    """
    gateway = cast(Any, spark.sparkContext)._gateway
    secret = gateway.gateway_parameters.auth_token
    gateway.callback_server_parameters.auth_token = secret
    ensure_callback_server_started(gateway)
    field = _java(spark).py4j.CallbackClient._java_lang_class.getDeclaredField("authToken")
    field.setAccessible(True)
    field.set(JavaObject("GATEWAY_SERVER", gateway._gateway_client).getCallbackClient(), secret)


def stream_of(batch: DataFrame) -> str:
    """The id of the query that has given this micro-batch to `foreachBatch`, which itself is not told."""
    return batch.sparkSession.sparkContext.getLocalProperty("sql.streaming.queryId") or ""


def query_of(batch: DataFrame) -> StreamingQuery:
    """The query that has given this micro-batch to `foreachBatch`. The session of the batch is a copy, which knows of no query."""
    query = SparkSession.builder.getOrCreate().streams.get(stream_of(batch))
    assert query
    return query


def planned_files(batch: DataFrame) -> list[str]:
    """The paths of the files that a file stream has planned for this micro-batch, as its checkpoint has them: the batch's own rows leave
    out those that are no longer there."""
    leaves = query_of(batch)._jsq.streamingQuery().lastExecution().analyzed().collectLeaves()
    [files] = [leaf.relation().location() for leaf in map(leaves.apply, range(leaves.size()))]
    return sorted(files.rootPaths().mkString("\n").split("\n"))


def begun_at(batch: DataFrame) -> int:
    """When this micro-batch was planned, in milliseconds since 1970: its current_timestamp(), which otherwise comes with a record only."""
    batch_id = int(batch.sparkSession.sparkContext.getLocalProperty("streaming.sql.batchId") or 0)
    offsets = cast(Any, query_of(batch))._jsq.streamingQuery().offsetLog().get(batch_id)
    return offsets.get().metadataOpt().get().batchTimestampMs()


# Methods of Kafka's ConsumerRecord, and the SQL types of their results.
KAFKA_RECORD = {"key": "BINARY", "value": "BINARY", "partition": "INT", "offset": "BIGINT", "timestamp": "BIGINT",
                "serializedKeySize": "INT", "serializedValueSize": "INT"}


def kafka_records(rows: DataFrame, max_bytes: int) -> DataFrame:
    """The records that `rows`, a `spark.read` of Kafka, would read, with their timestamps as Kafka has them, and null for keys and
    values of more than `max_bytes`.

    Spark's own reader fails on a time that is no TIMESTAMP, and copies the largest value that a consumer can still hold.
    Out: the columns of `KAFKA_RECORD` (`timestamp`: milliseconds; sizes: bytes, -1 for null), and `timestampType`, as Spark has it.
    """
    spark = rows.sparkSession
    java = _java(spark)
    sql, expressions = java.org.apache.spark.sql, java.org.apache.spark.sql.catalyst.expressions
    none = _scala_seq(spark, [])
    parse = spark._jsparkSession.sessionState().sqlParser().parseExpression

    def method(target: Any, name: str, kind: Any) -> Any:
        return expressions.objects.Invoke(target, name, kind, none, none, True, True, True)

    def column(value: Any, name: str) -> Any:
        return expressions.Alias(value, name, expressions.NamedExpression.newExprId(), none, java.scala.Option.empty(), none)

    an_object = java.org.apache.kafka.clients.consumer.ConsumerRecord("", 0, 0, None, None)
    kind_of_record = sql.types.ObjectType(an_object.getClass())
    rows_of_one = expressions.AttributeReference("record", kind_of_record, False, sql.types.Metadata.empty(),
                                                 expressions.NamedExpression.newExprId(), none)
    record = expressions.BoundReference(0, kind_of_record, False)
    columns = []
    for name, kind in KAFKA_RECORD.items():
        value = method(record, name, sql.types.DataType.fromDDL(kind))
        if kind == "BINARY":
            is_small = expressions.LessThanOrEqual(expressions.Length(value), parse(f"{max_bytes}"))
            value = expressions.If(is_small, value, parse("CAST(NULL AS BINARY)"))
        columns.append(column(value, name))
    timestamp_type = method(record, "timestampType", sql.types.ObjectType(an_object.timestampType().getClass()))
    columns.append(column(method(timestamp_type, "ordinal", sql.types.DataType.fromDDL("INT")), "timestampType"))
    rdd = rows._jdf.queryExecution().toRdd()
    while rdd.getClass().getSimpleName() != "KafkaSourceRDD":
        rdd = rdd.dependencies().head().rdd()
    plan = java.org.apache.spark.sql.catalyst.plans.logical.SerializeFromObject(
        _scala_seq(spark, columns), sql.execution.ExternalRDD(rows_of_one, rdd, spark._jsparkSession))
    read = DataFrame(sql.classic.Dataset.ofRows(spark._jsparkSession, plan), spark)
    return read.withColumn("timestampType", read.timestampType - 1)  # -1 for none is the first


def kafka_offsets(batch: DataFrame) -> dict[int, tuple[int, int]]:
    """The offsets that a micro-batch of Kafka reads of each partition: the first, and the one after the last."""
    offsets: dict[int, tuple[int, int]] = {}
    for part in batch._jdf.queryExecution().toRdd().partitions():
        part = part.inputPartition().get().offsetRange()
        begin, end = offsets.get(partition := part.topicPartition().partition(), (part.fromOffset(), part.untilOffset()))
        offsets[partition] = min(begin, part.fromOffset()), max(end, part.untilOffset())
    return offsets


def forget_fetched_records(spark: SparkSession, and_consumers: bool = False) -> None:
    """Makes a batch read all of its records from Kafka, even those that Spark has fetched along with an earlier batch: since then, Kafka
    may have lost the end of its log, and have other records there.

    `and_consumers`: those that had a record too large for the memory would fail there again, and others hold the last one they read.
    """
    consumers = getattr(_java(spark).org.apache.spark.sql.kafka010.consumer, "KafkaDataConsumer$")._java_lang_class
    for name in ["fetchedDataPool"] + ["consumerPool"] * and_consumers:
        pool = consumers.getDeclaredField(name)
        pool.setAccessible(True)
        pool.get(None).reset()


class KafkaReader:
    """Java's Kafka consumer, for looking up single records. kafka-python can't decompress snappy, lz4 or zstd by itself.

    `options`: those of Spark's Kafka source.
    """

    def __init__(self, spark: SparkSession, options: dict[str, Any]):
        java = self._java = _java(spark)
        settings = java.java.util.HashMap()
        for name, value in options.items():
            settings.put(name.removeprefix("kafka."), value)
        # Never commit offsets, and never jump elsewhere if an offset is gone.
        for name, value in {"enable.auto.commit": "false", "auto.offset.reset": "none",
                            "max.partition.fetch.bytes": "65536"}.items():
            settings.put(name, value)
        deserializer = java.org.apache.kafka.common.serialization.ByteArrayDeserializer()
        self._consumer = java.org.apache.kafka.clients.consumer.KafkaConsumer(settings, deserializer, deserializer)

    def close(self) -> None:
        self._consumer.close()

    def _place(self, topic: str, partition: int) -> Any:
        return self._java.org.apache.kafka.common.TopicPartition(topic, partition)

    def records_at(self, topic: str, offsets: dict[int, int], seconds: float, max_bytes: int) -> dict[int, tuple[int, bytes | None]]:
        """The timestamp (milliseconds since 1970) and value of the record at each offset, by partition; None for a larger value.

        Leaves out the records that Kafka doesn't have, or doesn't deliver within `seconds`, or that don't fit into the memory.
        """
        places = {partition: self._place(topic, partition) for partition in offsets}
        found: dict[int, tuple[int, bytes | None]] = {}
        self._consumer.assign(list(places.values()))
        self._consumer.resume(list(places.values()))
        for partition, place in places.items():
            self._consumer.seek(place, offsets[partition])
        deadline = time.monotonic() + seconds
        while places and time.monotonic() < deadline:
            try:
                records = self._consumer.poll(self._java.java.time.Duration.ofMillis(200))
                looked_at = [place.partition() for place in records.partitions()]
            except Py4JJavaError as error:
                if java_class(error) == OUT_OF_MEMORY:
                    self._consumer.unsubscribe()  # and forget what was fetched, half of which is used up
                    break
                if java_class(error) != "org.apache.kafka.clients.consumer.OffsetOutOfRangeException":
                    raise
                records, looked_at = None, [place.partition() for place in error.java_exception.partitions()]
            for partition in looked_at:
                place = places.pop(partition)
                self._consumer.pause([place])
                if records and (record := records.records(place)[0]).offset() == offsets[partition]:
                    found[partition] = record.timestamp(), record.value() if record.serializedValueSize() <= max_bytes else None
        return found

    def records_between(self, topic: str, offsets: dict[int, tuple[int, int]], seconds: float,
                        max_bytes: int) -> list[tuple[int, int, int, bytes | None]] | None:
        """The partition, offset, timestamp and value of each record at these offsets (partition: the first, and the one after the last);
        None for a larger value. None in all if one of them doesn't fit into the memory, or if they take more than so many `seconds`."""
        places = {partition: self._place(topic, partition) for partition, (begin, end) in offsets.items() if begin < end}
        found: list[tuple[int, int, int, bytes | None]] = []
        self._consumer.assign(list(places.values()))
        self._consumer.resume(list(places.values()))
        for partition, place in places.items():
            self._consumer.seek(place, offsets[partition][0])
        deadline = time.monotonic() + seconds
        while places:
            if time.monotonic() > deadline:
                return None
            try:
                for record in self._consumer.poll(self._java.java.time.Duration.ofMillis(200)).iterator():
                    if record.partition() in places and record.offset() < offsets[record.partition()][1]:
                        value = record.value() if record.serializedValueSize() <= max_bytes else None
                        found.append((record.partition(), record.offset(), record.timestamp(), value))
                done = [partition for partition, place in places.items() if self._consumer.position(place) >= offsets[partition][1]]
            except Py4JJavaError as error:
                if java_class(error) == OUT_OF_MEMORY:
                    self._consumer.unsubscribe()
                    return None
                if java_class(error) != "org.apache.kafka.clients.consumer.OffsetOutOfRangeException":
                    raise
                done = [place.partition() for place in error.java_exception.partitions()]  # removed meanwhile
            for partition in done:
                self._consumer.pause([places.pop(partition)])
        return found


class LargeRecord(NamedTuple):
    """A record that is too large, by its offset, and what a consumer can't read because of it."""
    after: int  # the offset after the last record before it: a consumer that is asked for a later one comes to it, even if that holds none
    offset: int
    end: int  # the offset after the message in which it is packed


def large_records(spark: SparkSession, messages: bytes, begin: int, max_bytes: int) -> tuple[int | None, list[LargeRecord]]:
    """The offset after these messages, as Kafka has them from the offset `begin` on, and the first record of more than `max_bytes` in
    each that is compressed. A record is measured with its headers, and skipped rather than held. None if there is no whole message.
    """
    java = _java(spark)
    collections, kafka = java.org.apache.commons.collections4, java.org.apache.kafka.common
    iterators, comparison = collections.IteratorUtils, collections.functors.ComparatorPredicate
    is_large = collections.PredicateUtils.transformedPredicate(
        collections.TransformerUtils.invokerTransformer("sizeInBytes"), comparison.comparatorPredicate(
            max_bytes, collections.ComparatorUtils.naturalComparator(), comparison.Criterion.LESS))
    end, large = None, []
    for message in kafka.record.MemoryRecords.readableRecords(java.java.nio.ByteBuffer.wrap(messages)).batches().iterator():
        after, end = end or begin, message.lastOffset() + 1
        if not message.isCompressed() or message.magic() < 2:  # Kafka's format before 0.11
            continue
        with closing(message.skipKeyValueIterator(kafka.utils.BufferSupplier.NO_CACHING)) as records:
            before = iterators.indexOf(records, is_large)
        if before >= 0:
            with closing(message.skipKeyValueIterator(kafka.utils.BufferSupplier.NO_CACHING)) as records:
                after = iterators.get(records, before - 1).offset() + 1 if before else after
                large.append(LargeRecord(after, records.next().offset(), end))
    return end, large


def _scala_seq(spark: SparkSession, values: list[Any]) -> Any:
    several = _java(spark).java.util.ArrayList()
    for value in values:
        several.add(value)
    return _java(spark).org.apache.spark.api.python.PythonUtils.toSeq(several)


def jvm_of(spark: SparkSession) -> "subprocess.Popen[bytes]":
    """The process of the session's JVM: PySpark has no way to wait for its end."""
    return cast(Any, spark.sparkContext._gateway).proc


def files_of(spark: SparkSession, table: str) -> DataFrame:
    """The files of a table with their statistics, from its log: DeltaTable.detail() only counts them."""
    return DataFrame(_delta_log(spark, table).unsafeVolatileSnapshot().allFiles().toDF(), spark)


def remove_old_log_entries(spark: SparkSession, table: str) -> None:
    """Delta itself removes them by the day, which at a batch every two seconds is too coarse: 43,200 commits."""
    log, none = _delta_log(spark, table), _java(spark).scala.Option.empty()
    by_the_minute = _java(spark).org.apache.spark.sql.delta.TruncationGranularity.MINUTE()
    log.cleanUpExpiredLogs(log.unsafeVolatileSnapshot(), none, none, by_the_minute)


def is_of_one_row(rows: DataFrame, condition: str) -> bool:
    """Whether SQL over the columns of `rows` needs no more than the row itself: no subquery, and nothing that Spark finds by
    changing the rows, as `window(…)` leaves out those without a time."""
    pattern = _java(rows.sparkSession).org.apache.spark.sql.catalyst.trees.TreePattern
    plan = rows.where(condition)._jdf.queryExecution().analyzed()
    return not plan.containsPattern(pattern.PLAN_EXPRESSION()) and plan.child().equals(rows._jdf.queryExecution().analyzed())


def is_deterministic(rows: DataFrame, condition: str) -> bool:
    """Whether SQL over the columns of `rows` is the same for the same row each time, without random numbers and the clock.

    Spark replaces 'now', 'today' and the like by the time at which it parses a query (`DATE 'today'`) or optimizes it, wherever it
    casts constant text to a time (`t > trim('now')`). Only the optimizer's rule FinishAnalysis finds all of these. Seen from
    two time zones such a time differs both as an instant and on the clock of the zone; a constant differs in one of the two at most.
    """
    spark = rows.sparkSession
    pattern = _java(spark).org.apache.spark.sql.catalyst.trees.TreePattern
    setting = "spark.sql.session.timeZone"
    zone, seen = spark.conf.get(setting) or "UTC", []
    try:
        for there in ("+18:00", "-18:00"):  # where it is never the same day
            spark.conf.set(setting, there)
            plan = rows.where(condition)._jdf.queryExecution().analyzed()
            finished = spark._jsparkSession.sessionState().optimizer().FinishAnalysis().apply(plan)
            on_clock = finished.condition().sql()
            # AES with a random start counts as deterministic, though it is not.
            if (not (plan.deterministic() and finished.deterministic()) or plan.containsPattern(pattern.CURRENT_LIKE())
                    or "ExpressionImplUtils.aesEncrypt(" in on_clock):
                return False
            spark.conf.set(setting, "UTC")
            seen.append([re.findall(r"\b(?:DATE|TIME\w*) '[^']*'", text) for text in (on_clock, finished.condition().sql())])
            if not seen[0][0]:
                return True  # without a time there is nothing to compare
    finally:
        spark.conf.set(setting, zone)
    return not any(one != other and instant != other_instant for one, instant, other, other_instant in zip(*seen[0], *seen[1]))


def attempt(spark: SparkSession, condition: str) -> Column:
    """SQL as a column that is null for a row for which it can't be computed. SQL itself can only try what its `try_…` do."""
    java = _java(spark).org.apache.spark.sql
    parsed = spark._jsparkSession.sessionState().sqlParser().parseExpression(condition)
    return Column(java.classic.ExpressionUtils.column(java.catalyst.expressions.TryEval(parsed)))


def number_of_tasks(rows: DataFrame) -> int:
    """How many tasks Spark would read the rows with. `rows.rdd` would make them Python's, and take longer."""
    return rows._jdf.queryExecution().toRdd().getNumPartitions()


def observed(spark: SparkSession, observation: Observation, seconds: int) -> dict[str, Any] | None:
    """The figures that an observation has seen, by their names, as Java has them; its own `get` waits forever, and converts all to Python.

    None if it has seen no query end within so many seconds; {} if Spark has left it out of the plan.
    """
    java, observer = _java(spark).scala.concurrent, cast(Any, observation._jo)
    try:
        row = java.Await.result(observer.future(), java.duration.Duration.create(seconds, "seconds"))
    except Py4JJavaError:
        return None
    if not row.length():
        return {}
    return {field.name(): row.getList(number) if field.dataType().typeName() == "array" else row.get(number)
            for number, field in enumerate(row.schema().fields())}


def in_memory(rows: DataFrame) -> DataFrame:
    """The rows as they are now, in the JVM's memory: they need not go through Python for it."""
    return from_java_rows(rows.sparkSession, rows._jdf.collectAsList(), rows)


def from_java_rows(spark: SparkSession, rows: Any, like: DataFrame) -> DataFrame:
    """A DataFrame of Java's `rows`, with the columns of `like`: they need not go through Python for it."""
    return DataFrame(spark._jsparkSession.createDataFrame(rows, like._jdf.schema()), spark)
