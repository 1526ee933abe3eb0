"""Folders and files of every kind, read by the stream's own functions in one Spark session."""

import argparse
import errno
import gzip
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from pipeline.contract.contract import MAX_RECORD_BYTES
from pipeline.delta.tables import FILE_HISTORY, LOG_HISTORY, properties_of
from pipeline.files.folder import check_archive, count_waiting
from pipeline.files.private import TakenFile
from pipeline.files.reading import find_unreadable, is_sparse, unpacked_size, with_elements
from pipeline.files.source import FileSource
from pipeline.files.taken import TakenFiles
from pipeline.paths import quarantine_of
from pipeline.spark import durable
from pipeline.spark.file_system import BrokenFileError
from pipeline.streaming.source import SourceAwayError
from pipeline.terminal.arguments import location
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import without_controls
from pipeline.terminal.ports import free_ports

import pytest
from pyspark.errors import StreamingQueryException
from pyspark.sql import Row

from helpers.files import put
from helpers.processes import run_script
from helpers.records import reading
from helpers.streams import plan

BRONZE = "streaming_files_to_delta_bronze.py"
VALID, BROKEN = reading(), b"{"


@pytest.mark.parametrize("multiline", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("nothing", [[], [b"", b"\t", b"\n \r\n\n"]], ids=["no file", "empty and blank"])
def test_a_folder_with_nothing_in_it_stops_nothing_and_what_comes_later_is_read(ingest, nothing, multiline):
    folder, run = ingest
    for number, content in enumerate(nothing):
        (folder / f"nothing{number}.json").write_bytes(content)
    assert [run(multiline), run(multiline)] == [(0, 0), (0, 0)]
    put(folder, "something.json", VALID)
    assert run(multiline) == (1, 0)
    (folder / "nothing again.json").touch()
    assert run(multiline) == (0, 0)


NAMES = [
    "2026-11-20T08:00:00Z.json",
    "2026-11-20T08:00:00Z[UTC].json",
    "a:b*?.jsonl.gz",
    "capital.JSON",
    "Capital.JsonL",
    "capital.NDJSON.GZ",
    "größe é.json",
    "\U0001f600 \n.json",
    "100% + #&'\"\\.json",
    "sub:folder/deep er/x:y.ndjson",
    "sub [a]{b}*/plain.json",
    "sub [a]{b}*/x:y.json",
    "sub [a]/12:00/plain.json",
    "2026-11-20T08:00:00/pump[3].json",
]


@pytest.mark.parametrize("multiline", [False, True])
def test_files_of_every_name_are_read(ingest, spark, tmp_path, multiline):
    folder, run = ingest
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(VALID) if name.lower().endswith(".gz") else VALID)
    assert run(multiline) == (len(NAMES), 0)
    files = spark.read.format("delta").load(str(tmp_path / "bronze")).select("source_file").collect()
    assert sorted(row.source_file for row in files) == sorted(f"file:{folder}/{name}" for name in NAMES)


def test_a_batch_of_unreadable_files_alone_is_in_the_quarantine(ingest, capsys):
    folder, run = ingest
    (folder / "half.json.gz").write_bytes(gzip.compress(os.urandom(1000))[:500])
    (folder / "long.json").write_bytes(b"x" * 9_000_000)
    assert [run(), run()] == [(0, 2), (0, 0)]
    said = capsys.readouterr().err
    assert all(f"{folder}/{name} can't be read" in said for name in ("half.json.gz", "long.json"))
    put(folder, "good.json", VALID)
    assert run() == (1, 0)


def test_records_as_long_as_can_be_are_in_one_of_the_tables(ingest):
    folder, run = ingest
    longest = VALID[:-1] + b', "note": "' + b"x" * MAX_RECORD_BYTES
    for number, (end, size) in enumerate(
        itertools.product((b"", b"\n", b"\r\n"), range(MAX_RECORD_BYTES - 1, MAX_RECORD_BYTES + 4))
    ):
        (folder / f"{number}.json").write_bytes(longest[: size - 2 - len(end)] + b'"}' + end)
    accepted, rejected = run()
    assert accepted + rejected == 15 and accepted >= 6


def test_a_large_file_of_lines_with_a_broken_one_is_not_taken_for_an_unreadable_one(ingest, capsys):
    folder, run = ingest
    lines = MAX_RECORD_BYTES // len(VALID) + 1000
    (folder / "large.json").write_bytes(b"[\n" + (VALID + b"\n") * lines)
    assert run() == (lines, 1)
    assert capsys.readouterr().err == ""


CONTENT = gzip.compress(b"\n".join(reading(value=n / 100) for n in range(3000)))
FLIPPED = bytearray(CONTENT)
FLIPPED[len(CONTENT) // 2] ^= 255


@pytest.mark.parametrize("multiline", [False, True])
def test_packed_files_are_condemned_for_what_is_in_them_and_each_is_named_with_its_fault(ingest, capsys, multiline):
    folder, run = ingest
    broken = {
        "cut": CONTENT[:-500],
        "cut in its checksum": CONTENT[:-6],
        "no gzip": VALID,
        "followed by something": CONTENT + b"more",
        "flipped": bytes(FLIPPED),
        "a small one": gzip.compress(VALID)[:-9],
        "one byte": b"\x1f",
        "half a header": CONTENT[:9],
        "reserved flags": CONTENT[:3] + b"\xff" + CONTENT[4:],
        "another method": CONTENT[:2] + b"\x07" + CONTENT[3:],
    }
    for name, content in broken.items():
        (folder / f"{name}.json.gz").write_bytes(content)
    (folder / "empty.json.gz").touch()
    (folder / "two in one.json.gz").write_bytes(gzip.compress(VALID[:20]) + gzip.compress(VALID[20:]))
    assert run(multiline) == (1, len(broken))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(broken), said
    assert all(
        any(f"{folder}/{name}.json.gz can't be read: " in line and "quarantine" in line for line in said)
        for name in broken
    )


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large"])
def test_packed_files_whose_place_does_not_answer_are_not_condemned(spark, size):
    """If they were, files of these names would never be read again."""
    [port] = free_ports(1)
    file = Row(path=f"webhdfs://127.0.0.1:{port}/1.json.gz", length=size)
    with pytest.raises(PipelineError, match="1.json.gz can't be read at the moment: .*[Cc]onnection.* Nothing is lost"):
        find_unreadable(spark, [file], {}, 10**9, careful=True, text_options={})


def test_a_file_whose_name_is_not_in_utf8_is_named(ingest, capsys):
    folder, run = ingest
    put(folder, "good.json", VALID)
    (folder / os.fsdecode("größe.json".encode("latin-1"))).write_bytes(VALID)
    assert run() == (1, 0)
    assert r"gr\udcf6\udcdfe.json can't be read: its name is not in UTF-8" in capsys.readouterr().err


def test_files_that_were_read_are_archived_and_not_read_again(ingest, tmp_path):
    folder, run = ingest
    names = ["1.json", "größe [a] é.json", "2026-11-20T08:00:00Z.json", "sub/deep.json"]
    (folder / "sub").mkdir()
    for name in names:
        (folder / name).write_bytes(VALID)
    archive = tmp_path / "archive"
    assert run(archive=str(archive), max_files_per_trigger=2) == (4, 0)
    put(folder, "next.json", VALID, BROKEN)
    assert run() == (1, 1)
    put(folder, "last.json", VALID)
    assert run() == (1, 0)
    moved = {str(path.relative_to(archive)) for path in archive.rglob("*.json")}
    assert moved >= {f"{folder}/{name}".lstrip("/") for name in (*names, "next.json")}
    assert run() == (0, 0)


@pytest.mark.parametrize(
    "archive", ["{input}", "{input}/archive", "{input}/..", "/", "s3a://lake", "s3a://lake/archive", "file:///"]
)
def test_an_archive_that_cannot_be_is_refused(ingest, archive):
    folder, run = ingest
    archive = location(archive.format(input=folder))
    with pytest.raises(
        PipelineError, match=f"{archive} can't be the archive of {folder}: it has to be a folder in the same store"
    ):
        run(archive=archive)


def test_an_archive_is_in_the_bucket_of_the_folder():
    check_archive("s3a://lake/old", "s3a://lake/in")
    for archive, folder in (("s3a://other/old", "s3a://lake/in"), ("s3a://lake/old", "s3a://lake")):
        with pytest.raises(PipelineError, match=f"{archive} can't be the archive of {folder}"):
            check_archive(archive, folder)


def test_an_archive_may_have_any_name(tmp_path):
    (tmp_path / "a#in").mkdir()
    check_archive(f"{tmp_path}/a#old?", f"{tmp_path}/a#in")
    assert {path.name for path in tmp_path.iterdir()} == {"a#in", "a#old?"}


def test_an_archive_that_cannot_be_written_to_is_refused(tmp_path):
    with pytest.raises(
        PipelineError, match=f"may not move files from {tmp_path} to /proc/none: /proc/none can't be written to"
    ):
        check_archive("/proc/none", str(tmp_path))


def test_files_that_wait_are_counted_as_the_stream_takes_them(spark, tmp_path):
    for name in ("a.json", "sub/b.JSONL.gz", "sub/c.txt", ".tmp/d.json", "_drafts/deep/e.json", "_f.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    options = argparse.Namespace(input=str(tmp_path), checkpoint=str(tmp_path / "none"))
    assert count_waiting(TakenFiles(spark, options.checkpoint, options.input, None), options) == 2


@pytest.mark.long
def test_thousands_of_files_are_read(ingest):
    folder, run = ingest
    for number in range(5000):
        (folder / f"{number}.json").write_bytes(VALID + b"\n\n" + (BROKEN if number % 100 == 0 else VALID) + b"\r\n")
    assert run() == (9950, 50)


def test_blank_lines_are_no_records(ingest):
    folder, run = ingest
    (folder / "blank.json").write_bytes(b"\r\n\n" + VALID + b"\r\n\r\n \t \n" + VALID + b"\n\n" + BROKEN + b"\n\n")
    assert run() == (2, 1)


PRETTY = json.dumps(json.loads(VALID), indent=2).encode()
MULTILINE = {
    "pretty.json": PRETTY,
    "pretty, other style.json": VALID.replace(b", ", b",\n"),
    "pretty, with a byte order mark.json": b"\xef\xbb\xbf" + PRETTY,
    "pretty, of Windows.json": PRETTY.replace(b"\n", b"\r\n"),
    "array.json": b"[" + VALID + b", " + VALID + b"]",
    "array in lines.json": b"[\n" + VALID + b",\n" + VALID + b"\n]\n",
    "pretty array.json": json.dumps([json.loads(VALID)] * 2, indent=2).encode(),
}
LINES = {
    "broken lines.json": VALID + b"\n{\n" + VALID[:30] + b"\n}\n[\n",
    "two values.json": PRETTY + b"\n" + PRETTY,
    "strings.json": b'["a",\n"b"]',
    "half.json": PRETTY[:-2],
}


def test_a_file_that_wants_multiline_is_named_once_and_no_other_is(ingest, capsys):
    folder, run = ingest
    for name, content in (MULTILINE | LINES).items():
        (folder / name).write_bytes(content)
    _, rejected = run()
    named = [line for line in capsys.readouterr().err.splitlines() if "--multiline" in line]
    assert sorted(line.split(" holds one JSON value")[0] for line in named) == sorted(
        f"file:{folder}/{name}" for name in MULTILINE
    )
    assert rejected > len(MULTILINE | LINES)
    assert run() == (0, 0) and capsys.readouterr().err == ""


NESTED = b'{"a": ' * 199 + b"1.10" + b"}" * 199
ELEMENTS = [
    reading(value=12345678901234567.89).replace(b"1.2345678901234568e+16", b"12345678901234567.89"),
    reading().replace(b'"value"', b'"x": 1.000000000000000000000000000000010, "value"'),
    reading().replace(b": ", b" :\t"),
    reading(building='[{]}\\",\u00e4'),
    reading(building="@").replace(b"@", rb"\u00e4\/"),
    b"7",
    b"1E400",
    b"-0.0",
    b"true",
    b"[1, [2]]",
    b"{}",
    b"[]",
    reading(building="@").replace(b"@", rb"\ud800"),
    b'{"a": 1, "a": 1.0}',
    NESTED,
]
BLANKS = [b"", b" ", b"\n\t\r\n"]


@pytest.mark.parametrize("before, after", list(itertools.product(BLANKS, BLANKS)))
def test_the_elements_of_an_array_come_as_they_stand_in_the_file(spark, before, after):
    array = (
        before + b"[" + (before + b"," + after).join([after + element + before for element in ELEMENTS]) + b"]" + after
    )
    files = spark.createDataFrame([(bytearray(array),)], "raw BINARY")
    assert list(map(bytes, with_elements(files).first().elements)) == ELEMENTS


@pytest.mark.parametrize(
    "array",
    [
        b"",
        b"[",
        b"[1",
        b"[1]]",
        b"[1,]",
        b"[1 2]",
        b"[,1]",
        b"[1][2]",
        b"{}",
        b"[{]",
        b"[{},[}]",
        b"1",
        b"[1],",
        b"[nul]",
        b"[1]\x0b",
        b"['a']",
        b"[NaN]",
        b'["a"]',
        b'[{}, "a"]',
        b"[null]",
        b"[\xff]",
        b"[" * 203 + b"]" * 203,
        b'[{"a": "\n"}]',
    ],
    ids=str,
)
def test_what_is_no_array_of_records_is_not_cut(spark, array):
    files = spark.createDataFrame([(bytearray(array),)], "raw BINARY")
    assert with_elements(files).first().elements is None


def _of(size: int, begin: bytes, repeated: bytes, end: bytes) -> bytes:
    return begin + repeated * ((size - len(begin + end)) // len(repeated)) + end


@pytest.mark.parametrize(
    "parts",
    [
        (b"[" + VALID, b",\n" + VALID, b"]"),
        (b"[{}", b",{}", b"]"),
        (b"[", b"[", b""),
        (b"[", b'"', b""),
        (b'[{"a":"', b'\\"', b'"}]'),
        (b"[", b",", b"]"),
        (b"[1", b" ", b"]"),
        (b"[{}", b",{},[1", b"]"),
    ],
    ids=lambda parts: parts[1].decode()[:8],
)
def test_no_array_takes_long(spark, parts):
    files = spark.createDataFrame([(bytearray(_of(MAX_RECORD_BYTES, *parts)),)], "raw BINARY").cache()
    files.count()
    began = time.monotonic()
    with_elements(files).write.format("noop").mode("overwrite").save()
    assert time.monotonic() - began < 60  # seconds; less than 10 with a core to itself


def test_what_a_file_that_wants_multiline_holds_is_read_with_it(ingest):
    folder, run = ingest
    for name, content in MULTILINE.items():
        (folder / name).write_bytes(content)
    assert run(multiline=True) == (10, 0)


def test_files_of_any_time_are_read_and_hide_no_other(ingest):
    folder, run = ingest
    for year in (1970, 2026, 2130, 2446, 2027, 1901, 1970):
        put(folder, f"{year} {len(list(folder.iterdir()))}.json", VALID)
        moment = (year - 1970) * 31_556_952
        os.utime(folder / f"{year} {len(list(folder.iterdir())) - 1}.json", (moment, moment))
        assert run() == (1, 0), year


DRAFTS = [
    "_site=A.json",
    "_tmp=1/deep/x.json",
    "sub/_tmp=1/x.json",
    ".site=A.json",
    "_metadata.json",
    "_common_metadata.json",
    "_tmp/x.json",
    "_.json",
    "sub/_x.json.gz",
]


def test_drafts_are_not_read_whatever_their_names_hold(ingest, tmp_path, capsys):
    folder, run = ingest
    folder = tmp_path / "_up" / ".above=1" / "input"  # folders above the input do not make its files drafts
    for name in (*DRAFTS, "a_b=1.json", "c_=/x_.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(VALID)
    assert run(input=str(folder)) == (2, 0)
    os.rename(folder / "_site=A.json", folder / "site=A.json")
    (folder / "_metadata.json").write_bytes(VALID * 2)
    assert run() == (1, 0)
    assert run() == (0, 0) and capsys.readouterr().err == ""


def changed(folder, name: str) -> str:
    return f"{folder}/{name} has changed since it was read"


ODD_NAMES = [
    "a=1 %20+.json",
    "gr\u00f6\u00dfe \u2028\x85 \U0001f600.json",
    "2026-11-20T08:00:00Z.json",
    "new\nline.json",
    "sub/[a]{b}*.json",
]


@pytest.mark.long
def test_files_that_change_after_they_were_read_are_named_at_each_start(ingest, capsys):
    folder, run = ingest
    (folder / "sub").mkdir()
    for name in (*ODD_NAMES, "grows.json", "shrinks.json", "older.json", "stays.json", "goes.json"):
        (folder / name).write_bytes(VALID + b"\n" + VALID + b"\n")
    assert run() == (2 * len(ODD_NAMES) + 10, 0) and capsys.readouterr().err == ""
    time.sleep(0.02)  # file times only advance every few milliseconds
    for name in (*ODD_NAMES, "grows.json"):
        with (folder / name).open("ab") as file:
            file.write(VALID + b"\n")
    (folder / "shrinks.json").write_bytes(VALID)
    os.utime(folder / "older.json", (1, 1))
    (folder / "goes.json").unlink()
    for _ in range(2):
        assert run() == (0, 0)
        said = capsys.readouterr().err.split("\n")[:-1]
        assert sorted(line.split(" has changed since")[0] for line in said) == sorted(
            without_controls(f"{folder}/{name}") for name in (*ODD_NAMES, "grows.json", "shrinks.json", "older.json")
        )
    for number in range(11):
        put(folder, f"{number}.json", VALID)
    assert run(max_files_per_trigger=1) == (11, 0)  # enough batches for Spark to compact its log
    capsys.readouterr()
    for number in range(11):
        os.utime(folder / f"{number}.json", (1, 1))
    assert run() == (0, 0)
    said = capsys.readouterr().err.split("\n")[:-1]
    assert len(said) == 11 and said[-1] == "The same applies to 9 more files."


@pytest.mark.long
def test_files_that_change_before_they_are_read_and_after_they_are_archived(ingest, tmp_path, monkeypatch, capsys):
    """The first kind is read in full and never reported. Lines added to the second kind reach no table, so it is
    reported.
    """
    folder, run = ingest
    put(folder, "early.json", VALID)
    put(folder, "late.json", VALID)
    files_in = FileSource._files_in

    def grow(self, batch):
        with (folder / "early.json").open("ab") as file:
            file.write(VALID + b"\n")
        monkeypatch.undo()
        return files_in(self, batch)

    monkeypatch.setattr(FileSource, "_files_in", grow)
    time.sleep(0.02)
    archive = tmp_path / "archive"
    assert run(archive=str(archive)) == (3, 0)
    for number in range(3):  # Spark archives the files of a batch during later batches
        put(folder, f"{number}.json", VALID)
        assert run() == (1, 0)
    assert capsys.readouterr().err == ""
    moved = archive / str(folder / "late.json")[1:]
    with moved.open("ab") as file:
        file.write(VALID + b"\n")
    for _ in range(2):
        assert run() == (0, 0)
        assert capsys.readouterr().err.startswith(
            f"{changed(folder, 'late.json')}, and a file is read only once, so later additions may be"
        )


def test_a_renamed_folder_is_refused_even_if_its_old_name_only_continued_the_new_one(ingest, tmp_path):
    """The rest of the old path, "_2025/a.json", looks like that of a draft. And files of several folders have been read."""
    folder, run = ingest
    names = [f"{folder}_2025", str(folder), f"{folder}_2026"]
    for number, name in enumerate(names[:2]):
        os.makedirs(name, exist_ok=True)
        assert run(input=name) == (0, 0)
        put(Path(name), f"{number}.json", VALID)
        assert run(input=name) == (1, 0)
    for number, other in ((0, f"{folder}_2"), (1, names[2])):
        os.rename(names[number], other)
        with pytest.raises(PipelineError, match="belongs to another input folder"):
            run(input=other)


@pytest.mark.parametrize(
    "other", ["inp", *(pytest.param(other, marks=pytest.mark.long) for other in ("link", "elsewhere"))]
)
def test_a_folder_by_another_path_is_refused(ingest, tmp_path, other):
    """Otherwise all its files would be read again."""
    folder, run = ingest
    put(folder, "a.json", VALID)
    (folder / "sub").mkdir()
    if other == "link":
        (tmp_path / other).symlink_to(folder)
    else:
        (tmp_path / other).mkdir()
    assert run(input=str(tmp_path / other)) == (1 if other == "link" else 0, 0)
    if other == "link":
        with pytest.raises(
            PipelineError,
            match=f"belongs to another input folder: the stream has read files such as "
            f"{tmp_path}/link/a.json, and none in {folder}. Under a different path",
        ):
            run(input=str(folder))
        (tmp_path / "link" / "a.json").unlink()
        assert run(input=str(tmp_path / "link")) == (0, 0)
    else:
        assert run(input=str(folder)) == (1, 0)
        for same in (f"file:{folder}", f"file://{folder}/", str(folder / "sub"), str(tmp_path)):
            assert run(input=same) == (0, 0)
        assert run(input=str(tmp_path / other)) == (0, 0)  # the new folder is still empty
        shutil.copy2(folder / "a.json", tmp_path / other / "a.json")
        with pytest.raises(PipelineError, match="belongs to another input folder"):
            run(input=str(tmp_path / other))
        put(tmp_path / other, "a.json", VALID)
        assert run(input=str(tmp_path / other)) == (1, 0)


def test_what_a_link_leads_to_is_named_and_not_read(ingest, tmp_path, capsys):
    folder, run = ingest
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere", "secret.json", VALID)
    put(folder, "a.json", VALID)
    (folder / "b.json").symlink_to(folder / "a.json")
    (folder / "c.json").symlink_to(tmp_path / "elsewhere" / "secret.json")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    assert run(input=str(tmp_path / "link")) == (1, 0)
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" is not read: links")[0] for line in said) == [
        f"{tmp_path}/link/{name}" for name in ("b.json", "c.json", "linked/secret.json")
    ]
    (folder / "linked").unlink()
    for target in (folder, tmp_path, folder / "sub"):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "round").symlink_to(target)
        with pytest.raises(PipelineError, match=f"{tmp_path}/link/round is a link that leads back to {tmp_path}/link"):
            run()
        (folder / "round").unlink()


def test_a_link_to_links_could_be_followed_without_end(ingest, tmp_path):
    folder, run = ingest
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        PipelineError, match=f"{folder}/linked is a link to a folder that contains another link, .*linked/again"
    ):
        run()


@pytest.mark.long
def test_files_behind_a_link_are_not_archived(ingest, tmp_path, capsys, monkeypatch):
    folder, run = ingest
    (tmp_path / "elsewhere").mkdir()
    for number in range(4):
        put(folder, f"{number}.json", VALID)
    assert run(archive=str(tmp_path / "archive")) == (4, 0)
    put(tmp_path / "elsewhere", "a.json", VALID)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        PipelineError, match=f"{folder}/linked is a link to a folder, whose files --archive would move away unread"
    ):
        run()
    monkeypatch.setattr("pipeline.files.folder.links_in", lambda _: iter(()))  # made during the run
    for _ in range(2):
        with pytest.raises(PipelineError, match=f"{folder}/linked is, or is inside, a linked folder, and --archive"):
            run()
    assert (tmp_path / "elsewhere" / "a.json").exists() and capsys.readouterr().err == ""
    assert run(archive=None) == (0, 0)
    assert f"{folder}/linked/a.json is not read" in capsys.readouterr().err


@pytest.mark.long
def test_drafts_are_archived_only_if_spark_cannot_be_told_to_leave_them(ingest, tmp_path, capsys):
    folder, run = ingest
    drafts = ["_date=2026-11-20.json", "_metadata_x.json", "_common_metadata=1.json", ".hidden=1.json"]
    for name in (*drafts, "one.json"):
        put(folder, name, VALID)
    (folder / "_tmp=1").mkdir()
    assert run(archive=str(tmp_path / "archive")) == (1, 0) and capsys.readouterr().err == ""
    put(folder / "_tmp=1", "draft.json", VALID)
    for number in range(3):
        put(folder, f"{number}.json", VALID)
        assert run() == (1, 0)
    assert {path.name for path in folder.glob("*.json")} >= set(drafts)
    assert f"{folder}/_tmp=1/draft.json is a draft and is not read, but --archive moves it" in capsys.readouterr().err


@pytest.mark.skipif(os.stat("/dev/shm").st_dev == os.stat("/tmp").st_dev, reason="needs a second disk")
@pytest.mark.long
def test_files_that_are_archived_on_another_disk_have_not_changed(ingest, capsys):
    folder, run = ingest
    with tempfile.TemporaryDirectory(dir="/dev/shm") as archive:
        for number in range(4):
            put(folder, f"{number}.json", VALID)
            assert run(archive=archive) == (1, 0)
        assert list(Path(archive).rglob("*.json")) and capsys.readouterr().err == ""


@pytest.mark.parametrize("pack", [True, False])
def test_a_file_that_is_packed_where_it_was_read_is_named(ingest, capsys, pack):
    folder, run = ingest
    for name in ("a.json", "other.json"):
        put(folder, name, VALID)
        os.utime(folder / name, (1, 1))
    if not pack:
        subprocess.run(["gzip", folder / "a.json"], check=True)
    assert run() == (2, 0) and capsys.readouterr().err == ""
    subprocess.run(["gzip", folder / "a.json"] if pack else ["gunzip", folder / "a.json.gz"], check=True)
    (folder / "other.json.gz").write_bytes(gzip.compress(VALID))  # has a later time, so it counts as another file
    assert run() == (2, 0)
    assert capsys.readouterr().err.startswith(
        f"{folder}/a.json{'.gz' * pack} looks like a file that was read before and"
    )
    assert run() == (0, 0) and capsys.readouterr().err == ""


@pytest.mark.long
def test_hundreds_of_files_whose_names_look_like_patterns_are_read_a_few_at_a_time(ingest, monkeypatch, capsys):
    """For n such files, Spark lists n² entries."""
    folder, run = ingest
    for number in range(150):
        put(folder, f"[{number}] {{x}}.json", VALID)
    for number in range(10):
        put(folder, f"{number}.json", VALID)
    with monkeypatch.context() as patch:  # as if they had come while the stream ran, and had ended it
        patch.setattr("pipeline.files.folder.is_pattern", lambda _: False)
        crash_in(patch, "read_batch")
        with pytest.raises((RuntimeError, StreamingQueryException)):
            run()
    assert run() == (160, 0)
    said = capsys.readouterr().out
    assert "has too many files with wildcards in their names. It will be split into smaller ones." in said
    assert [line.split(",")[0] for line in said.splitlines() if line.startswith("batch")] == [
        "batch 0: 100 rows in",
        "batch 1: 60 rows in",
    ]


def crash_in(patch: pytest.MonkeyPatch, method: str) -> None:
    def crash(*_) -> None:
        raise RuntimeError("crash")

    patch.setattr(FileSource, method, crash)


def test_a_file_that_grows_or_goes_between_a_crash_and_the_restart_is_named(ingest, capsys, monkeypatch):
    """The table already has the batch. It is repeated, but new lines in its files are not read."""
    folder, run = ingest
    for name in ("grows.json", "goes.json", "stays.json"):
        put(folder, name, VALID)

    with monkeypatch.context() as patch:
        crash_in(patch, "after_batch")
        with pytest.raises((RuntimeError, StreamingQueryException)):
            run()
    time.sleep(0.02)
    with (folder / "grows.json").open("ab") as file:
        file.write(VALID + b"\n")
    (folder / "goes.json").unlink()
    capsys.readouterr()
    assert run() == (0, 0)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and "were read twice, with different results" in said[2]
    assert said[0].startswith(changed(folder, "grows.json"))
    assert said[1].startswith(f"{folder}/goes.json disappeared before it was read")


def test_a_file_that_goes_while_its_batch_is_read_is_named(ingest, monkeypatch, capsys):
    folder, run = ingest
    for name in ("stays.json", "goes.json"):
        put(folder, name, VALID)
    read_batch = FileSource.read_batch

    def read_and_remove(self, batch):
        records = read_batch(self, batch)
        (folder / "goes.json").unlink()
        return records

    monkeypatch.setattr(FileSource, "read_batch", read_and_remove)
    assert run() == (1, 0)
    assert f"{folder}/goes.json disappeared before it was read" in capsys.readouterr().err


@pytest.mark.parametrize("mount", ["", "site"])
@pytest.mark.parametrize("moment", ["read_batch", "read_again"])
def test_a_batch_whose_disk_is_not_mounted_waits_for_it(ingest, tmp_path, monkeypatch, mount, moment):
    folder, run = ingest
    disk = folder / mount
    if mount:
        disk.mkdir()
        put(folder, "other.json", VALID)
        assert run() == (1, 0)
    put(disk, "a.json", VALID)
    if moment == "read_again":
        read_batch = FileSource.read_batch

        def read_and_unmount(self, batch):
            records = read_batch(self, batch)
            (disk / "a.json").rename(tmp_path / "a.json")
            return records

        with monkeypatch.context() as patch:
            patch.setattr(FileSource, "read_batch", read_and_unmount)
            with pytest.raises(
                PipelineError,
                match=f"{disk} is empty, so files of this batch are missing, such as {disk}/a.json",
            ):
                run()
        (tmp_path / "a.json").rename(disk / "a.json")
        assert run() == (1, 0)
        return
    with monkeypatch.context() as patch:
        crash_in(patch, "read_batch")
        with pytest.raises((RuntimeError, StreamingQueryException)):
            run()
    (disk / "a.json").rename(tmp_path / "a.json")
    with pytest.raises(
        PipelineError, match=f"{disk} is empty, so files of this batch are missing, such as {disk}/a.json"
    ):
        run()
    with monkeypatch.context() as patch:  # the disk is mounted after Spark has listed the batch
        read_batch = FileSource.read_batch

        def mount_and_read(self, batch):
            self._files_in(batch)
            (tmp_path / "a.json").rename(disk / "a.json")
            return read_batch(self, batch)

        patch.setattr(FileSource, "read_batch", mount_and_read)
        with pytest.raises(PipelineError, match=f"{disk}/a.json was not there when its batch began, but is there now"):
            run()
    assert run() == (1, 0)


def test_a_subfolder_that_is_gone_before_it_is_read_stops_no_stream(ingest, tmp_path, capsys):
    folder, run = ingest
    put(folder, "other.json", VALID)
    (folder / "upload").mkdir()
    put(folder / "upload", "a.json", VALID)
    with pytest.MonkeyPatch.context() as patch:
        crash_in(patch, "read_batch")
        with pytest.raises((RuntimeError, StreamingQueryException)):
            run()
    (folder / "upload").rename(tmp_path / "done")
    assert run() == (1, 0)
    assert f"{folder}/upload/a.json disappeared before it was read" in capsys.readouterr().err


def test_links_that_are_made_while_the_stream_runs_end_it(spark, ingest):
    """Spark's listing would follow them, and double in size with each."""
    folder, run = ingest
    put(folder, "a.json", VALID)
    assert run() == (1, 0)
    source = FileSource(spark, run.options)
    source.watch()
    (folder / "again").symlink_to(folder)
    source.taken.next_round = 0
    with pytest.raises(PipelineError, match="again is a link that leads back"):
        source.watch()


def test_taken_files_are_watched_in_small_steps(spark, tmp_path, capsys):
    """At most 1,000 every half second, so that even a folder with many of them costs no noticeable share of a core."""
    taken = TakenFiles(spark, str(tmp_path / "none"), str(tmp_path), None)
    taken.files = {str(tmp_path / f"{number}.json"): TakenFile(0, 0) for number in range(30_000)}
    for number in range(0, 30_000, 10_000):
        (tmp_path / f"{number}.json").touch()
    taken.next_round = 0
    taken.watch()
    began = time.process_time()
    for number in range(1, 31):
        taken.watch()
        assert len(taken.named) == -(-number // 10)
    assert time.process_time() - began < 1
    taken.watch()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_no_configuration_of_spark_makes_it_drop_what_it_cannot_read(spark, tmp_path):
    folder, conf = tmp_path / "input", tmp_path / "conf"
    folder.mkdir()
    conf.mkdir()
    (conf / "spark-defaults.conf").write_text(
        "spark.sql.files.ignoreCorruptFiles true\nspark.sql.files.ignoreMissingFiles true\n"
    )
    (folder / "half.json.gz").write_bytes(gzip.compress(b"\n".join(reading(value=n / 100) for n in range(3000)))[:-500])
    run = run_script(
        BRONZE,
        "--input",
        folder,
        "--table",
        tmp_path / "t",
        "--checkpoint",
        tmp_path / "c",
        "--once",
        env=os.environ | {"SPARK_CONF_DIR": str(conf)},
    )
    assert run.returncode == 0 and "half.json.gz can't be read" in run.stderr
    assert "1 rows in, 0 accepted, 1 rejected (unreadable_file 1)" in run.stdout


@pytest.mark.parametrize("place", ["a table of something else", "a folder with files"])
def test_what_is_at_the_table_and_not_of_this_pipeline_is_left_alone(spark, ingest, tmp_path, place):
    _, run = ingest
    table = tmp_path / "bronze"
    if place == "a folder with files":
        table.mkdir()
        (table / "thesis.pdf").touch()
    else:
        spark.range(3).write.format("delta").save(str(table))
    before = sorted(table.rglob("*"))
    for _ in range(2):
        with pytest.raises(PipelineError, match="There is something at .*bronze that this pipeline did not create"):
            run()
    assert sorted(table.rglob("*")) == before


@pytest.mark.parametrize("multiline", [False, True])
def test_a_packed_file_that_is_too_large_even_packed_is_condemned_as_a_whole(ingest, capsys, multiline):
    """Its unpacked size is not counted to the end, so nothing else would notice a line that Hadoop skips."""
    folder, run = ingest
    lines = [VALID, b'"' + b"a" * 9_000_000 + b'"', *(os.urandom(500).hex().encode() for _ in range(4000))]
    (folder / "large.json.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    assert (folder / "large.json.gz").stat().st_size > 2_000_000
    put(folder, "small.json", VALID)
    (folder / "lines.json.gz").write_bytes(
        gzip.compress(b"\n".join(b"%d" % (byte % 10) for byte in os.urandom(50_000)))
    )
    assert run(multiline, max_unpacked=2) == (1, 2)
    said = capsys.readouterr().err
    for name in ("large", "lines"):
        assert f"{name}.json.gz can't be read: it unpacks to more than 2 MB or 40,000 lines" in said


@pytest.mark.parametrize("first", [None, "12 hours"])
def test_both_tables_keep_the_history_that_was_last_asked_for(ingest, spark, first):
    folder, run = ingest
    for number, (asked_for, expected) in enumerate(
        [(first, first or "2 hours"), ("3 days", "3 days"), (None, "3 days")]
    ):
        put(folder, f"{number}.json", VALID, BROKEN)
        assert run(keep_history=asked_for) == (1, 1)
        for table in (run.options.table, quarantine_of(run.options.table)):
            properties = properties_of(spark, table)
            assert {properties[LOG_HISTORY], properties[FILE_HISTORY]} == {f"interval {expected}"}


def test_a_folder_with_a_colon_and_a_wildcard_in_its_path_is_refused_as_the_input(ingest, tmp_path):
    _, run = ingest
    (tmp_path / "12:00 [a]").mkdir()
    with pytest.raises(PipelineError, match=r"whose path has both a colon and one of the wildcards"):
        run(input=str(tmp_path / "12:00 [a]"))


@pytest.mark.parametrize(
    "content, length, expected",
    [(5000, 5000, False), (4096, 10_000_000, True), (0, 10_000_000, True), (20_000, 10_000_000, False)],
)
def test_a_file_of_holes_is_told_by_its_content(tmp_path, monkeypatch, content, length, expected):
    monkeypatch.setattr("pipeline.files.reading.SPARSE_BYTES", 1000)
    file = tmp_path / "a.json"
    file.write_bytes(b"x" * content)
    os.truncate(file, length)
    assert is_sparse(Row(path=f"file:{file}", length=length)) is expected
    file.unlink()
    assert not is_sparse(Row(path=f"file:{file}", length=length))


def test_a_packed_file_that_is_removed_while_its_batch_begins_stops_nothing(spark, tmp_path):
    gone, there = (Row(path=f"file:{tmp_path}/{name}.json.gz", length=100_000) for name in ("gone", "there"))
    assert unpacked_size(spark, gone, 10**9) == (0, 0)
    (tmp_path / "there.json.gz").mkdir()  # can't be read, and is not gone
    with pytest.raises(SourceAwayError):
        unpacked_size(spark, there, 10**9)


def test_a_folder_that_cannot_be_synced_stops_nothing_and_a_file_does(tmp_path, monkeypatch):
    def fsync(number: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{number}") or is_broken:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    is_broken = False
    durable.replace(f"{tmp_path}/a", "text")
    is_broken = True
    with pytest.raises(OSError, match="Invalid argument"):
        durable.replace(f"{tmp_path}/a", "text")


def test_what_other_programs_leave_in_a_checkpoint_stops_nothing(ingest, tmp_path):
    folder, run = ingest
    put(folder, "a.json", VALID)
    assert run() == (1, 0)
    for place in ("sources/0", "offsets", "commits"):
        (tmp_path / "checkpoint" / place / "@eaDir").mkdir()
    put(folder, "b.json", VALID)
    assert run() == (1, 0)


def test_a_folder_in_the_place_of_a_planned_file_is_read_with_its_own_batch(ingest):
    folder, run = ingest
    put(folder, "a.json", VALID)
    put(folder, "z.json", VALID)
    plan(run.stream)
    (folder / "a.json").unlink()
    (folder / "a.json").mkdir()
    put(folder / "a.json", "b.json", VALID)
    assert run() == (2, 0)  # z.json and a.json/b.json, each once
    assert run() == (0, 0)


def test_a_list_of_files_by_another_job_hides_none(ingest):
    folder, run = ingest
    sink = folder / "_spark_metadata"
    sink.mkdir()
    put(folder, "a.json", VALID)
    assert run() == (1, 0)
    (sink / "0").write_text(
        'v1\n{"path":"file:///old/b.json","size":9,"isDir":false,"modificationTime":1,"blockReplication":1,'
        '"blockSize":1,"action":"add"}'
    )
    put(folder, "b.json", VALID)
    assert run() == (1, 0)


def test_a_file_that_is_renamed_after_it_was_read_is_named(ingest, capsys):
    folder, run = ingest
    for name in ("a.json", "b.json", "c.json"):
        put(folder, name, VALID)
        os.utime(folder / name, ns=(1_795_000_000_123_000_000 + ord(name[0]) * 1_000_000,) * 2)
    assert run() == (3, 0)
    (folder / "done").mkdir()
    (folder / "a.json").rename(folder / "done" / "a.json")
    shutil.copy2(folder / "b.json", folder / "copied.json")  # a copy: the original is still there
    (folder / "c.json").unlink()
    put(folder, "new.json", VALID)
    assert run() == (3, 0)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder}/done/a.json looks like a file that was read before and then renamed")


def test_it_is_named_too_if_its_time_has_no_fraction_or_its_old_name_is_used_again(ingest, capsys):
    folder, run = ingest
    for number, name in enumerate(("a.json", "b.json")):
        put(folder, name, VALID)
        os.utime(folder / name, ns=(1_795_000_000_000_000_000 + number * 1_000_000,) * 2)
    assert run() == (2, 0)
    (folder / "done").mkdir()
    (folder / "a.json").rename(folder / "done" / "a.json")  # its time is in whole seconds, as set by tar or curl
    (folder / "b.json").rename(folder / "b-1.json")  # like a rotated log
    put(folder, "b.json", VALID)
    put(folder, "other.json", VALID)
    os.utime(folder / "other.json", ns=(1_795_000_000_000_000_000,) * 2)
    assert run() == (3, 0)
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split()[0] for line in said if "read before and then renamed" in line) == [
        f"{folder}/b-1.json",
        f"{folder}/done/a.json",
    ], said


def test_advice_that_cannot_be_given_stops_no_stream(ingest, monkeypatch):
    folder, run = ingest
    put(folder, "1.json", b"{", b'"device_id": 1', b"}")
    for error in (SourceAwayError("the store is away"), BrokenFileError("it is cut")):
        monkeypatch.setattr("pipeline.files.source.find_multiline", _raising(error))
        assert run()[0] == 0
        put(folder, f"{len(str(error))}.json", b"{", b"}")


def _raising(error: Exception):
    def fail(*_):
        raise error

    return fail
