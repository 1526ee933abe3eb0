"""Reading whole files of JSON records: every record of each file, whatever its name and content."""

import errno
import functools
import os
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from pipeline.contract.contract import MAX_RECORD_BYTES, UNREADABLE
from pipeline.contract.strict import MAX_ELEMENTS
from pipeline.paths import local_path, plain
from pipeline.spark.file_system import BrokenFileError, FileSystem
from pipeline.spark.globs import escape_glob, is_pattern
from pipeline.streaming.source import SourceAwayError
from pipeline.terminal.errors import first_line, java_causes, root_cause
from pipeline.terminal.messages import warn

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

LINE_BYTES = 50  # minimum size counted for a line of a .gz: each takes time, and a few kB may hold millions of them
SPARSE_BYTES, SPARSE_RATIO = 1_000_000_000, 1000  # compression never shrinks JSON to a thousandth of its size
MAX_DEPTH = 200
# Matches one element of an array that is already known to be valid JSON, so the pattern only has to balance brackets of
# either kind. All quantifiers are possessive. Java's stack is deep enough for 500 levels.
_TEXT = r'"(?:[^"\\]++|\\.)*+"'
_INNER = functools.reduce(lambda inner, _: rf'(?:[^"\[\]{{}}]++|{_TEXT}|[\[{{]{inner}[\]}}])*+', range(MAX_DEPTH), "")
ELEMENT = rf'\G[\[,]\s*+([\[{{]{_INNER}[\]}}]|{_TEXT}|[^\[\]{{}}",\s]++)\s*+'
READ_OPTIONS = {
    "mapreduce.input.linerecordreader.line.maxlength": str(MAX_RECORD_BYTES + 1),  # lines must be shorter than this
    # Hadoop's usual local file system first looks for a checksum file, and can't construct its name if the file's own
    # name contains ":".
    "fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
    "fs.file.impl.disable.cache": "true",
    # These override Spark's configuration: a broken file goes to the quarantine, instead of half of it going into the table.
    "ignoreCorruptFiles": "false",
    "ignoreMissingFiles": "false",
}


def files_in(batch: DataFrame) -> list[Row]:
    """The files named in a batch: `path`, current `length` and `modified` (milliseconds since 1970), and `arrival`, the start of
    the batch (microseconds since 1970).
    """
    # A Python datetime would go through this machine's time zone.
    files = batch.select(
        "path",
        "length",
        F.unix_millis("modificationTime").alias("modified"),
        F.unix_micros("ingest_time").alias("arrival"),
    ).collect()
    # Spark lists files several times if their names contain wildcards.
    return list({file.path: file for file in files}.values())


def read_lines(
    spark: SparkSession, files: list[Row], faults: dict[str, str], max_unpacked: int, careful: bool
) -> DataFrame:
    """One record per line of `files`, except blank lines; see `read_files`."""
    return read_files(spark, files, faults, max_unpacked, careful, lineSep="\n")


def read_values(
    spark: SparkSession, files: list[Row], faults: dict[str, str], max_unpacked: int, careful: bool
) -> DataFrame:
    """One record per object. Each of the `files` holds one object or an array of objects; see `read_files`.

    A file counts as one record if its array is broken, contains null or strings, is nested more than 200 levels deep or has
    more than 400,000 elements.
    """
    whole = with_elements(read_files(spark, files, faults, max_unpacked, careful, wholetext=True))
    return whole.select(
        F.explode(F.coalesce("elements", F.array("raw"))).alias("raw"), "source_file", "ingest_time", "reject_reason"
    )


def with_elements(files: DataFrame) -> DataFrame:
    """Adds `is_object` and `elements` to files (`raw`). `elements`: the elements of an array, exactly as they appear in the file;
    null for anything else, and for an array with null or strings in it.
    """
    strict = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false"}
    checksum = F.sha2("raw", 256)
    # As in pipeline/contract/judge.py, the checksum is the second element only if nothing but white space follows the
    # value.
    framed = F.from_json(F.concat(F.lit("["), "text", F.lit(',"'), checksum, F.lit('"]')), "ARRAY<STRING>", strict)
    cut = F.regexp_extract_all(F.btrim("text", F.lit(" \t\r\n")), F.lit(ELEMENT), F.lit(1))
    files = (
        files.withColumns({"text": F.col("raw").cast("string")})
        .withColumn("length", F.json_array_length("text"))
        .withColumns({"framed": framed, "cut": F.when(F.col("length") <= MAX_ELEMENTS, cut)})
    )
    is_one_value = F.is_valid_utf8("text") & (F.size("framed") == 2) & (F.get("framed", F.lit(1)) == checksum)
    value = F.get("framed", F.lit(0))
    # The cuts follow each other without gaps. If there are as many cuts as elements, they are the elements.
    is_cut = value.startswith("[") & (F.size("cut") == F.col("length"))
    may_be_records = F.forall("cut", lambda element: ~element.startswith('"') & (element != "null"))
    elements = F.transform("cut", lambda element: element.cast("binary"))
    return files.withColumns(
        {
            "is_object": is_one_value & value.startswith("{"),
            "elements": F.when(is_one_value & is_cut & may_be_records, elements),
        }
    )


def find_multiline(spark: SparkSession, files: list[Row], quarantine: str) -> list[str]:
    """The paths of those `files` of a batch that hold one object or array over several lines, or an array on one line."""
    line = F.btrim(F.col("raw").cast("string"), F.lit(" \t\r\ufeff"))
    begins_object = line.startswith("{")
    suspects = (
        spark.read.format("delta")
        .load(quarantine)
        .where(F.col("reject_reason") == "malformed_json")
        .where(F.col("ingest_time") == F.timestamp_micros(F.lit(files[0].arrival)))
        .groupBy("source_file")
        .agg(
            F.bool_or(line.startswith("[")).alias("is_array"),
            F.bool_or(begins_object).alias("begins"),
            F.bool_or(~begins_object).alias("goes_on"),
        )
        .where("is_array OR begins AND goes_on")
    )
    suspected = {row.source_file for row in suspects.collect()}
    paths = [
        file.path
        for file in files
        if file.path in suspected and unpacked_size(spark, file, MAX_RECORD_BYTES)[0] <= MAX_RECORD_BYTES
    ]
    if not paths:
        return []
    whole = read_text(spark, paths, wholetext=True).select(
        F.col("value").cast("binary").alias("raw"), source_file().alias("path")
    )
    is_multiline = F.col("is_object") | F.col("elements").isNotNull()
    return [row.path for row in with_elements(whole).where(is_multiline).select("path").collect()]


def read_files(
    spark: SparkSession, files: list[Row], faults: dict[str, str], max_unpacked: int, careful: bool, **text_options: Any
) -> DataFrame:
    """Reads the `files` of a batch (`files_in`); see `find_unreadable` for the other parameters.

    Out: `raw` (binary: a line, or a whole file that is not blank), `source_file`, `ingest_time`, and `reject_reason`, which is
    null, or "unreadable_file" with a null `raw` for each of `faults`.
    """
    paths = [file.path for file in files]
    find_unreadable(spark, files, faults, max_unpacked, careful, text_options)
    ingest_time = F.timestamp_micros(F.lit(files[0].arrival if files else None))
    names = F.array(*map(F.lit, faults)).cast("ARRAY<STRING>")
    records = spark.range(1).select(
        F.lit(None).cast("binary").alias("raw"),
        F.explode(names).alias("source_file"),
        F.lit(UNREADABLE).alias("reject_reason"),
    )
    if readable := [path for path in paths if path not in faults]:
        text = read_text(spark, readable, **text_options).where(F.btrim("value", F.lit(" \t\r\n")) != "")
        records = records.union(text.select(F.col("value").cast("binary"), source_file(), F.lit(None).cast("string")))
    return records.withColumn("ingest_time", ingest_time)


def read_text(spark: SparkSession, paths: list[str], **text_options: Any) -> DataFrame:
    """The lines of files, or with `wholetext` the files themselves, whatever their names contain."""
    reader = spark.read.options(**READ_OPTIONS)
    # Spark treats each path as a pattern, and with a pattern, Hadoop can't handle ":" in the name of a file or folder. Spark can
    # be told to take a single path literally; with several paths, it would then read each of them several times.
    literal = [path for path in paths if ":" in plain(path).split("://")[-1] and is_pattern(path)]
    patterns = [escape_glob(path) for path in paths if path not in literal]
    parts = [reader.text(patterns, **text_options)] if patterns else []
    parts += [reader.option("__globPaths__", "false").text(path, **text_options) for path in literal]
    # Removes a byte order mark, which Spark strips from the first line, but not from a whole file.
    text = F.ltrim("value", F.lit("\ufeff")) if "wholetext" in text_options else F.col("value")
    return functools.reduce(
        DataFrame.union, [part.select(text.alias("value"), "_metadata.file_path") for part in parts]
    )


def source_file() -> Column:
    """The path of the file that a row of `read_text` came from. Spark provides a URI, in which url_decode would turn "+" into a space."""
    uri = F.col("file_path")
    return F.when(uri.contains("%"), F.url_decode(F.replace(uri, F.lit("+"), F.lit("%2B")))).otherwise(uri)


def find_unreadable(
    spark: SparkSession,
    files: list[Row],
    faults: dict[str, str],
    max_unpacked: int,
    careful: bool,
    text_options: dict[str, Any],
) -> None:
    """Adds those of `files` that can't be read because of their own content to `faults`, by path, and names them on stderr: a
    broken .gz, one that expands to more than `max_unpacked` bytes (a line counts as at least LINE_BYTES), or a line too large
    for memory.

    `careful`: also checks small .gz files, after Spark has failed to read the files. Raises SourceAwayError if a file can't be
    read for another reason.
    """
    found, sizes = {}, {}
    for file in files:
        if file.path not in faults:
            try:
                sizes[file.path], line_count = unpacked_size(spark, file, max_unpacked, careful)
                if file.path.lower().endswith(".gz") and max(sizes[file.path], line_count * LINE_BYTES) > max_unpacked:
                    found[file.path] = (
                        f"it unpacks to more than {max_unpacked // 10**6:,} MB or {max_unpacked // LINE_BYTES:,} lines "
                        "(see --max-unpacked)"
                    )
            except BrokenFileError as error:
                found[file.path] = str(error)
            if is_sparse(file):
                found[file.path] = "it has almost no content for its size"
    is_multiline = "wholetext" in text_options
    oversized = {path: size for path, size in sizes.items() if size > MAX_RECORD_BYTES and path not in found}
    # READ_OPTIONS make Spark silently skip lines of that length: the text read is then shorter than the file.
    if oversized and not is_multiline:
        lines = read_text(spark, list(oversized), **text_options)
        read = (
            lines.groupBy(source_file().alias("path")).agg(F.sum(F.octet_length("value") + 1).alias("size")).collect()
        )
        for file in read:
            if file.size + 3 >= oversized[file.path]:  # a byte order mark, which has 3 bytes, is not read either
                del oversized[file.path]
    what = "" if is_multiline else "a line of "
    found |= dict.fromkeys(oversized, f"it has {what}more than {MAX_RECORD_BYTES:,} bytes")
    for path, fault in found.items():
        warn(
            f"{path} can't be read: {fault}. It is in the quarantine as unreadable_file; fix it and give it a new name."
        )
    faults |= found


def unpacked_size(spark: SparkSession, file: Row, limit: int, exactly: bool = False) -> tuple[int, int]:
    """The uncompressed size of `file` in bytes, or `limit` + 1 if it is larger, and the number of lines in it if it is a .gz.
    Unless `exactly`, returns the compressed size of a .gz that is small even when unpacked.

    Raises BrokenFileError for a broken .gz, and SourceAwayError for a file that can't be read.
    """
    # A .gz expands to at most 1,032 times its size: https://zlib.net/zlib_tech.html
    if (
        not file.path.lower().endswith(".gz")
        or not file.length
        or file.length * 1032 <= MAX_RECORD_BYTES
        and not exactly
    ):
        return file.length, 0
    try:
        return FileSystem(spark, file.path, **READ_OPTIONS).unpacked_size(file.path, limit)
    except Py4JJavaError as error:
        if not is_there(spark, plain(file.path)):  # as if it had already been removed
            return 0, 0
        raise SourceAwayError(away(file.path, error)) from error


def is_sparse(file: Row) -> bool:
    """Whether a large local file consists of holes, which take no space on the disk and hours to read."""
    if file.length <= SPARSE_BYTES or local_path(file.path) is None:
        return False
    # Some file systems report no blocks for a file, but those that don't support holes report all of it as data.
    content, end = 0, 0
    with suppress(OSError), open(plain(file.path), "rb") as opened:
        try:
            while content * SPARSE_RATIO < file.length:
                begin = os.lseek(opened.fileno(), end, os.SEEK_DATA)
                end = os.lseek(opened.fileno(), begin, os.SEEK_HOLE)
                content += end - begin
        except OSError as error:
            return error.errno == errno.ENXIO  # there is no more content
    return False


def is_there(spark: SparkSession, path: str) -> bool:
    """Whether there is a file at `path`. Raises SourceAwayError if that can't be determined."""
    try:
        if not path.startswith("/"):
            return FileSystem(spark, path).size(path) is not None
        os.stat(path)  # Hadoop would report an inaccessible file as missing
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, Py4JJavaError) as error:
        raise SourceAwayError(away(path, error)) from error


def unreadable_file_of(error: Exception) -> str | None:
    """The path of the file that Spark could not read; None for any other error."""
    for cause in java_causes(error):
        with suppress(Py4JError):  # not a Spark error
            if cause.getCondition().startswith("FAILED_READ_FILE"):
                return unquote(cause.getMessageParameters()["path"])
    return None


def away(path: str, error: Exception) -> str:
    """What to do about a file that can't be read through no fault of its own."""
    return (
        f"{path} can't be read at the moment: {first_line(root_cause(error))}. Nothing is lost. Fix its storage or "
        "permissions, or move it out of the folder, and start again."
    )
