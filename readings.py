"""The contract: the fields of a reading and its rules. Edit this file, or pass another to the streams with --readings FILE.

    {"timestamp": "2026-11-20T08:00:00Z", "device_id": "sensor-001", "building": "B", "floor": 1, "type": "humidity", "value": 43.5, "unit": "%"}

Each field is one line: Text, Number, Integer (64 bits unless bits=32), Boolean, or Timestamp (format="rfc3339", "iso8601",
"epoch_s", "epoch_ms", …); docs/readings.md lists their options. `required=False` makes it optional, `column=` names its column,
and a dotted name such as "device.id" leads into nested objects. Records are read fastest if they have their fields in the order
listed here.

A rule consists of a reason and an SQL condition on the columns and `ingest_time` (when the record arrived) that is true for
the records it rejects. The first rule that is true gives the reason.
"""

from typing import NamedTuple

from pipeline.contract import Contract, Integer, Number, Text, Timestamp


class SensorType(NamedTuple):
    unit: str
    low: float  # the sanity range in that unit, both ends inclusive
    high: float
    typical: tuple[float, float]  # where the simulator starts


SENSOR_TYPES = {
    "temperature": SensorType("°C", -40, 120, typical=(18, 26)),
    "humidity": SensorType("%", 0, 100, typical=(30, 60)),
    "co2": SensorType("ppm", 0, 10_000, typical=(400, 1200)),
}


def for_its_type(condition: str) -> str:
    """SQL: `condition`, filled in with the SensorType of the reading's own type."""
    return " OR ".join(
        f"type = '{name}' AND {condition.format(**sensor_type._asdict())}" for name, sensor_type in SENSOR_TYPES.items()
    )


CONTRACT = Contract(
    fields=(
        # Times may be up to a day ahead, because a device's clock may have the wrong time zone.
        Timestamp("timestamp", column="event_time", at_most_ahead="1 day"),
        Text("device_id"),
        Text("building"),
        Integer("floor", required=False, bits=32),
        Text("type"),
        Number("value"),
        Text("unit"),
    ),
    rules={
        # A device that has not set its clock counts from 1970 or 2000.
        "no_clock": "event_time < '2001-01-01'",
        "unknown_type": "type NOT IN ('" + "', '".join(SENSOR_TYPES) + "')",
        "wrong_unit": for_its_type("unit <> '{unit}'"),
        "out_of_range": for_its_type("value NOT BETWEEN {low} AND {high}"),
    },
)
