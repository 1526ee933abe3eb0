"""The page of dashboard.py in a browser (headless Chromium), on tables that are growing, broken, empty or missing."""

import http.client
import json
import shutil
import socket
import time

from pipeline.contract.contract import load_contract
from pipeline.dashboard.lake import Choice, Lake, overview
from pipeline.dashboard.page import refresh_every
from pipeline.paths import tables_in
from pipeline.terminal.ports import free_ports

import duckdb
import pandas as pd
import pytest
from deltalake import write_deltalake
from playwright.sync_api import expect, sync_playwright
from pyspark.sql import functions as F
from streamlit import net_util

from helpers.processes import REPOSITORY, run_script
from helpers.records import reading
from helpers.streams import bronze_writer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the PATH")
HOSTILE = '<script>document.title="gone"</script> **bold** $x$ [a](http://example.org) \x1b[31m'


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Chromium has no sandbox when it runs as root in a container. Its own requests to Google's hosts are irrelevant
        # here.
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, start):
    """A function that opens the page of a lake. Returns the page and the set of hosts that it sends requests to."""

    def open_page(lake):
        [port] = free_ports(1)
        dashboard = start("dashboard.py", "--lake", lake, "--port", port, "--bootstrap-servers", "localhost:1")
        dashboard.wait_for(f"http://127.0.0.1:{port} shows {lake}.")
        return visit_page(browser, port)

    return open_page


def visit_page(browser, port: int):
    hosts = set()
    page = browser.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    while not answers(port):
        time.sleep(0.2)
    page.goto(f"http://127.0.0.1:{port}")
    return page, hosts


def handshake(port: int, host: str, origin: str | None = None) -> int:
    """The HTTP status for a web page that reaches the port as `host` and asks for the data."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(
        "GET",
        "/_stcore/stream",
        headers={
            "Host": f"{host}:{port}",
            "Origin": origin or f"http://{host}:{port}",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version": "13",
        },
    )
    return connection.getresponse().status


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def write(spark, writer, batch: int, *records: bytes) -> None:
    rows = spark.range(1).select(
        F.explode(F.array(*map(F.lit, map(bytearray, records)))).alias("raw"),
        F.lit("f").alias("source_file"),
        F.current_timestamp().alias("ingest_time"),
    )
    writer.write(rows, batch, "test")


def shown(page, name: str):
    """The figure with this name at the top of the page."""
    return page.get_by_test_id("stMetric").filter(has_text=name).get_by_test_id("stMetricValue")


def expect_in_table(page, place: int, *texts: str) -> None:
    """Waits until the table at this place on the page contains these texts."""
    for text in texts:
        expect(page.get_by_test_id("stDataFrame").nth(place).locator("table")).to_contain_text(text)


def test_the_page_shows_what_is_written_as_it_is_written_and_takes_nothing_from_elsewhere(spark, tmp_path, visit):
    writer = bronze_writer(spark, tmp_path / "größe 'q\" é" / "readings")
    write(spark, writer, 0, reading(), reading(device_id=HOSTILE), reading(value=1e6), HOSTILE.encode() + b"\xff")
    page, hosts = visit(tmp_path)
    expect(shown(page, "Accepted")).to_have_text("2")
    expect(shown(page, "Rejected")).to_have_text("2")
    expect(shown(page, "Waiting in Kafka")).to_have_text("–")
    write(spark, writer, 1, *[reading()] * 998, b"{")
    expect(shown(page, "Accepted")).to_have_text("1,000")
    expect(shown(page, "Rejected")).to_have_text("3")
    expect(shown(page, "A batch takes")).to_contain_text(" s")
    expect(page.get_by_text("unit: ")).to_be_visible()  # of the field's chart, which has a line per device
    expect(page.locator("canvas, svg.marks").first).to_be_attached()
    newest, reasons, rejected, overview = range(4)
    expect_in_table(page, newest, HOSTILE[:30])
    expect_in_table(page, reasons, "out_of_range", "invalid_encoding", "malformed_json")
    expect_in_table(page, rejected, "<script>", "\ufffd")
    expect_in_table(page, overview, "größe 'q\" é/readings_quarantine", "1000", "WRITE")
    assert page.title() == "Sensor pipeline" and len(hosts) == 1
    port = int(page.url.rstrip("/").rpartition(":")[2])
    hosts = ("localhost", "127.0.0.1", "rebound.example", "localhost.example")
    assert [handshake(port, host) for host in hosts] == [101, 101, 403, 403]
    neighbour = net_util.get_internal_ip() or "192.0.2.1"  # another server on this machine, reached over the network
    assert handshake(port, "127.0.0.1", f"http://{neighbour}:8000") == 403


def test_a_contract_with_other_fields_is_shown_too(spark, tmp_path, visit):
    contract = load_contract(f"{REPOSITORY}/examples/zigbee2mqtt.py")
    writer = bronze_writer(spark, tmp_path / "home", contract)
    records = (REPOSITORY / "examples" / "zigbee2mqtt" / "sample.jsonl").read_bytes().splitlines()
    write(spark, writer, 0, *records)
    page, _ = visit(tmp_path)
    expect(page.get_by_text("Newest records")).to_be_visible()
    expect_in_table(page, 0, json.loads(records[0])["device"]["friendlyName"])


def test_records_without_a_time_count_by_their_arrival_and_long_texts_are_cut(spark, tmp_path):
    contract = load_contract(f"{REPOSITORY}/examples/zigbee2mqtt.py")
    records = [{"device": {"friendlyName": name * 1000}, "temperature": number} for number, name in enumerate("aab")]
    write(
        spark,
        bronze_writer(spark, tmp_path / "home", contract),
        0,
        *(json.dumps(record).encode() for record in records),
    )
    lake = Lake(Choice(str(tmp_path / "home"), 900, "temperature", "device", None, "last_seen"))
    points = lake.course("temperature", "device").points
    assert sorted(points["value"]) == [0.5, 2]
    assert sorted(lake.newest_of_each()["device"]) == ["a" * 300, "b" * 300]


def test_no_lake_and_an_empty_one_are_waited_for_until_a_table_comes(spark, tmp_path, visit):
    page, _ = visit(tmp_path / "lake")
    expect(page.get_by_text("No table yet.")).to_be_visible()
    write(spark, bronze_writer(spark, tmp_path / "lake" / "readings"), 0, b"{")  # so that the table has no rows
    expect(shown(page, "Accepted")).to_have_text("0")
    expect(shown(page, "Rejected")).to_have_text("1")


@pytest.mark.parametrize("damage", ["the log", "a data file"])
def test_a_broken_table_is_named_and_the_others_are_shown(spark, tmp_path, visit, damage):
    for name in ("a_good", "b_broken"):
        write(spark, bronze_writer(spark, tmp_path / name), 0, reading())
    if damage == "the log":
        for part in (tmp_path / "b_broken" / "_delta_log").glob("*.json"):
            part.write_text("{")
    else:
        for part in (tmp_path / "b_broken").glob("*.parquet"):
            part.unlink()
    page, _ = visit(tmp_path)
    expect(page.get_by_text("This table can't be read at the moment.")).to_be_visible()
    expect_in_table(page, 0, "a_good")
    page.get_by_role("combobox").first.click()
    page.get_by_role("option", name="a_good", exact=True).click()
    expect(shown(page, "Accepted")).to_have_text("1")


def lake_of(folder, device_of_row, moment_of_row, arrived_before: list[int], series="device_id", **others) -> Lake:
    """A lake whose rows arrived the given numbers of seconds ago, each with its own device and time."""
    now = pd.Timestamp.now(tz="UTC")
    arrived = [now - pd.Timedelta(seconds=seconds) for seconds in arrived_before]
    rows = pd.DataFrame(
        {
            "event_time": [moment_of_row(number, moment) for number, moment in enumerate(arrived)],
            "device_id": [device_of_row(number) for number in range(len(arrived))],
            "value": 20.0,
            "ingest_time": arrived,
        }
        | others
    )
    write_deltalake(str(folder), rows)
    return Lake(Choice(str(folder), 900, "value", series, None, "event_time"))


@pytest.mark.parametrize("wrong", [pd.Timedelta(days=20_000), pd.Timedelta(hours=8)], ids=["1970", "hours behind"])
@pytest.mark.parametrize("records", [1, 75])
def test_a_device_with_a_wrong_clock_is_named_and_leaves_the_others_their_points(tmp_path, wrong, records):
    lake = lake_of(
        tmp_path / "readings",
        lambda number: f"d{number % 12}",
        lambda number, moment: moment - wrong if number % 12 == 7 and number < 12 * records else moment,
        [number // 12 * 10 for number in range(75 * 12)],
    )
    course = lake.course("value", "device_id")
    assert course.points.groupby("series").size().drop("d7", errors="ignore").to_dict() == dict.fromkeys(
        (f"d{number}" for number in range(12) if number != 7), 75
    )
    assert (course.series, course.records_astray, course.series_astray) == (11 + (records < 75), records, ["d7"])


def test_devices_that_have_fallen_silent_come_first_and_numbers_can_name_devices(tmp_path):
    ago = [10, 800, 1000, 9000, 10_000, 20]
    lake = lake_of(tmp_path / "readings", lambda number: number, lambda _, moment: moment, ago)
    assert list(lake.silent()["device_id"]) == [3, 2]  # the fourth device is as good as forgotten
    assert list(lake.newest_of_each()["device_id"]) == [1, 5, 0]
    assert set(lake.course("value", "device_id").points["series"]) == {"0", "1", "5"}


def test_a_path_that_the_page_cannot_read_is_said(tmp_path):
    write_deltalake(str(tmp_path / "plain"), pd.DataFrame({"value": [1]}))
    (tmp_path / "plain").rename(tmp_path / "a%20b")
    [row] = overview(tables_in(str(tmp_path))).to_dict("records")
    assert row["table"] == "a%20b" and "because its path has a % before two digits" in row["last commit"]


def test_a_batch_is_what_a_stream_has_written(spark, tmp_path):
    writer = bronze_writer(spark, tmp_path / "readings")
    write(spark, writer, 0, reading())
    write(spark, writer, 1, reading())
    spark.sql(f"INSERT INTO delta.`{tmp_path}/readings` SELECT * FROM delta.`{tmp_path}/readings`")
    durations, is_cut = Lake(
        Choice(str(tmp_path / "readings"), 900, "value", "device_id", None, "event_time")
    ).batches()
    assert len(durations) == 2 and not is_cut


def test_a_query_reaches_no_file_whatever_a_column_is_called(spark, tmp_path):
    name = "a\"FROM'x'--"
    spark.range(3).select(F.col("id").alias(name), F.current_timestamp().alias("ingest_time")).write.format(
        "delta"
    ).save(str(tmp_path / "other"))
    lake = Lake(Choice(str(tmp_path / "other"), None, name, name, None, "ingest_time"))
    assert sorted(lake.newest_of_each()[name]) == [0, 1, 2]
    with pytest.raises(duckdb.PermissionException):
        lake.ask(f"FROM read_text('{REPOSITORY}/README.md')")


def test_a_page_that_takes_long_to_draw_is_drawn_less_often():
    assert [refresh_every(300, 0.1), refresh_every(300, 9), refresh_every(None, 9), refresh_every(None, 20)] == [
        2,
        45,
        60,
        100,
    ]


def test_a_port_in_use_is_said_with_the_way_out():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        run = run_script("dashboard.py", "--port", port)
    assert (run.returncode, run.stderr) == (1, f"error: Port {port} is in use. Choose another: --port {port + 1}.\n")
