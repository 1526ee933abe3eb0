"""The kind of field that is a time: the forms in which JSON holds times, and the SQL that reads them."""

import re
from dataclasses import dataclass
from typing import ClassVar

from pipeline.contract.fields import ContractError, Integer, Number, Text, Unquoted

# RFC 3339 without the lower-case "t" and "z". The short offsets +01 and +0100 of ISO 8601 are accepted, too.
OFFSET = r"(?:Z|[+-]\d\d(?::?\d\d)?)"
RFC3339 = rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?{OFFSET}"
# ISO 8601's calendar date and time, in its extended form (also with a blank instead of the "T") or its basic form.
DATE_TIME = r"(?:\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?|\d{8}T\d{4}(?:\d\d(?:[.,]\d+)?)?)"
# The years 0 to 9999 in UTC, in seconds since 1970.
FIRST_SECOND, END_SECOND = -62_167_219_200, 253_402_300_800


@dataclass(frozen=True)
class Timestamp(Unquoted):
    """A time in the years 0 to 9999 in UTC, stored to the microsecond.

    `format`: "rfc3339" (a string: date, "T", time with seconds and an optional fraction, "Z" or an offset), "iso8601" (a
    string: also with a blank instead of the "T", without seconds, with a comma before the fraction, in the basic form
    20261120T080000), "epoch_s" (seconds since 1970), or "epoch_ms", "epoch_us" or "epoch_ns" (whole milli-, micro- or
    nanoseconds since 1970). `zone`: the time zone of times in "iso8601" that have no offset, such as "Europe/Berlin"; they
    are invalid without it. Times in the hour that a zone repeats in autumn are read as the earlier one; times in the hour
    that it skips in spring are invalid. `at_most_ahead`: how far it may be ahead of the record's arrival, such as "1 day";
    unlimited by default.
    """

    format: str = "rfc3339"
    at_most_ahead: str = ""
    zone: str = ""

    type = "TIMESTAMP"
    FORMATS: ClassVar = {  # (json_types, unquoted or plain)
        "rfc3339": (Text.json_types, f'"({RFC3339})"'),
        "iso8601": (Text.json_types, f'"({DATE_TIME}{OFFSET}?)"'),
        "epoch_s": (Number.json_types, r"(-?(?:0|[1-9]\d{0,11}+)(?:\.\d{1,12}+)?+)"),
        "epoch_ms": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,14}+))"),
        "epoch_us": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,17}+))"),
        "epoch_ns": (Integer.json_types, r"(-?(?:0|[1-9]\d{0,18}+))"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in self.FORMATS:
            raise ContractError(
                f"the field {self.name} has format={self.format!r}, which must be one of {', '.join(self.FORMATS)}"
            )
        if self.at_most_ahead and not re.fullmatch(r"\d{1,6} (second|minute|hour|day|week)s?", self.at_most_ahead):
            raise ContractError(
                f"the field {self.name} has at_most_ahead={self.at_most_ahead!r}, which must be a duration such as "
                f'"10 minutes" or "1 day"'
            )
        if self.quoted and self._is_string:
            raise ContractError(f"the field {self.name} can't be quoted: {self.format} is a string already")
        if self.zone and (self.format != "iso8601" or not re.fullmatch(r"\w+(/[\w+-]+)*", self.zone)):
            raise ContractError(
                f'the field {self.name} has zone={self.zone!r}, which must be a time zone such as "Europe/Berlin", together with '
                f'format="iso8601"'
            )

    @property
    def expected(self) -> str:
        form = {
            "rfc3339": "a time such as 2026-11-20T08:00:00Z",
            "iso8601": "an ISO 8601 date and time" + (f" in {self.zone}" if self.zone else " with an offset"),
            "epoch_s": "a time in seconds",
        }.get(self.format, f"a whole number of {self.format.removeprefix('epoch_')} since 1970")
        return form + (f", at most {self.at_most_ahead} ahead" if self.at_most_ahead else "")

    @property
    def _is_string(self) -> bool:
        return self.json_types == Text.json_types

    @property
    def json_types(self) -> tuple[str, ...]:
        return self.FORMATS[self.format][0]

    @property
    def unquoted(self) -> str:
        return self.FORMATS[self.format][1]

    def value(self, text: str) -> str:
        if self.format == "rfc3339":
            return rf"try_cast(CASE WHEN {text} RLIKE r'\A{RFC3339}\z' THEN {text} END AS TIMESTAMP)"
        if self.format == "iso8601":
            return self._iso8601(text)
        whole = f"try_cast({text} AS BIGINT)"
        number, per_second, time = {
            "epoch_s": (
                f"try_cast({text} AS DECIMAL(24, 12))",
                1,
                "timestamp_micros(CAST(floor({} * 1000000) AS BIGINT))",
            ),
            "epoch_ms": (whole, 1000, "timestamp_millis({})"),
            "epoch_us": (whole, 1_000_000, "timestamp_micros({})"),
            # 64 bits hold the years 1677 to 2262. Division rounds towards zero.
            "epoch_ns": (f"({whole} div 1000 - CAST({whole} % 1000 < 0 AS INT))", 1_000_000, "timestamp_micros({})"),
        }[self.format]
        return (
            f"CASE WHEN {number} >= {FIRST_SECOND * per_second} AND {number} < {END_SECOND * per_second} "
            f"THEN {time.format(number)} END"
        )

    def _iso8601(self, text: str) -> str:
        # Spark reads the extended form with seconds.
        extended = rf"regexp_replace(translate({text}, ', ', '.T'), r'^(\d{{4}})-?(\d\d)-?(\d\d)T(\d\d):?(\d\d):?', '$1-$2-$3T$4:$5:')"
        complete = rf"regexp_replace({extended}, r':(?!\d)', ':00')"
        form = DATE_TIME + OFFSET + ("?" if self.zone else "")
        time = rf"try_cast(CASE WHEN {text} RLIKE r'\A{form}\z' THEN {complete} END AS TIMESTAMP)"
        if not self.zone:
            return time
        in_zone = f"to_utc_timestamp({time}, '{self.zone}')"
        return (
            rf"CASE WHEN {text} RLIKE r'{OFFSET}\z' THEN {time} "
            f"WHEN from_utc_timestamp({in_zone}, '{self.zone}') = {time} THEN {in_zone} END"  # the zone has this time
        )

    def is_invalid(self, value: str) -> str:
        # With an offset, a time written with the year 0 or 9999 can fall into another year.
        first, end = (f"timestamp_seconds({second})" for second in (FIRST_SECOND, END_SECOND))
        other_year = f" OR {value} < {first} OR {value} >= {end}" if self._is_string else ""
        latest = f"coalesce(arrival_time, ingest_time) + INTERVAL {self.at_most_ahead}"
        return super().is_invalid(value) + other_year + (f" OR {value} > {latest}" if self.at_most_ahead else "")
