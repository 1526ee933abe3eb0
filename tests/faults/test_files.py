"""Input files that are half written, growing, renamed, replaced, very large or unreadable.

The large ones are 30 MB, or 1 GB with `--long`.
"""

import gzip
import os
import threading
from collections import Counter

from pipeline.paths import quarantine_of

from helpers.files import put
from helpers.processes import run_script
from helpers.records import reading

BRONZE = "streaming_files_to_delta_bronze.py"
RECORD = reading(device_id="sensor-001")


def tables(spark, table) -> tuple[Counter, list]:
    """Row counts of the table by file, and (reason, file) of each row in the quarantine."""
    accepted, rejected = (spark.read.format("delta").load(path) for path in (str(table), quarantine_of(str(table))))
    return (
        Counter(
            {
                os.path.basename(row.source_file): row["count"]
                for row in accepted.groupBy("source_file").count().collect()
            }
        ),
        sorted((row.reject_reason, os.path.basename(row.source_file)) for row in rejected.collect()),
    )


def test_files_that_change_while_they_are_taken_are_named_and_hurt_nobody_else(spark, tmp_path, start, account):
    folder, options = tmp_path / "input", ["--table", tmp_path / "bronze", "--checkpoint", tmp_path / "checkpoint"]
    folder.mkdir()
    grown = threading.Event()

    def grow():
        with (folder / "growing.json").open("ab", buffering=0) as file:
            while not grown.wait(0.2):
                file.write(RECORD + b"\n")

    (folder / "growing.json").write_bytes(RECORD + b"\n" + RECORD[:40])
    writer = threading.Thread(target=grow)
    stream = start(BRONZE, "--input", folder, *options, "--trigger", "0 seconds")
    put(folder, "Grüße aus der Küche 1.json", RECORD)
    writer.start()
    try:
        stream.wait_for("growing.json has changed since it was read")
        stream.wait_for("batch")
    finally:
        grown.set()
        writer.join()
    put(folder, "whole.json", RECORD, RECORD, RECORD)
    os.rename(folder / "whole.json", folder / "renamed.json")
    batches = stream.output.count("batch")
    stream.wait_for("batch", times=batches + 1)
    assert stream.stop() == 0 and "Traceback" not in stream.output

    accepted, rejected = tables(spark, tmp_path / "bronze")
    # The file was read as it was when the stream took it.
    assert accepted["growing.json"] >= 1 and ("malformed_json", "growing.json") in rejected
    whole = {"Grüße aus der Küche 1.json": 1, "renamed.json": 3}
    assert {file: accepted[file] for file in whole} == whole
    account(
        "files that grow, or are renamed",
        [(file, line) for file in whole for line in range(whole[file])],
        [(file, line) for file in whole for line in range(accepted[file])],
        [],
    )


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(spark, tmp_path, pytestconfig, account, run_here):
    folder, size = tmp_path / "input", 1_000_000_000 if pytestconfig.option.long else 30_000_000
    folder.mkdir()
    lines = size // (len(RECORD) + 1)
    with (folder / "large.json").open("wb") as file:
        for _ in range(lines // 1000):
            file.write((RECORD + b"\n") * 1000)
    with (folder / "one_line.json").open("wb") as file:
        for _ in range(size // 1_000_000):
            file.write(b"a" * 1_000_000)
    with gzip.open(folder / "bomb.json.gz", "wb") as file:
        for _ in range(size // 1_000_000):
            file.write(b"a" * 1_000_000)
    (folder / "many.json.gz").write_bytes(gzip.compress(b"{}\n" * 35_000_000, 1))
    put(folder, "broken.json.gz", *[reading(value=n) for n in range(40)])
    (folder / "broken.json.gz").write_bytes((folder / "broken.json.gz").read_bytes()[:200])
    os.symlink(folder / "nowhere", folder / "dangling.json")
    put(folder, "bell \x1b[31m.json.gz", RECORD)
    (folder / "bell \x1b[31m.json.gz").write_bytes(b"no gzip")
    put(folder, "small.json", RECORD, RECORD[:20])
    with (folder / "sparse.json").open("wb") as file:
        file.truncate(8_000_000_000_000)  # takes no space on the disk

    run = run_script(
        BRONZE,
        "--input",
        folder,
        "--table",
        tmp_path / "bronze",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--once",
        "--max-unpacked",
        100,
        timeout=3600,
    )

    assert run.returncode == 0 and "Traceback" not in run.stderr and "\x1b" not in run.stderr, run.stderr
    unreadable = [
        "bell \x1b[31m.json.gz",
        "bomb.json.gz",
        "broken.json.gz",
        "many.json.gz",
        "one_line.json",
        "sparse.json",
    ]
    for file in unreadable:
        assert f"{folder}/{file} can't be read: ".replace("\x1b", "\ufffd") in run.stderr
    assert f"{folder}/many.json.gz can't be read: it unpacks to more than 100 MB or" in run.stderr
    accepted, rejected = tables(spark, tmp_path / "bronze")
    assert accepted == Counter({"large.json": lines // 1000 * 1000, "small.json": 1})
    assert rejected == [("malformed_json", "small.json"), *(("unreadable_file", file) for file in unreadable)]
    account(
        f"a file of {size:,} bytes, a line of the same size, and unreadable files",
        range(lines // 1000 * 1000 + 8),
        range(sum(accepted.values())),
        range(sum(accepted.values()), sum(accepted.values()) + len(rejected)),
    )
    shown = run_here("read_bronze.py", "--table", tmp_path / "bronze", "--rejected")
    assert shown.returncode == 0 and "\x1b" not in shown.stdout and "\ufffd[31m" in shown.stdout
