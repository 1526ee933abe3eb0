"""Files on any file system that Spark supports: local, in a bucket, or on HDFS."""

from contextlib import closing
from typing import Any

from pipeline.spark.private import _java, hadoop_settings
from pipeline.terminal.errors import java_causes, root_cause

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession


class BrokenFileError(Exception):
    """A file was read, but its content can't be decompressed."""


class FileSystem:
    """The file system of a path, accessed through Spark, because Python alone can't reach all of them (`s3a://…`)."""

    def __init__(self, spark: SparkSession, path: str, **settings: str):
        self._java = _java(spark)
        hadoop = hadoop_settings(spark)
        for name, value in settings.items():
            hadoop.set(name, value)
        self._files = self._path(path).getFileSystem(hadoop)

    def _path(self, path: str) -> Any:
        return self._java.org.apache.hadoop.fs.Path(path)

    def qualified(self, path: str) -> str:
        """The path with the scheme of its file system, as in the paths of the files inside it."""
        return self._files.makeQualified(self._path(path)).toString()

    def is_folder(self, path: str) -> bool:
        return self._files.exists(self._path(path)) and self._files.getFileStatus(self._path(path)).isDirectory()

    def names_in(self, folder: str) -> list[str]:
        """The names in a folder; empty if there is no such folder."""
        return [status.getPath().getName() for status in self._statuses(folder)]

    def folders_in(self, folder: str) -> list[str]:
        """The paths of the folders in a folder."""
        return [status.getPath().toString() for status in self._statuses(folder) if status.isDirectory()]

    def _statuses(self, folder: str) -> list[Any]:
        return list(self._files.listStatus(self._path(folder))) if self.is_folder(folder) else []

    def read(self, path: str) -> str | None:
        """The text of a file; None if it does not exist."""
        if not self._files.exists(self._path(path)):
            return None
        with self._open(path) as content:
            return self._java.org.apache.commons.io.IOUtils.toString(content, "UTF-8")

    def unpacked_size(self, path: str, limit: int) -> tuple[int, int]:
        """The uncompressed size of a .gz file in bytes, as Spark reads it, or `limit` + 1 if it is larger, and the number of
        lines in it.

        Raises BrokenFileError if it can't be decompressed, and Py4JJavaError if it can't be read.
        """
        hadoop, io = self._java.org.apache.hadoop, self._java.java.io
        codec = hadoop.io.compress.CompressionCodecFactory(self._files.getConf()).getCodec(self._path(path))
        with self._open(path) as content:
            # This stream recognises its own errors: those of the disk, the store and the network. Any other error comes from
            # decompression.
            packed = self._java.org.apache.commons.io.input.TaggedInputStream(content)
            try:
                bytes_of = io.InputStreamReader(codec.createInputStream(packed), "ISO_8859_1")  # one character per byte
                lines = io.LineNumberReader(bytes_of)
                return lines.skip(limit + 1), lines.getLineNumber()
            except Py4JJavaError as error:
                # Hadoop turns a disk error into a Java Error, which is not an IOException.
                is_io = self._java.java.lang.Class.forName("java.io.IOException").isInstance
                if any(packed.isCauseOf(cause) or not is_io(cause) for cause in java_causes(error)):
                    raise
                raise BrokenFileError(root_cause(error)) from error

    def _open(self, path: str) -> closing[Any]:
        return closing(self._files.open(self._path(path)))

    def write(self, path: str, text: str) -> None:
        """Creates or replaces a file. This is atomic on object stores; on HDFS a crash may leave a partial file."""
        with closing(self._files.create(self._path(path), True)) as content:
            content.write(text.encode())

    def size(self, path: str) -> int | None:
        """The size of a file in bytes; None if it does not exist."""
        return self._files.getFileStatus(self._path(path)).getLen() if self._files.exists(self._path(path)) else None

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder with its contents. Does nothing if it does not exist."""
        self._files.delete(self._path(path), True)

    def rename(self, old: str, new: str) -> bool:
        """Returns False if renaming fails, and True if there is nothing to rename."""
        return not self._files.exists(self._path(old)) or self._files.rename(self._path(old), self._path(new))
