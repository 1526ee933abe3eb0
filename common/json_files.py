"""Reading files of JSON records whole: every record of each, whatever the names of the files and whatever is in them."""

import os
import re
from functools import reduce
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, first_line, java_class, root_cause, warn
from common.internals import FileSystem
from common.parsing import LONE_SURROGATE

# Bytes of a line, or with --multiline of a file: it has to fit into the memory several times over for each core.
LONGEST_RECORD = 8_000_000
# The error, after its class in Java, where it is not the file that is broken but the way to it: to a store, to a mounted folder.
AWAY = r"\A(java\.net\.|[\w.]*(ConnectTimeout|SdkClient)Exception)|(Stale file handle|endpoint is not connected)\)?\Z"
IN_QUARANTINE = "It is in the quarantine as unreadable_file; fix it and give it a new name."
READ_OPTIONS = {
    "mapreduce.input.linerecordreader.line.maxlength": str(LONGEST_RECORD + 1),  # which a line has to stay below
    # Hadoop's usual file system of this machine looks for a checksum file first, whose name it can't make of one with ":".
    "fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
    "fs.file.impl.disable.cache": "true",
    # Whatever Spark's configuration says: a broken file goes to the quarantine, not half of it into the table.
    "ignoreCorruptFiles": "false",
    "ignoreMissingFiles": "false",
}


def files_in(batch: DataFrame) -> list[Row]:
    """The files whose names are in a batch: `path`, `length`, `modificationTime` as they are now, and `arrival`, the start of the
    batch, in microseconds since 1970."""
    # A datetime of Python would go through the zone of this machine.
    files = batch.withColumn("arrival", F.unix_micros("ingest_time")).drop("ingest_time").collect()
    return list(dict.fromkeys(files))


def read_lines(spark: SparkSession, files: list[Row], careful: bool) -> DataFrame:
    """One record per line of `files`, but for blank lines; see `read_files`."""
    return read_files(spark, files, careful, lineSep="\n")


def read_values(spark: SparkSession, files: list[Row], careful: bool) -> DataFrame:
    """One record per object of `files`, each of which holds an object or an array of them; see `read_files`.

    The elements of an array come without white space and with numbers as Spark writes them. A file whose array is
    broken, or holds null or strings, is one record as a whole.
    """
    whole = with_elements(read_files(spark, files, careful, wholetext=True))
    return whole.select(F.explode(F.coalesce("elements", F.array("raw"))).alias("raw"),
                        "source_file", "ingest_time", "reject_reason")


def with_elements(files: DataFrame) -> DataFrame:
    """Adds to files (`raw`) what is in them: `is_object`, and the `elements` of an array, null of anything else and of an
    array with null or strings in it."""
    strict = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false"}
    checksum = F.sha2("raw", 256)
    # As in common/parsing.py: the checksum comes second only if nothing but white space follows the value.
    framed = F.from_json(F.concat(F.lit("["), "text", F.lit(',"'), checksum, F.lit('"]')), "ARRAY<STRING>", strict)
    files = (files.withColumn("text", F.col("raw").cast("string"))
             .select("*", framed.alias("framed"), F.from_json("text", "ARRAY<STRING>", strict).alias("split")))
    is_one_value = F.is_valid_utf8("text") & (F.size("framed") == 2) & (F.get("framed", F.lit(1)) == checksum)
    value = F.get("framed", F.lit(0))
    # A string in the array has lost its quotes in `split`, and could pass for an object: then this doesn't hold.
    is_array_of_objects = F.concat(F.lit("["), F.array_join("split", ","), F.lit("]")) == value
    # It would be "?" in `split`.
    has_lone_surrogate = F.expr(LONE_SURROGATE)
    elements = F.transform("split", lambda element: element.cast("binary"))
    return files.withColumns({"is_object": is_one_value & value.startswith("{"),
                              "elements": F.when(is_one_value & is_array_of_objects & ~has_lone_surrogate, elements)})


def find_multiline(spark: SparkSession, files: list[Row], quarantine: str) -> list[str]:
    """Paths of the `files` of a batch that hold one object or an array of them over several lines, or an array in one."""
    line = F.btrim(F.col("raw").cast("string"), F.lit(" \t\r\ufeff"))
    begins_object = line.startswith("{")
    suspects = (
        spark.read.format("delta").load(quarantine)
        .where(F.col("reject_reason") == "malformed_json")
        .where(F.col("ingest_time") == F.timestamp_micros(F.lit(files[0].arrival)))
        .groupBy("source_file").agg(F.bool_or(line.startswith("[")).alias("is_array"),
                                    F.bool_or(begins_object).alias("begins"), F.bool_or(~begins_object).alias("goes_on"))
        .where("is_array OR begins AND goes_on"))
    suspected = {row.source_file for row in suspects.collect()}
    paths = [file.path for file in files if file.path in suspected and unpacked_size(spark, file) <= LONGEST_RECORD]
    if not paths:
        return []
    whole = read_text(spark, paths, wholetext=True).select(F.col("value").cast("binary").alias("raw"), source_file().alias("path"))
    is_multiline = F.col("is_object") | F.col("elements").isNotNull()
    return [row.path for row in with_elements(whole).where(is_multiline).select("path").collect()]


def read_files(spark: SparkSession, files: list[Row], careful: bool, **text_options: Any) -> DataFrame:
    """Reads the `files` of a batch (`files_in`).

    Out: `raw` (binary: a line or a whole file that is not blank), `source_file`, `ingest_time`, and `reject_reason`: null,
    or "unreadable_file" with a null `raw` for each file that has too much in one piece or, where `careful`, can't be read
    to its end.
    """
    paths = [file.path for file in files]
    unreadable = find_unreadable(spark, paths) if careful else []
    unreadable += find_oversized(spark, [file for file in files if file.path not in unreadable], text_options)
    ingest_time = F.timestamp_micros(F.lit(files[0].arrival if files else None))
    names = F.array(*map(F.lit, unreadable)).cast("ARRAY<STRING>")
    records = spark.range(1).select(F.lit(None).cast("binary").alias("raw"), F.explode(names).alias("source_file"),
                                    F.lit("unreadable_file").alias("reject_reason"))
    if readable := [path for path in paths if path not in unreadable]:
        text = read_text(spark, readable, **text_options).where(F.btrim("value", F.lit(" \t\r\n")) != "")
        records = records.union(text.select(F.col("value").cast("binary"), source_file(), F.lit(None).cast("string")))
    return records.withColumn("ingest_time", ingest_time)


def read_text(spark: SparkSession, paths: list[str], **text_options: Any) -> DataFrame:
    """The lines of files, or with `wholetext` the files, whatever their names hold."""
    reader = spark.read.options(**READ_OPTIONS)
    # Spark takes each path as a pattern, by which Hadoop finds none with a ":". It can be told to take one path literally; of
    # several it would then read each several times.
    literal = [path for path in paths if ":" in os.path.basename(path) and escape_glob(path) != path]
    patterns = [escape_glob(path) for path in paths if path not in literal]
    parts = [reader.text(patterns, **text_options)] if patterns else []
    parts += [reader.option("__globPaths__", "false").text(path, **text_options) for path in literal]
    # A byte order mark, which Spark leaves out of the first line, but not of a whole file.
    text = F.ltrim("value", F.lit("\ufeff")) if "wholetext" in text_options else F.col("value")
    return reduce(DataFrame.union, [part.select(text.alias("value"), "_metadata.file_path") for part in parts])


def source_file() -> Column:
    """The path of the file that a row of `read_text` is from. Spark has it as a URI, in which url_decode makes a blank of "+"."""
    uri = F.col("file_path")
    return F.when(uri.contains("%"), F.url_decode(F.replace(uri, F.lit("+"), F.lit("%2B")))).otherwise(uri)


def find_oversized(spark: SparkSession, files: list[Row], text_options: dict[str, Any]) -> list[str]:
    """Paths of those of `files` with more in one piece than the memory could hold, each named on stderr.

    READ_OPTIONS silently leave out a line that long: what is read is then shorter than the file.
    """
    is_multiline = "wholetext" in text_options
    sizes = {file.path: size for file in files if (size := unpacked_size(spark, file)) > LONGEST_RECORD}
    oversized = list(sizes)
    if sizes and not is_multiline:
        lines = read_text(spark, list(sizes), **text_options)
        read = lines.groupBy(source_file().alias("path")).agg(F.sum(F.octet_length("value") + 1).alias("size")).collect()
        # A byte order mark is left out too; it has 3 bytes.
        oversized = list(sizes.keys() - {file.path for file in read if file.size + 3 >= sizes[file.path]})
    for path in oversized:
        what = "" if is_multiline else "a line of "
        warn(f"{path} can't be read: it has {what}more than {LONGEST_RECORD:,} bytes. {IN_QUARANTINE}")
    return oversized


def unpacked_size(spark: SparkSession, file: Row) -> int:
    """The bytes in `file`, unpacked; 0 for a .gz that is broken, which `find_unreadable` finds."""
    # A .gz has at most 1,032 times its size inside: https://zlib.net/zlib_tech.html
    if not file.path.lower().endswith(".gz") or file.length * 1032 <= LONGEST_RECORD:
        return file.length
    return FileSystem(spark, file.path, **READ_OPTIONS).unpacked_size(file.path)


def find_unreadable(spark: SparkSession, paths: list[str]) -> list[str]:
    """Those of `paths` that can't be read to their end (no permission, a broken .gz, gone), each named on stderr."""
    try:
        read_text(spark, paths).write.format("noop").mode("overwrite").save()
        return []
    except (PySparkException, Py4JJavaError) as error:
        reason = first_line(root_cause(error))
        if re.search(AWAY, f"{java_class(error)}: {reason}"):
            raise PipelineError(f"{paths[0]} can't be read at the moment: {reason}. Nothing is lost: start again when its "
                                f"storage answers.") from error
        if len(paths) == 1:
            warn(f"{paths[0]} can't be read: {reason}. {IN_QUARANTINE}")
            return paths
    middle = len(paths) // 2
    return find_unreadable(spark, paths[:middle]) + find_unreadable(spark, paths[middle:])


def escape_glob(path: str) -> str:
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", path)
