"""JSON files -> Bronze: streams newly added files of sensor readings into a Delta table.

    input/sensor_data/*.json, *.json.gz ──> lake/bronze/sensor_data
                                      └───> lake/bronze/sensor_data_quarantine

A file holds one JSON object per line; with --multiline it holds one JSON value, an object or an array of objects,
pretty-printed or not. Each record is checked against the rules of common/readings.py: a valid reading is appended to the
table, any other record to the quarantine beside it, unchanged and with the reason. Every record is in one of the two,
exactly once, whatever is killed. A file that can't be read to its end, or has a line (with --multiline: or is itself) of
more than 8 MB, is named and in the quarantine as a whole (unreadable_file), and the others go on.

Files are taken once, by name: what a file gains after it was read is not seen. So write a file elsewhere, or under a
name that begins with "." or "_", and rename it when it is complete.

    python3 streaming_files_to_delta_bronze.py
    python3 streaming_files_to_delta_bronze.py --once
    python3 streaming_files_to_delta_bronze.py --input /data/readings --multiline
"""

import common.process  # isort: skip  # before all else: a Ctrl+C during the other imports is clean, too

import argparse
import os
import re
from functools import reduce

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from common.console import PipelineError, argument_parser, at_least, first_line, location, root_cause, run, warn
from common.process import REPOSITORY
from common.readings import LONE_SURROGATE
from common.session import build_spark
from common.streams import add_stream_options, run_until_stopped
from common.table_writer import TableWriter
from common.tables import BRONZE, BRONZE_COLUMNS, BRONZE_QUARANTINE_COLUMNS

# Bytes of a line, or with --multiline of a file: it has to fit into the memory several times over for each core.
LONGEST_RECORD = 8_000_000
IN_QUARANTINE = "It is in the quarantine as unreadable_file; put it right and give it a new name."
MOST_PATTERNS = 100
READ_OPTIONS = {
    "mapreduce.input.linerecordreader.line.maxlength": LONGEST_RECORD,
    # Hadoop's usual file system of this machine looks for a checksum file first, whose name it can't make of one with ":".
    "fs.file.impl": "org.apache.hadoop.fs.RawLocalFileSystem",
    "fs.file.impl.disable.cache": "true",
    # Whatever Spark's configuration says: a broken file goes to the quarantine, not half of it into the table.
    "ignoreCorruptFiles": "false",
    "ignoreMissingFiles": "false",
}
TAKEN_NAMES = "*.{[jJ][sS][oO][nN]{,[lL]},[nN][dD][jJ][sS][oO][nN]}{,.[gG][zZ]}"  # .json, .jsonl, .ndjson, and with .gz


def main() -> None:
    options = parse_options()
    spark = build_spark("files-to-bronze", verbose=options.verbose)
    new_files = list_new_files(spark, options)
    read_records = read_values if options.multiline else read_lines
    bronze = BronzeWriter(options.table, BRONZE_COLUMNS, BRONZE_QUARANTINE_COLUMNS, read_records)
    run_until_stopped(new_files, bronze, options)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--input", type=location, default=str(REPOSITORY / "input" / "sensor_data"),
                        help="folder that the files are put into")
    parser.add_argument("--multiline", action="store_true", help="a file is one JSON value, an object or an array")
    add_stream_options(parser, BRONZE, str(REPOSITORY / "checkpoints" / "bronze_sensor"), trigger="5 seconds")
    parser.add_argument("--max-files-per-trigger", type=at_least(1), metavar="N", default=1000,
                        help="the most files that one batch takes")
    return parser.parse_args()


def list_new_files(spark: SparkSession, options: argparse.Namespace) -> DataFrame:
    """New files as a stream: `path`, `length`, `modificationTime` (both of now, each time that they are looked at), and
    `ingest_time`, the start of the batch that takes the file.

    Not what is in them, so that a file that can't be read stops no batch: `read_files` reads them.
    """
    folder = spark._jvm.org.apache.hadoop.fs.Path(options.input)
    files = folder.getFileSystem(spark._jsc.hadoopConfiguration())
    if not files.exists(folder) or not files.getFileStatus(folder).isDirectory():
        raise PipelineError(f"No folder {options.input}. Make it, or name another with --input.")
    for place, _, names in os.walk(options.input):  # of a URI there is nothing
        for name in names:
            if re.search("[\ud800-\udfff]", name):
                path = os.path.join(place, name).encode(errors="backslashreplace").decode()
                warn(f"{path} can't be read: its name is not in UTF-8. Rename it.")
    # Of n files whose paths look like patterns Spark makes a list of n * n.
    most_files = options.max_files_per_trigger if escape_glob(options.input) == options.input else min(
        options.max_files_per_trigger, MOST_PATTERNS)
    return (
        spark.readStream.format("binaryFile")
        .schema("path STRING, modificationTime TIMESTAMP, length BIGINT, content BINARY")
        .option("pathGlobFilter", TAKEN_NAMES)
        .option("recursiveFileLookup", "true")
        .option("maxFilesPerTrigger", most_files)
        # By default a file that is a week older than the newest one seen is left out, be that one's time in the future.
        .option("maxFileAge", "36500d")
        .option("ignoreMissingFiles", "true")  # renamed or removed since it was listed
        .load(escape_glob(options.input))
        .select("path", "length", "modificationTime", F.current_timestamp().alias("ingest_time"))
    )


class BronzeWriter(TableWriter):
    """Writes the tables, and names the files that broke a rule: they changed while they were taken, or want --multiline."""

    def write(self, batch: DataFrame, batch_id: int) -> None:
        before = set(batch.drop("ingest_time").collect())
        super().write(batch, batch_id)
        paths = {file.path for file in before}
        for file in set(batch.drop("ingest_time").collect()) - before:
            if file.path in paths:
                warn(f"{file.path} has changed since it was taken, and what it has gained is not read. Write a file under a "
                     f'name that begins with "_", and rename it when it is complete.')
        if self.read_records is read_lines and "malformed_json" in self.counts[batch_id]:
            for path in find_multiline(batch, self.quarantine):
                warn(f"{path} holds one JSON value, and its lines were read as records. They are in the quarantine; start with "
                     f"--multiline, and give the file a new name.")


def read_lines(batch: DataFrame, careful: bool) -> DataFrame:
    """One record per line of the batch's files, but for blank lines; see `read_files`."""
    return read_files(batch, careful, lineSep="\n")


def read_values(batch: DataFrame, careful: bool) -> DataFrame:
    """One record per object of the batch's files, each of which holds an object or an array of them; see `read_files`.

    The elements of an array come without white space and with numbers as Spark writes them. A file whose array is
    broken, or holds null or strings, is one record as a whole.
    """
    files = with_elements(read_files(batch, careful, wholetext=True))
    return files.select(F.explode(F.coalesce("elements", F.array("raw"))).alias("raw"),
                        "source_file", "ingest_time", "reject_reason")


def with_elements(files: DataFrame) -> DataFrame:
    """Adds to files (`raw`) what is in them: `is_object`, and the `elements` of an array, null of anything else and of an
    array with null or strings in it."""
    strict = {"allowSingleQuotes": "false", "allowNonNumericNumbers": "false"}
    checksum = F.sha2("raw", 256)
    # As in common/readings.py: the checksum comes second only if nothing but white space follows the value.
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


def find_multiline(batch: DataFrame, quarantine: str) -> list[str]:
    """Paths of the batch's files that hold one object or an array of them over several lines, or an array in one."""
    line = F.btrim(F.col("raw").cast("string"), F.lit(" \t\r\ufeff"))
    begins_object = line.startswith("{")
    suspects = (
        batch.sparkSession.read.format("delta").load(quarantine)
        .where(F.col("reject_reason") == "malformed_json")
        .where(F.col("ingest_time") == F.timestamp_micros(F.lit(batch.select(F.unix_micros("ingest_time")).first()[0])))
        .groupBy("source_file").agg(F.bool_or(line.startswith("[")).alias("is_array"),
                                    F.bool_or(begins_object).alias("begins"), F.bool_or(~begins_object).alias("goes_on"))
        .where("is_array OR begins AND goes_on"))
    paths = [row.source_file for row in suspects.collect()]
    files = read_files(batch.where(F.col("path").isin(paths)), careful=False, wholetext=True)
    is_multiline = F.col("is_object") | F.col("elements").isNotNull()
    return [row.source_file for row in with_elements(files).where(is_multiline).select("source_file").collect()]


def read_files(batch: DataFrame, careful: bool, **text_options) -> DataFrame:
    """Reads the files whose names are in `batch`.

    Out: `raw` (binary: a line or a whole file that is not blank), `source_file`, `ingest_time`, and `reject_reason`: null,
    or "unreadable_file" with a null `raw` for each file that has too much in one piece or, where `careful`, can't be read
    to its end.
    """
    spark = batch.sparkSession
    # Microseconds, because a datetime of Python would go through the zone of this machine.
    files = batch.select("path", "length", F.unix_micros("ingest_time").alias("ingest_time")).distinct().collect()
    paths = [file.path for file in files]
    unreadable = find_unreadable(spark, paths) if careful else []
    unreadable += find_oversized(spark, [file for file in files if file.path not in unreadable], text_options)
    ingest_time = F.timestamp_micros(F.lit(files[0].ingest_time if files else None))
    names = F.array(*map(F.lit, unreadable)).cast("ARRAY<STRING>")
    records = spark.range(1).select(F.lit(None).cast("binary").alias("raw"), F.explode(names).alias("source_file"),
                                    F.lit("unreadable_file").alias("reject_reason"))
    if readable := [path for path in paths if path not in unreadable]:
        text = read_text(spark, readable, **text_options).where(F.btrim("value", F.lit(" \t\r\n")) != "")
        records = records.union(text.select(F.col("value").cast("binary"), source_file(), F.lit(None).cast("string")))
    return records.withColumn("ingest_time", ingest_time)


def read_text(spark: SparkSession, paths: list[str], **text_options) -> DataFrame:
    """The lines of files, or with `wholetext` the files, whatever their names hold."""
    reader = spark.read.options(**READ_OPTIONS)
    # Spark takes each path for a pattern, and Hadoop finds none with a ":" by one. A single path it can be told to take as
    # it is; of several it would then read each several times.
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


def find_oversized(spark: SparkSession, files: list[Row], text_options: dict) -> list[str]:
    """Paths of those of `files` with more in one piece than the memory could hold, each named on stderr.

    READ_OPTIONS leave out a line that long without a word: what is read is then shorter than the file.
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
    java = spark._jvm
    settings = java.org.apache.hadoop.conf.Configuration(spark._jsc.hadoopConfiguration())
    for name, value in READ_OPTIONS.items():
        settings.set(name, str(value))
    path = java.org.apache.hadoop.fs.Path(file.path)
    content = path.getFileSystem(settings).open(path)
    try:
        return java.org.apache.commons.io.IOUtils.copyLarge(
            java.java.util.zip.GZIPInputStream(content), java.org.apache.commons.io.output.NullOutputStream.INSTANCE)
    except Py4JJavaError:
        return 0
    finally:
        content.close()


def find_unreadable(spark: SparkSession, paths: list[str]) -> list[str]:
    """Those of `paths` that can't be read to their end (no permission, a broken .gz, gone), each named on stderr."""
    try:
        read_text(spark, paths).write.format("noop").mode("overwrite").save()
        return []
    except (PySparkException, Py4JJavaError) as error:
        if len(paths) == 1:
            warn(f"{paths[0]} can't be read: {first_line(root_cause(error))}. {IN_QUARANTINE}")
            return paths
    middle = len(paths) // 2
    return find_unreadable(spark, paths[:middle]) + find_unreadable(spark, paths[middle:])


def escape_glob(path: str) -> str:
    return re.sub(r"([\\\[\]{}*?])", r"\\\1", path)


if __name__ == "__main__":
    run(main)
