"""Private parts of Spark's file stream: the files planned for a micro-batch.

Without them, a file that vanishes while its batch is running would not be missed.
"""

from pipeline.streaming.private import query_of

from pyspark.sql import DataFrame


def planned_files(batch: DataFrame) -> list[str]:
    """The paths of the files planned for this micro-batch, as recorded in the checkpoint. The rows of the batch itself omit files
    that no longer exist.
    """
    leaves = query_of(batch)._jsq.streamingQuery().lastExecution().analyzed().collectLeaves()
    [files] = [leaf.relation().location() for leaf in map(leaves.apply, range(leaves.size()))]
    return sorted(files.rootPaths().mkString("\n").split("\n"))
