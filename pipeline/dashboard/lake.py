"""The queries of dashboard.py's page on the Delta tables, with deltalake and DuckDB, without Spark. Times are in UTC; a period
refers to the arrival of records.
"""

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from pipeline.contract.columns import RESERVED_COLUMNS
from pipeline.paths import quarantine_of
from pipeline.terminal.errors import PipelineError, first_line

import duckdb
import pandas as pd
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

POINTS = 200  # points of a chart, from left to right
MIN_REFRESH_SECONDS = 2  # seconds between two refreshes
MAX_SERIES, MOST_DEVICES, MOST_REJECTED, MOST_BATCHES = 20, 500, 20, 200
BEFORE = 10  # periods before the chosen one that are searched for devices that are silent now
MAX_COPIED_RECORDS = 1_000_000  # records kept in memory while the page is drawn
CUT_AT = 300  # characters of a string, bytes of a rejected record
NOTHING_REJECTED = pd.DataFrame({"reject_reason": [""], "raw": [b""], "ingest_time": [pd.Timestamp(0, tz="UTC")]}).iloc[
    :0
]


@dataclass(frozen=True)
class Choice:
    """The user's choice: `field` by `series`, with one chart per value of `charts`, for the last `span` seconds."""

    table: str
    span: int | None
    field: str | None
    series: str | None
    charts: str | None
    time: str  # when a record was created or, if the contract has no such field, when it arrived


def open_table(path: str) -> DeltaTable:
    if re.search("%[0-9A-Fa-f]{2}", path):  # deltalake (1.6) decodes it, and then finds no such table
        raise PipelineError(
            f"The page can't read {path}, because its path has a % before two digits. Rename the folder."
        )
    return DeltaTable(path)


class Course(NamedTuple):
    """A field over time: averages (time, series, chart, value) of the series with the most records, the number of all
    `series`, and the records that are not shown because of their time, with the series that they belong to.
    """

    points: pd.DataFrame
    series: int
    records_astray: int
    series_astray: list[str]


class Lake:
    """SQL over the rows of a table and its quarantine (`accepted` and `rejected`) that arrived in the period."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.log = open_table(choice.table)
        rows = self.log.to_pyarrow_dataset()
        self.columns = [name for name in rows.schema.names if name.lower() not in RESERVED_COLUMNS]
        # When a record was created or, if it does not say or gives a time in the future, when it arrived.
        self.moment = f"least(coalesce({quoted(choice.time)}, ingest_time), ingest_time)"
        try:
            rejected: Any = open_table(quarantine_of(choice.table)).to_pyarrow_dataset()
        except TableNotFoundError:
            rejected = NOTHING_REJECTED
        # Queries see only the registered tables.
        self.duckdb = duckdb.connect(config={"enable_external_access": "false"})
        self.duckdb.execute("SET TimeZone = 'UTC'")
        self.duckdb.register("all_accepted", rows)
        self.duckdb.register("all_rejected", rejected)
        # Thanks to the statistics in the table's log, files outside the span are not opened.
        now = datetime.now(timezone.utc)
        self.begin = choice.span and now - timedelta(seconds=choice.span)
        self.before = choice.span and now - timedelta(seconds=choice.span * (1 + BEFORE))
        of_span = f"ingest_time >= TIMESTAMPTZ '{self.begin}'" if self.begin else "true"
        [[records]] = self.duckdb.execute(f"SELECT count(*) FROM all_accepted WHERE {of_span}").fetchall()
        # Several queries follow, and each of them would open every file again.
        kind = "TABLE" if records <= MAX_COPIED_RECORDS else "VIEW"
        texts = [column.name for column in rows.schema if str(column.type) in ("string", "large_string", "string_view")]
        columns = ", ".join(
            [
                *(
                    f"left({quoted(name)}, {CUT_AT}) AS {quoted(name)}" if name in texts else quoted(name)
                    for name in self.columns
                ),
                "ingest_time",
            ]
        )
        self.duckdb.execute(f"CREATE {kind} accepted AS SELECT {columns} FROM all_accepted WHERE {of_span}")
        # Of a record with an array, a row of the quarantine may stand for several readings.
        names = {name for name, *_ in self.duckdb.execute("DESCRIBE all_rejected").fetchall()}
        readings = "coalesce(len(elements), 1)" if "elements" in names else "1"
        self.duckdb.execute(
            f"CREATE VIEW rejected AS SELECT *, {readings} AS readings FROM all_rejected WHERE {of_span}"
        )

    def ask(self, sql: str, **values: Any) -> pd.DataFrame:
        return self.duckdb.execute(sql, values).df()

    def course(self, field: str, series: str) -> Course:
        """The field's averages per 200th of the time that the series have in common."""
        field, series, moment = quoted(field), quoted(series), self.moment
        chart = quoted(self.choice.charts) if self.choice.charts else "NULL"
        there = f"FROM accepted WHERE {field} IS NOT NULL AND {series} IS NOT NULL"
        # Devices whose clock is wrong by hours or years must not squeeze the others into a few points: each device counts
        # once, however many records it sends.
        [[first, last, begin, until, arrived]] = self.duckdb.execute(
            "SELECT min(first), max(last), median(begin), median(until), min(arrived) FROM ("
            "SELECT epoch_us(min(moment)) AS first, epoch_us(max(moment)) AS last, epoch_us(min(ingest_time)) AS arrived, "
            "approx_quantile(epoch_us(moment), 0.05) AS begin, approx_quantile(epoch_us(moment), 0.95) AS until "
            f"FROM (SELECT {moment} AS moment, {series} AS series, ingest_time {there}) GROUP BY series)"
        ).fetchall()
        if arrived is None:
            return Course(pd.DataFrame(columns=["time", "series", "chart", "value"]), 0, 0, [])
        margin = 60_000_000
        if begin >= arrived - margin:  # the usual case: records arrive within seconds
            first = max(first, arrived - margin)
        else:
            first = max(first, int(begin - (until - begin)) - margin)
            last = min(last, int(until + (until - begin)) + margin)
        shown, astray = (
            self.duckdb.execute(
                f"SELECT {series}::VARCHAR AS name, count(*) AS records {there} AND epoch_us({moment}) {where} $first AND $last "
                "GROUP BY ALL ORDER BY records DESC, name",
                {"first": first, "last": last},
            ).fetchall()
            for where in ("BETWEEN", "NOT BETWEEN")
        )
        points = self.ask(
            f"SELECT time_bucket(to_microseconds($width), {moment} AT TIME ZONE 'UTC') AS time, {series}::VARCHAR AS series, "
            f"{chart}::VARCHAR AS chart, avg({field}) AS value {there} AND list_contains($names, {series}::VARCHAR) "
            f"AND epoch_us({moment}) BETWEEN $first AND $last GROUP BY ALL ORDER BY time",
            width=max(1_000_000, (last - first) // POINTS),
            names=[name for name, _ in shown[:MAX_SERIES]],
            first=first,
            last=last,
        )
        return Course(points, len(shown), sum(records for _, records in astray), [f"{name}" for name, _ in astray])

    def newest_of_each(self) -> pd.DataFrame:
        """The newest record of each series (or of each series in each chart), longest silent first."""
        record = ", ".join(f"{quoted(name)} := {quoted(name)}" for name in self.columns)
        keys = ", ".join(quoted(name) for name in filter(None, (self.choice.series, self.choice.charts)))
        return plain(
            self.ask(
                f"SELECT unnest(newest) FROM (SELECT arg_max(struct_pack({record}), {self.moment}) AS newest, "
                f"max(ingest_time) AS arrived FROM accepted GROUP BY {keys} ORDER BY arrived, newest "
                f"LIMIT {MOST_DEVICES})"
            )
        )

    def silent(self) -> pd.DataFrame:
        """The series that have sent nothing in the period but did in the ten periods before it, with the arrival of their last
        record, longest silent first.
        """
        if not self.begin:
            return pd.DataFrame()
        series = quoted(self.choice.series or "")
        return plain(
            self.ask(
                f"SELECT {series}, max(ingest_time) AS last_arrival FROM all_accepted WHERE {series} IS NOT NULL AND "
                f"ingest_time >= TIMESTAMPTZ '{self.before}' GROUP BY ALL HAVING last_arrival < TIMESTAMPTZ '{self.begin}' "
                "ORDER BY last_arrival"
            )
        )

    def arrivals(self) -> pd.DataFrame:
        """The numbers of accepted and rejected records (time, verdict, records) per 200th of the period."""
        batches = self.ask(
            "SELECT ingest_time AT TIME ZONE 'UTC' AS time, verdict, sum(readings)::BIGINT AS records FROM ("
            "SELECT ingest_time, 'accepted' AS verdict, 1 AS readings FROM accepted UNION ALL "
            "SELECT ingest_time, 'rejected' AS verdict, readings FROM rejected) GROUP BY ALL"
        )
        width = max((batches["time"].max() - batches["time"].min()) / POINTS, pd.Timedelta(seconds=MIN_REFRESH_SECONDS))
        return batches.groupby([batches["time"].dt.floor(width.ceil("s")), "verdict"])["records"].sum().reset_index()

    def batches(self) -> tuple[pd.DataFrame, bool]:
        """The durations of the latest batches of the period (time, seconds), from their start to the commit that made them visible,
        and whether there are more batches in it.
        """
        history = self.log.history(MOST_BATCHES)
        is_cut = len(history) == MOST_BATCHES and (
            not self.begin or history[-1]["timestamp"] > self.begin.timestamp() * 1000
        )
        commits = [
            commit
            for commit in history
            if "contents" in (commit.get("userMetadata") or "")  # other programs' commits may have rows, too
            and int((commit.get("operationMetrics") or {}).get("numOutputRows", 0))
        ]
        self.duckdb.register(
            "commits", pd.DataFrame({"committed": [commit["timestamp"] for commit in commits]}, dtype="int64")
        )
        durations = self.ask(
            "SELECT started AT TIME ZONE 'UTC' AS time, date_diff('ms', started, committed) / 1000 AS seconds FROM "
            "(SELECT to_timestamp(committed / 1000) AS committed FROM commits) ASOF JOIN "
            "(SELECT DISTINCT ingest_time AS started FROM accepted) ON committed >= started ORDER BY time"
        )
        return durations, is_cut

    def newest_rejected(self) -> pd.DataFrame:
        """The newest rejected records: time, reason and first bytes."""
        last = self.ask(
            f"SELECT min(ingest_time) AS since FROM (SELECT ingest_time FROM rejected ORDER BY 1 DESC LIMIT {MOST_REJECTED})"
        )
        rows = self.ask(
            f"SELECT ingest_time, reject_reason, raw[1:{CUT_AT}] AS record FROM rejected WHERE ingest_time >= $last "
            f"ORDER BY ingest_time DESC LIMIT {MOST_REJECTED}",
            last=last["since"].iloc[0],
        )
        rows["record"] = [None if pd.isna(raw) else bytes(raw).decode(errors="replace") for raw in rows["record"]]
        return plain(rows)


def overview(tables: dict[str, str]) -> pd.DataFrame:
    """A row for each table: number of rows, live files, size, newest commit."""
    lines = []
    for name, path in tables.items():
        try:
            table = open_table(path)
            files = table.get_add_actions(flatten=True)
            commit = next(iter(table.history(1)), {})  # empty if Delta has removed its log entry
            rows, sizes = files.column("num_records").to_pylist(), files.column("size_bytes").to_pylist()
            lines.append(
                {
                    "table": name,
                    "rows": None if None in rows else sum(rows),
                    "files": len(sizes),
                    "MB": round(sum(sizes) / 1e6, 2),
                    "version": table.version(),
                    "last commit": commit.get("operation"),
                    "at": pd.to_datetime(commit.get("timestamp"), unit="ms"),
                }
            )
        except Exception as error:
            lines.append(
                {"table": name, "last commit": f"can't be read: {first_line(str(error)) or type(error).__name__}"}
            )
    return pd.DataFrame(lines)


def plain(rows: pd.DataFrame) -> pd.DataFrame:
    """Times without their zone (UTC), which Streamlit would otherwise show in every cell."""
    return rows.assign(
        **{
            name: column.dt.tz_localize(None)
            for name, column in rows.items()
            if isinstance(column.dtype, pd.DatetimeTZDtype)
        }
    )


def quoted(name: str) -> str:
    """A name as an SQL identifier. Columns in other projects' tables may have any name."""
    return '"' + name.replace('"', '""') + '"'
