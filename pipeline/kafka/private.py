"""Private APIs of Spark's Kafka source, and Java's Kafka client by way of Spark's JVM.

Without them, a stream could neither get past records that Spark can't read, nor see that Kafka has lost its log.
"""

import time
import uuid
from contextlib import closing
from typing import Any

from pipeline.spark.private import OUT_OF_MEMORY, _java, _scala_seq
from pipeline.terminal.errors import java_class

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession

# Methods of Kafka's ConsumerRecord and the SQL types of their results.
KAFKA_RECORD = {
    "key": "BINARY",
    "value": "BINARY",
    "partition": "INT",
    "offset": "BIGINT",
    "timestamp": "BIGINT",
    "serializedKeySize": "INT",
    "serializedValueSize": "INT",
}
POLL_TIMEOUT_MS = 120_000  # Spark's default


def kafka_records(
    spark: SparkSession,
    options: dict[str, Any],
    topic: str,
    ranges: list[tuple[int, int, int]],
    fail_on_data_loss: bool,
    max_bytes: int,
) -> DataFrame:
    """The records of a topic in these ranges of offsets (partition, begin and end), with their original timestamps, and null
    for keys and values larger than `max_bytes`.

    Spark's own reader fails on a time outside the range of a TIMESTAMP, copies every value, however large, and accepts only one
    range per partition.
    `options`: those of Spark's Kafka source. Each range is a task.
    Out: the columns of `KAFKA_RECORD` (`timestamp` in milliseconds; sizes in bytes, -1 for null) and Spark's `timestampType`.
    """
    java = _java(spark)
    sql, expressions = java.org.apache.spark.sql, java.org.apache.spark.sql.catalyst.expressions
    none = _scala_seq(spark, [])
    parse = spark._jsparkSession.sessionState().sqlParser().parseExpression

    def method(target: Any, name: str, kind: Any) -> Any:
        return expressions.objects.Invoke(target, name, kind, none, none, True, True, True)

    def column(value: Any, name: str) -> Any:
        return expressions.Alias(
            value, name, expressions.NamedExpression.newExprId(), none, java.scala.Option.empty(), none
        )

    an_object = java.org.apache.kafka.clients.consumer.ConsumerRecord("", 0, 0, None, None)
    kind_of_record = sql.types.ObjectType(an_object.getClass())
    rows_of_one = expressions.AttributeReference(
        "record", kind_of_record, False, sql.types.Metadata.empty(), expressions.NamedExpression.newExprId(), none
    )
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
    kafka, none_preferred = java.org.apache.spark.sql.kafka010, java.scala.Option.empty()
    parts = [
        kafka.KafkaOffsetRange(
            java.org.apache.kafka.common.TopicPartition(topic, partition), begin, end, none_preferred
        )
        for partition, begin, end in ranges
    ]
    # Spark keeps consumers for later reads by their group's name (see `forget_fetched_records`). These have options of their
    # own, and Spark refuses other options for a group that it knows.
    settings = _settings(options) | {"group.id": f"pipeline-lookup-{uuid.uuid4()}"}
    params = kafka.KafkaSourceProvider.kafkaParamsForExecutors(
        java.org.apache.spark.api.python.PythonUtils.toScalaMap(settings), settings["group.id"]
    )
    rdd = kafka.KafkaSourceRDD(
        spark.sparkContext._jsc.sc(), params, _scala_seq(spark, parts), POLL_TIMEOUT_MS, fail_on_data_loss
    )
    plan = java.org.apache.spark.sql.catalyst.plans.logical.SerializeFromObject(
        _scala_seq(spark, columns), sql.execution.ExternalRDD(rows_of_one, rdd, spark._jsparkSession)
    )
    read = DataFrame(sql.classic.Dataset.ofRows(spark._jsparkSession, plan), spark)
    return read.withColumn("timestampType", read.timestampType - 1)  # the first constant, for no type, is -1


def _settings(options: dict[str, Any]) -> dict[str, str]:
    """The settings of Java's client from the options of Spark's Kafka source."""
    return {name.removeprefix("kafka."): str(value) for name, value in options.items()}


def kafka_offsets(batch: DataFrame) -> dict[int, tuple[int, int]]:
    """The offsets that a micro-batch reads from each partition: the first, and the one after the last."""
    parts = [part.inputPartition().get().offsetRange() for part in batch._jdf.queryExecution().toRdd().partitions()]
    ranges = sorted((part.topicPartition().partition(), part.fromOffset(), part.untilOffset()) for part in parts)
    begins = {partition: begin for partition, begin, _ in reversed(ranges)}  # the first one of a partition wins
    return {partition: (begins[partition], end) for partition, _, end in ranges}  # and here the last one


def forget_fetched_records(spark: SparkSession, and_consumers: bool = False) -> None:
    """Makes the next batch read all of its records from Kafka, including those that Spark prefetched during an earlier batch.
    Since then, Kafka may have lost the end of its log and now have other records there.

    `and_consumers`: closes idle consumers, too. A consumer that ran out of memory would fail again at the same record, the
    others keep the last record that they read, and those of `kafka_records` are never used again.
    """
    consumers = getattr(_java(spark).org.apache.spark.sql.kafka010.consumer, "KafkaDataConsumer$")._java_lang_class
    for name in ["fetchedDataPool"] + ["consumerPool"] * and_consumers:
        pool = consumers.getDeclaredField(name)
        pool.setAccessible(True)
        pool.get(None).reset()


class KafkaReader:
    """Java's Kafka consumer, for looking up a few records. kafka-python can't decompress snappy, lz4 or zstd by itself.

    `options`: those of Spark's Kafka source.
    """

    def __init__(self, spark: SparkSession, options: dict[str, Any]):
        java = self._java = _java(spark)
        # Never commit offsets, and never jump elsewhere if an offset is gone.
        settings = _settings(options) | {
            "enable.auto.commit": "false",
            "auto.offset.reset": "none",
            "max.partition.fetch.bytes": "65536",
            # With Kafka's default, 500, each poll returns the records of one or two partitions; there may be hundreds.
            "max.poll.records": "5000",
            # User settings for better throughput must not delay this.
            "fetch.min.bytes": "1",
        }
        deserializer = java.org.apache.kafka.common.serialization.ByteArrayDeserializer()
        self._consumer = java.org.apache.kafka.clients.consumer.KafkaConsumer(settings, deserializer, deserializer)

    def close(self) -> None:
        self._consumer.close(self._java.java.time.Duration.ofSeconds(2))

    def records_between(
        self, topic: str, offsets: dict[int, tuple[int, int]], seconds: float, max_bytes: int
    ) -> tuple[list[tuple[int, int, int, bytes | None]], set[int] | None]:
        """The partition, offset, timestamp (milliseconds since 1970) and value of each record at these offsets (by partition: the
        first, and the one after the last), and the partitions that were not read to their end within `seconds`. The value is None
        if it is null or larger than `max_bytes`.

        Stops at a record that doesn't fit into memory, and then returns None for the partitions.
        """
        topic_partition = self._java.org.apache.kafka.common.TopicPartition
        places = {
            partition: topic_partition(topic, partition) for partition, (begin, end) in offsets.items() if begin < end
        }
        found: list[tuple[int, int, int, bytes | None]] = []
        self._consumer.assign(list(places.values()))
        self._consumer.resume(list(places.values()))
        for partition, place in places.items():
            self._consumer.seek(place, offsets[partition][0])
        deadline = time.monotonic() + seconds
        while places and time.monotonic() < deadline:
            try:
                polled = self._consumer.poll(self._java.java.time.Duration.ofMillis(200))
                # All of them only if nothing came, because asking for a position takes as long as reading a record.
                moved = {place.partition() for place in polled.partitions()} & places.keys() or {*places}
                for place in polled.partitions():
                    partition = place.partition()
                    for record in polled.records(place):
                        if record.offset() >= offsets[partition][1]:
                            break
                        value = record.value() if record.serializedValueSize() <= max_bytes else None
                        found.append((partition, record.offset(), record.timestamp(), value))
                # The position also moves past offsets that hold no record, such as those of aborted transactions.
                done = [
                    partition
                    for partition in moved
                    if self._consumer.position(places[partition]) >= offsets[partition][1]
                ]
            except Py4JJavaError as error:
                if java_class(error) == OUT_OF_MEMORY:
                    self._consumer.unsubscribe()  # discards the rest of the fetched data
                    return found, None
                if java_class(error) != "org.apache.kafka.clients.consumer.OffsetOutOfRangeException":
                    raise
                done = [place.partition() for place in error.java_exception.partitions()]  # removed in the meantime
            for partition in done:
                self._consumer.pause([places.pop(partition)])
        return found, set(places)


def large_records(
    spark: SparkSession, messages: bytes, begin: int, max_bytes: int
) -> tuple[int | None, list[tuple[int, int, int]]]:
    """Searches raw record batches, which begin at the offset `begin`, for records larger than `max_bytes`.

    Returns the offset after the last complete batch (None if there is none), and for the first large record of each
    compressed batch: the offset after the last record before it, its own offset, and the one after its batch. A consumer that
    is asked for any offset from the first to the second reaches this record. The size of a record includes its headers.
    Records are skipped while decompressing, and never held in memory.
    """
    java = _java(spark)
    collections, kafka = java.org.apache.commons.collections4, java.org.apache.kafka.common
    iterators, predicates, invoker = (
        collections.IteratorUtils,
        collections.PredicateUtils,
        collections.TransformerUtils.invokerTransformer,
    )

    def is_larger_than(size: int) -> Any:
        comparison = collections.functors.ComparatorPredicate
        smaller = comparison.comparatorPredicate(
            size, collections.ComparatorUtils.naturalComparator(), comparison.Criterion.LESS
        )
        return predicates.transformedPredicate(invoker("sizeInBytes"), smaller)

    is_large = is_larger_than(max_bytes)
    may_have_large = predicates.andPredicate(
        predicates.andPredicate(
            predicates.instanceofPredicate(kafka.record.DefaultRecordBatch._java_lang_class),  # since Kafka 0.11
            predicates.asPredicate(invoker("isCompressed")),
        ),
        # The best compression packs 128 KiB into 4 bytes: RFC 8878, 3.1.1.2.2 (RLE_Block).
        is_larger_than(max_bytes // 2**17 * 4),
    )
    buffer = java.java.nio.ByteBuffer.wrap(messages)
    batches = iterators.toList(kafka.record.MemoryRecords.readableRecords(buffer).batches().iterator())
    large, no_cache = [], kafka.utils.BufferSupplier.NO_CACHING
    # A call from Python takes longer than Kafka needs for a small batch.
    for message in iterators.filteredIterator(batches.iterator(), may_have_large):
        with closing(message.skipKeyValueIterator(no_cache)) as records:
            before = iterators.indexOf(records, is_large)
        if before >= 0:
            number = batches.indexOf(message)
            after = batches[number - 1].lastOffset() + 1 if number else begin
            with closing(message.skipKeyValueIterator(no_cache)) as records:
                after = iterators.get(records, before - 1).offset() + 1 if before else after
                large.append((after, records.next().offset(), message.lastOffset() + 1))
    return batches[len(batches) - 1].lastOffset() + 1 if len(batches) else None, large
