"""Private parts of Spark's streaming engine: the query behind a micro-batch.

Without them, a batch knows neither which query it belongs to nor when it was planned, and could not be recognised after
a crash.
"""

from typing import Any, cast

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming.query import StreamingQuery


def stream_of(batch: DataFrame) -> str:
    """The id of the query that passed this micro-batch to `foreachBatch`, which does not get the id as an argument."""
    return batch.sparkSession.sparkContext.getLocalProperty("sql.streaming.queryId") or ""


def query_of(batch: DataFrame) -> StreamingQuery:
    """The query that passed this micro-batch to `foreachBatch`. The batch's own session is a copy that knows no queries."""
    query = SparkSession.builder.getOrCreate().streams.get(stream_of(batch))
    assert query
    return query


def batch_time_ms(batch: DataFrame) -> int:
    """When this micro-batch was planned, in milliseconds since 1970. This is its current_timestamp(), which is otherwise available
    only together with a record.
    """
    batch_id = int(batch.sparkSession.sparkContext.getLocalProperty("streaming.sql.batchId") or 0)
    offsets = cast(Any, query_of(batch))._jsq.streamingQuery().offsetLog().get(batch_id)
    return offsets.get().metadataOpt().get().batchTimestampMs()
