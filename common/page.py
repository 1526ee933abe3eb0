"""What dashboard.py shows: Streamlit draws it, DuckDB asks the Delta tables. Times are UTC; a span is one of arrival."""

import argparse
import os
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import altair as alt
import duckdb
import pandas as pd
import streamlit as st
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from kafka.errors import KafkaError

from common.console import PipelineError, first_line
from common.tables import RESERVED_COLUMNS, quarantine_of
from common.topics import Topic

SPANS = {"5 minutes": 300, "15 minutes": 900, "1 hour": 3600, "1 day": 86_400, "1 week": 604_800, "everything": None}
NUMBERS = ("double", "float", "long", "integer", "short", "byte")  # of Delta; what is measured comes before what is counted
IN_A_ROW = 3  # charts
POINTS = 200  # of a chart, from left to right
QUICKEST, SLOWEST = 2, 60  # seconds from one refresh to the next; between them, a 200th of the span
MOST_CHARTS, MOST_SERIES, MOST_DEVICES, MOST_REJECTED, MOST_BATCHES = 12, 20, 500, 20, 200
MOST_COPIED = 1_000_000  # records that are kept in memory while the page is drawn
CUT_AT = 300  # bytes of a rejected record
NOTHING_REJECTED = pd.DataFrame({"reject_reason": [""], "raw": [b""], "ingest_time": [pd.Timestamp(0, tz="UTC")]}).iloc[:0]


@dataclass(frozen=True)
class Choice:
    """What somebody looks at: `field` by `series` and, in a chart for each of them, `charts`, of the last `span` seconds."""
    table: str
    span: int | None
    field: str | None
    series: str | None
    charts: str | None
    time: str  # when a record was made, if the contract has such a field, else when it arrived


def show_page(options: argparse.Namespace) -> None:
    """One visit. `options`: `lake`, and the broker's `bootstrap_servers` and `kafka_config`."""
    st.set_page_config("Sensor pipeline", layout="wide")
    st.title("Sensor pipeline")
    tables = find_tables(options.lake)
    readings = {name: path for name, path in tables.items() if not name.endswith(quarantine_of(""))}
    if not readings:
        st.info("No table yet. Tables appear with the first records that a stream writes. This page waits for them.")
        time.sleep(QUICKEST)
        st.rerun()
    choice = choose(readings)
    seconds = SLOWEST if choice.span is None else min(max(QUICKEST, choice.span // POINTS), SLOWEST)

    @st.fragment(run_every=seconds)
    def live() -> None:
        if find_tables(options.lake) != tables:
            st.rerun()
        begun = time.monotonic()
        try:
            show_readings(Lake(choice), choice, options)
        except Exception as error:  # whatever is broken: the rest of the page is not
            st.error("This table can't be read at the moment. The reader says:")
            st.text(first_line(str(error)) or type(error).__name__)
        st.subheader("Tables")
        st.dataframe(overview(tables), hide_index=True)
        st.caption(f"As of {datetime.now(timezone.utc):%H:%M:%S} UTC, drawn in {time.monotonic() - begun:.1f} s, "
                   f"refreshed every {seconds} s.")

    live()


def find_tables(lake: str) -> dict[str, str]:
    """The paths of the Delta tables under the folder `lake` by their names there, in order."""
    found = {}
    for folder, subfolders, _ in os.walk(lake, followlinks=True):  # a table may lie on another disk
        if "_delta_log" in subfolders:
            found[os.path.relpath(folder, lake)] = folder
            subfolders.clear()
        subfolders.sort()
    return found


def choose(readings: dict[str, str]) -> Choice:
    """Asks, beside the page, what to show."""
    with st.sidebar:
        table = readings[st.selectbox("Table", readings, index=len(readings) - 1, key="table")]
        span = SPANS[st.selectbox("Time span, by arrival", SPANS, index=1)]
        try:
            kinds = {field.name: getattr(field.type, "type", "") for field in DeltaTable(table).schema().fields}
        except (DeltaError, OSError):
            kinds = {}
        kinds = {name: kind for name, kind in kinds.items() if name.lower() not in RESERVED_COLUMNS}
        texts = [name for name, kind in kinds.items() if kind in ("string", "boolean")]
        field = st.selectbox("Field", [name for number in NUMBERS for name, kind in kinds.items() if kind == number])
        series = st.selectbox("A line for each", texts)
        # Values of several units have no axis in common.
        charts = st.selectbox("A chart for each", [None, *texts], index=texts.index("unit") + 1 if "unit" in texts else 0,
                              format_func=lambda name: name or "–")
    times = [name for name, kind in kinds.items() if kind == "timestamp"]
    return Choice(table, span, field, series, charts, (times or ["ingest_time"])[0])


class Lake:
    """SQL over the rows of a table and its quarantine, `accepted` and `rejected`, that arrived in the span."""

    def __init__(self, choice: Choice):
        self.log = DeltaTable(choice.table)
        rows = self.log.to_pyarrow_dataset()
        self.columns = [name for name in rows.schema.names if name.lower() not in RESERVED_COLUMNS]
        self.is_from_kafka = "offset" in rows.schema.names
        try:
            rejected: Any = DeltaTable(quarantine_of(choice.table)).to_pyarrow_dataset()
        except TableNotFoundError:
            rejected = NOTHING_REJECTED
        self.duckdb = duckdb.connect()
        self.duckdb.execute("SET TimeZone = 'UTC'")
        self.duckdb.register("all_accepted", rows)
        self.duckdb.register("all_rejected", rejected)
        # By the statistics in the table's log, files outside the span are not opened.
        begin = choice.span and datetime.now(timezone.utc) - timedelta(seconds=choice.span)
        of_span = f"ingest_time >= TIMESTAMPTZ '{begin}'" if begin else "true"
        [[records]] = self.duckdb.execute(f"SELECT count(*) FROM all_accepted WHERE {of_span}").fetchall()
        # Several queries follow, each of which would open each file again.
        kind = "TABLE" if records <= MOST_COPIED else "VIEW"
        columns = ", ".join(map(quoted, [*self.columns, "ingest_time"]))
        self.duckdb.execute(f"CREATE {kind} accepted AS SELECT {columns} FROM all_accepted WHERE {of_span}")
        self.duckdb.execute(f"CREATE VIEW rejected AS FROM all_rejected WHERE {of_span}")

    def ask(self, sql: str, **values: Any) -> pd.DataFrame:
        return self.duckdb.execute(sql, values).df()


def show_readings(lake: Lake, choice: Choice, options: argparse.Namespace) -> None:
    counts = lake.ask("SELECT reject_reason, count(*) AS records FROM rejected GROUP BY ALL ORDER BY records DESC")
    newest = lake.ask("SELECT count(*) AS records, max(ingest_time) AS arrived FROM accepted").iloc[0]
    batches = batches_of(lake)
    rejected = int(counts["records"].sum())
    cells = st.columns(5)
    cells[0].metric("Accepted", f"{newest['records']:,}")
    cells[1].metric("Rejected", f"{rejected:,}")
    cells[2].metric("Newest arrived", age(newest["arrived"]))
    cells[3].metric("A batch takes", "–" if batches.empty else f"{batches['seconds'].median():.1f} s")
    cells[4].metric("Waiting in Kafka", waiting(choice.table, options) if lake.is_from_kafka else "–")
    if not newest["records"] and not rejected:
        st.info("Nothing arrived in this span. Choose a longer one, or start the stream and its source.")
        return
    show_fields(lake, choice)
    left, right = st.columns(2)
    with left:
        st.subheader("Records that arrived")
        st.altair_chart(chart(arrivals(lake), "records", "verdict").mark_bar())
    with right:
        st.subheader("Seconds that a batch took")
        st.altair_chart(chart(batches, "seconds").mark_line(point=True))
    if rejected:
        st.subheader("Rejected, and why")
        left, right = st.columns([1, 2])
        left.dataframe(counts, hide_index=True)
        right.dataframe(newest_rejected(lake), hide_index=True)


def show_fields(lake: Lake, choice: Choice) -> None:
    """The chosen field over time, and the newest record of each device."""
    if choice.field and choice.series:
        points, left_out = course(lake, choice, choice.field, choice.series)
        st.subheader(f"{choice.field} over time")
        charts = list(points.groupby("chart", dropna=False))[:MOST_CHARTS]
        cells = [cell for _ in range(0, len(charts), IN_A_ROW) for cell in st.columns(min(IN_A_ROW, len(charts)))]
        for cell, (name, part) in zip(cells, charts):
            cell.text(f"{choice.charts}: {name}" if choice.charts else choice.field)
            cell.altair_chart(chart(part, "value", "series").mark_line())
        if left_out:
            st.caption(f"The first {MOST_SERIES} of {left_out + MOST_SERIES:,} by name.")
    if choice.series:
        st.subheader("Newest records")
        st.dataframe(newest_of_each(lake, choice), hide_index=True)


def course(lake: Lake, choice: Choice, field: str, series: str) -> tuple[pd.DataFrame, int]:
    """The averages of the field (time, series, chart, value) in a 200th of the time each, and how many series are left out."""
    field, series, moment = (quoted(name) for name in (field, series, choice.time))
    chart = quoted(choice.charts) if choice.charts else "NULL"
    there = f"FROM accepted WHERE {field} IS NOT NULL AND {series} IS NOT NULL"
    names = [name for [name] in lake.duckdb.execute(f"SELECT DISTINCT {series}::VARCHAR AS name {there} ORDER BY name").fetchall()]
    if not names:
        return pd.DataFrame(columns=["time", "series", "chart", "value"]), 0
    # A device whose clock is wrong by years must not press all others into one point.
    [[first, last, usual]] = lake.duckdb.execute(
        f"SELECT epoch_us(min({moment})), epoch_us(max({moment})), approx_quantile(epoch_us({moment}), [0.01, 0.99]) {there}").fetchall()
    spread = usual[1] - usual[0] + 60_000_000
    first, last = max(first, usual[0] - spread), min(last, usual[1] + spread)
    points = lake.ask(f"SELECT time_bucket(to_microseconds($width), {moment} AT TIME ZONE 'UTC') AS time, {series}::VARCHAR AS series, "
                      f"{chart}::VARCHAR AS chart, avg({field}) AS value {there} AND list_contains($names, {series}::VARCHAR) "
                      f"AND epoch_us({moment}) BETWEEN $first AND $last GROUP BY ALL ORDER BY time",
                      width=max(1_000_000, (last - first) // POINTS), names=names[:MOST_SERIES], first=first, last=last)
    return points, max(0, len(names) - MOST_SERIES)


def newest_of_each(lake: Lake, choice: Choice) -> pd.DataFrame:
    """The newest record of each series, or of each that a chart has, the newest first."""
    record = ", ".join(f"{quoted(name)} := {quoted(name)}" for name in lake.columns)
    keys = ", ".join(quoted(name) for name in filter(None, (choice.series, choice.charts)))
    return plain(lake.ask(f"SELECT unnest(newest) FROM (SELECT arg_max(struct_pack({record}), {quoted(choice.time)}) AS newest, "
                          f"max({quoted(choice.time)}) AS newest_time FROM accepted GROUP BY {keys} ORDER BY newest_time DESC "
                          f"LIMIT {MOST_DEVICES})"))


def arrivals(lake: Lake) -> pd.DataFrame:
    """How many records were accepted and rejected (time, verdict, records), in a 200th of the time each."""
    batches = lake.ask("SELECT ingest_time AT TIME ZONE 'UTC' AS time, verdict, count(*) AS records FROM ("
                       "SELECT ingest_time, 'accepted' AS verdict FROM accepted UNION ALL "
                       "SELECT ingest_time, 'rejected' AS verdict FROM rejected) GROUP BY ALL")
    width = max((batches["time"].max() - batches["time"].min()) / POINTS, pd.Timedelta(seconds=QUICKEST))
    return batches.groupby([batches["time"].dt.floor(width.ceil("s")), "verdict"])["records"].sum().reset_index()


def batches_of(lake: Lake) -> pd.DataFrame:
    """How long each of the last batches took (time, seconds), from its start to the commit that made it visible."""
    commits = [commit for commit in lake.log.history(MOST_BATCHES) if commit.get("operation") == "WRITE"
               and int((commit.get("operationMetrics") or {}).get("numOutputRows", 0))]
    lake.duckdb.register("commits", pd.DataFrame({"committed": [commit["timestamp"] for commit in commits]}, dtype="int64"))
    return lake.ask("SELECT started AT TIME ZONE 'UTC' AS time, date_diff('ms', started, committed) / 1000 AS seconds FROM "
                    "(SELECT to_timestamp(committed / 1000) AS committed FROM commits) ASOF JOIN "
                    "(SELECT DISTINCT ingest_time AS started FROM accepted) ON committed >= started ORDER BY time")


def newest_rejected(lake: Lake) -> pd.DataFrame:
    """The newest rejected records: when and why, and how they begin."""
    last = lake.ask(f"SELECT min(ingest_time) AS since FROM (SELECT ingest_time FROM rejected ORDER BY 1 DESC LIMIT {MOST_REJECTED})")
    rows = lake.ask(f"SELECT ingest_time, reject_reason, raw[1:{CUT_AT}] AS record FROM rejected WHERE ingest_time >= $last "
                    f"ORDER BY ingest_time DESC LIMIT {MOST_REJECTED}", last=last["since"].iloc[0])
    rows["record"] = [None if pd.isna(raw) else bytes(raw).decode(errors="replace") for raw in rows["record"]]
    return plain(rows)


def overview(tables: dict[str, str]) -> pd.DataFrame:
    """A line for each table: rows, live files, size, newest commit."""
    lines = []
    for name, path in tables.items():
        try:
            table = DeltaTable(path)
            files = table.get_add_actions(flatten=True)
            commit = next(iter(table.history(1)), {})  # where Delta has removed its entry, none
            rows, sizes = files.column("num_records").to_pylist(), files.column("size_bytes").to_pylist()
            lines.append({"table": name, "rows": None if None in rows else sum(rows), "files": len(sizes),
                          "MB": round(sum(sizes) / 1e6, 2), "version": table.version(), "last commit": commit.get("operation"),
                          "at": pd.to_datetime(commit.get("timestamp"), unit="ms")})
        except Exception as error:
            lines.append({"table": name, "last commit": f"can't be read: {first_line(str(error)) or type(error).__name__}"})
    return pd.DataFrame(lines)


@st.cache_data(ttl=timedelta(seconds=5), show_spinner=False)
def waiting(table: str, _options: argparse.Namespace) -> str:
    """How many records of the topic the stream into `table` has not read, by the offsets that it has noted in Kafka."""
    try:
        topic = Topic.of(_options)
        unread = topic.unread(topic.group_of(table))
        return "–" if unread is None else f"{unread:,}"
    except (KafkaError, OSError, PipelineError):
        return "–"


def chart(points: pd.DataFrame, y: str, color: str | None = None) -> alt.Chart:
    """A chart of `y` over `time`, with a colour for each value of the column `color`; how it marks them is still to be said."""
    of_days = len(points) and points["time"].max() - points["time"].min() > timedelta(days=1)
    time_axis = alt.Axis(format="%d %b %H:%M" if of_days else "%H:%M:%S", tickCount=5, labelAngle=0)
    drawn = alt.Chart(points, height=250).encode(
        alt.X("time:T", title=None, axis=time_axis), alt.Y(f"{y}:Q", title=None).scale(zero=color != "series"),
        tooltip=[alt.Tooltip("time:T", format="%Y-%m-%d %H:%M:%S"), *points.columns[1:]])
    return drawn.encode(color=alt.Color(f"{color}:N", title=None, legend=alt.Legend(orient="bottom", columns=2))) if color else drawn


def age(moment: Any) -> str:
    """How long ago that was, such as "12 s"."""
    if moment is None or pd.isna(moment):
        return "–"
    seconds = max(0, (datetime.now(timezone.utc) - moment).total_seconds())
    size, unit = next(((size, unit) for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
    return f"{seconds // size:,.0f} {unit} ago"


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Times without their zone, which is UTC: Streamlit would show it in each cell."""
    return rows.assign(**{name: column.dt.tz_localize(None) for name, column in rows.items()
                          if isinstance(column.dtype, pd.DatetimeTZDtype)})


def quoted(name: str) -> str:
    return f'"{name}"'  # a column's name is an identifier
