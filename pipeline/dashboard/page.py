"""The page of dashboard.py, drawn by Streamlit."""

import argparse
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

from pipeline.contract.columns import RESERVED_COLUMNS
from pipeline.dashboard.lake import (
    MAX_SERIES,
    MIN_REFRESH_SECONDS,
    MOST_DEVICES,
    POINTS,
    Choice,
    Lake,
    open_table,
    overview,
)
from pipeline.kafka.topics import GROUP, TOPIC_NAME, Topic
from pipeline.paths import quarantine_of, tables_in
from pipeline.terminal.errors import PipelineError, first_line

import altair as alt
import pandas as pd
import streamlit as st
from deltalake.exceptions import DeltaError
from kafka.errors import KafkaError

SPANS = {"5 minutes": 300, "15 minutes": 900, "1 hour": 3600, "1 day": 86_400, "1 week": 604_800, "everything": None}
# Delta's numeric types; measured values come before counted ones.
NUMBERS = ("double", "float", "long", "integer", "short", "byte")
IDS = ("string", "boolean", *NUMBERS[2:])  # types of columns that may identify a device
IN_A_ROW = 3  # charts
MAX_REFRESH_SECONDS = 60  # seconds between two refreshes; between minimum and maximum, it is a 200th of the span
MAX_CHARTS = 12
DRAWING = threading.BoundedSemaphore(2)  # a website can embed the page many times, although it can't read it


def show_page(options: argparse.Namespace) -> None:
    """Draws the page for one visitor. `options`: `lake`, and the broker's `bootstrap_servers` and `kafka_config`."""
    st.set_page_config("Sensor pipeline", layout="wide")
    st.title("Sensor pipeline")
    tables = tables_in(options.lake)
    readings = {name: path for name, path in tables.items() if not name.endswith(quarantine_of(""))}
    if not readings:
        st.info("No table yet. Tables appear with the first records that a stream writes. This page waits for them.")
        time.sleep(MIN_REFRESH_SECONDS)
        st.rerun()
    choice = choose(readings)
    took = f"seconds that it took to draw {choice}"
    seconds = refresh_every(choice.span, st.session_state.get(took, 0))

    @st.fragment(run_every=seconds)
    def live() -> None:
        if tables_in(options.lake) != tables:
            st.rerun()
        begun = time.monotonic()
        try:
            with DRAWING:
                show_readings(Lake(choice), options)
        except Exception as error:  # whatever is broken here, the rest of the page still works
            st.error("This table can't be read at the moment. The reader says:")
            st.text(first_line(str(error)) or type(error).__name__)
        st.subheader("Tables")
        st.dataframe(overview(tables), hide_index=True)
        st.session_state[took] = time.monotonic() - begun
        st.caption(
            f"As of {datetime.now(timezone.utc):%H:%M:%S} UTC, drawn in {st.session_state[took]:.1f} s, "
            f"refreshed every {seconds} s."
        )
        if not seconds / 2 <= refresh_every(choice.span, st.session_state[took]) <= 2 * seconds:
            st.rerun()

    live()


def refresh_every(span: int | None, took: float) -> int:
    """The seconds between two refreshes, given the period and the drawing time in seconds: the page rests four times as
    long as it works.
    """
    usual = MAX_REFRESH_SECONDS if span is None else min(max(MIN_REFRESH_SECONDS, span // POINTS), MAX_REFRESH_SECONDS)
    return max(usual, round(5 * took))


def choose(readings: dict[str, str]) -> Choice:
    """Lets the user choose, in the sidebar, what to show."""
    with st.sidebar:
        table = readings[st.selectbox("Table", readings, index=len(readings) - 1, key="table")]
        span = SPANS[st.selectbox("Time span, by arrival", SPANS, index=1)]
        try:
            kinds = {
                field.name: getattr(field.type, "type", "")
                for field in open_table(table).schema().fields
                if field.name.lower() not in RESERVED_COLUMNS
            }
        except (DeltaError, OSError, PipelineError):
            kinds = {}
        texts = [name for kind_of_id in IDS for name, kind in kinds.items() if kind == kind_of_id]
        field = st.selectbox("Field", [name for number in NUMBERS for name, kind in kinds.items() if kind == number])
        series = st.selectbox("A line for each", texts)
        # Values in different units can't share an axis.
        charts = st.selectbox(
            "A chart for each",
            [None, *texts],
            index=texts.index("unit") + 1 if "unit" in texts else 0,
            format_func=lambda name: name or "–",
        )
    time_of_record = next((name for name, kind in kinds.items() if kind == "timestamp"), "ingest_time")
    return Choice(table, span, field, series, charts, time_of_record)


def show_readings(lake: Lake, options: argparse.Namespace) -> None:
    counts = lake.ask(
        "SELECT reject_reason, sum(readings)::BIGINT AS records FROM rejected GROUP BY ALL ORDER BY records DESC"
    )
    newest = lake.ask("SELECT count(*) AS records, max(ingest_time) AS arrived FROM accepted").iloc[0]
    batches, is_cut = lake.batches()
    rejected = int(counts["records"].sum())
    properties = lake.log.metadata().configuration
    figures = {
        "Accepted": f"{newest['records']:,}",
        "Rejected": f"{rejected:,}",
        "Newest arrived": age(newest["arrived"]),
        "A batch takes": "–" if batches.empty else f"{batches['seconds'].median():.1f} s",
        "Waiting in Kafka": waiting(properties.get(TOPIC_NAME), properties.get(GROUP), options),
    }
    for cell, (label, value) in zip(st.columns(len(figures)), figures.items()):
        cell.metric(label, value)
    if not newest["records"] and not rejected:
        st.info("Nothing arrived in this span. Choose a longer one, or start the stream and its source.")
        return
    show_fields(lake)
    left, right = st.columns(2)
    left.subheader("Records that arrived")
    left.altair_chart(chart(lake.arrivals(), "records", "verdict").mark_bar())
    right.subheader("Seconds per batch")
    right.altair_chart(chart(batches, "seconds").mark_line(point=True))
    if is_cut:
        right.caption(f"The latest {len(batches)} batches.")
    if rejected:
        st.subheader("Rejected, and why")
        left, right = st.columns([1, 2])
        left.dataframe(counts, hide_index=True)
        right.dataframe(lake.newest_rejected(), hide_index=True)


def show_fields(lake: Lake) -> None:
    """The chosen field over time, and the newest record of each device."""
    choice = lake.choice
    if choice.field and choice.series:
        points, series, records_astray, series_astray = lake.course(choice.field, choice.series)
        st.subheader(f"{choice.field} over time")
        all_charts = list(points.fillna({"chart": "–"}).groupby("chart"))
        charts = all_charts[:MAX_CHARTS]
        cells = [cell for _ in range(0, len(charts), IN_A_ROW) for cell in st.columns(min(IN_A_ROW, len(charts)))]
        for cell, (name, part) in zip(cells, charts):
            cell.text(f"{choice.charts}: {name}" if choice.charts else choice.field)
            # With points, because a single one makes no line.
            cell.altair_chart(chart(part, "value", "series").mark_line(point={"size": 20}))
        if len(all_charts) > MAX_CHARTS:
            st.caption(f"{MAX_CHARTS} of {len(all_charts):,} charts.")
        if series > MAX_SERIES:
            st.caption(f"The {MAX_SERIES} of {series:,} with the most records.")
        if records_astray:
            others = f" and {len(series_astray) - 3:,} more" if len(series_astray) > 3 else ""
            st.warning(
                f"{records_astray:,} records have times far from those of the other devices, so they are not in the chart: "
                f"{', '.join(series_astray[:3])}{others}. Perhaps a clock is wrong, or they were sent late."
            )
    if choice.series:
        silent = lake.silent()
        if len(silent):
            st.subheader("Silent")
            st.caption("Nothing has arrived from these in the period, but something did in the ten periods before it.")
            st.dataframe(silent, hide_index=True)
        st.subheader("Newest records")
        newest = lake.newest_of_each()
        if len(newest) == MOST_DEVICES:
            st.caption(f"The {MOST_DEVICES} that have been silent the longest.")
        st.dataframe(newest, hide_index=True)


@st.cache_data(ttl=timedelta(seconds=5), show_spinner=False)
def waiting(topic: str | None, group: str | None, _options: argparse.Namespace) -> str:
    """How many records of the topic a stream with this consumer group has yet to read, according to its offsets in Kafka."""
    try:
        unread = (
            Topic.of(argparse.Namespace(**vars(_options) | {"topic": topic})).unread(group) if topic and group else None
        )
        return "–" if unread is None else f"{unread:,}"
    except (KafkaError, OSError, PipelineError):
        return "–"


def chart(points: pd.DataFrame, y: str, color: str | None = None) -> alt.Chart:
    """A chart of `y` over `time`, with a colour for each value of the column `color`; the caller chooses the mark."""
    of_days = len(points) and points["time"].max() - points["time"].min() > timedelta(days=1)
    time_axis = alt.Axis(format="%d %b %H:%M" if of_days else "%H:%M:%S", tickCount=5, labelAngle=0)
    legend = 16 * points[color].nunique() if color else 0  # its height, with two entries in a row
    drawn = alt.Chart(points, height=250 + legend).encode(
        alt.X("time:T", title=None, axis=time_axis),
        alt.Y(f"{y}:Q", title=None).scale(zero=color != "series"),
        tooltip=[alt.Tooltip("time:T", format="%Y-%m-%d %H:%M:%S"), *points.columns[1:]],
    )
    return (
        drawn.encode(color=alt.Color(f"{color}:N", title=None, legend=alt.Legend(orient="bottom", columns=2)))
        if color
        else drawn
    )


def age(moment: Any) -> str:
    """The time elapsed since then, such as "12 s"."""
    if moment is None or pd.isna(moment):
        return "–"
    seconds = max(0, (datetime.now(timezone.utc) - moment).total_seconds())
    size, unit = next(
        ((size, unit) for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s")
    )
    return f"{seconds // size:,.0f} {unit} ago"
