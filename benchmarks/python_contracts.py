"""Like python_consumer.py, for two other contracts: the Zigbee2MQTT example, and messages of several readings.

    python3 -m benchmarks.python_contracts zigbee2mqtt localhost:9092 zigbee TABLE COUNT
    python3 -m benchmarks.python_contracts gateway localhost:9092 gateway TABLE COUNT

It checks less than the stream does: names that occur twice are not noticed, and blank texts pass.
"""

import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from confluent_kafka import Message

from benchmarks.python_consumer import MICROSECONDS, consume, origin

HOUR = timedelta(hours=1)


class Device(msgspec.Struct, gc=False):
    friendlyName: str
    ieeeAddr: str | None = None
    model: str | None = None


class Zigbee(msgspec.Struct, gc=False):
    device: Device
    last_seen: int | None = None
    temperature: float | None = None
    humidity: float | None = None
    pressure: float | None = None
    illuminance: float | None = None
    occupancy: bool | None = None
    contact: bool | None = None
    battery: float | None = None
    voltage: int | None = None
    linkquality: int | None = None


class Reading(msgspec.Struct, gc=False):
    ts: int
    id: str
    t: float
    rh: float | None = None


class Readings(msgspec.Struct, gc=False):
    gateway: str
    readings: list[Any]


NAMES, DEVICE_NAMES = set(Zigbee.__struct_fields__), set(Device.__struct_fields__)


def zigbee2mqtt(messages: list[Message], now: datetime) -> tuple[pa.Table, pa.Table]:
    readings: list[Zigbee | None] = []
    rests: list[bytes | None] = []
    reasons: list[str | None] = []
    raws = [message.value() for message in messages]
    for raw in raws:
        reading = rest = reason = None
        try:
            record = msgspec.json.decode(raw)
            reading = msgspec.convert(record, Zigbee)
            unknown = {name: value for name, value in record.items() if name not in NAMES}
            if inner := {name: value for name, value in record["device"].items() if name not in DEVICE_NAMES}:
                unknown["device"] = inner
            rest = msgspec.json.encode(unknown) if unknown else None
        except msgspec.ValidationError as error:
            reason = f"invalid_{str(error).rpartition('$.')[2].rstrip('`')}"
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            reason = "malformed_json"
        readings.append(reading)
        rests.append(rest)
        reasons.append(reason)
    kinds = {int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    columns = {
        name: pa.array([reading and getattr(reading.device, name) for reading in readings], pa.string())
        for name in Device.__struct_fields__
    }
    for field in msgspec.structs.fields(Zigbee)[1:]:
        kind = next(kinds[each] for each in field.type.__args__ if each in kinds)
        columns[field.name] = pa.array([reading and getattr(reading, field.name) for reading in readings], kind)
    columns["last_seen"] = pc.multiply(columns["last_seen"], 1000).cast(MICROSECONDS)
    columns |= {"ingest_time": pa.repeat(pa.scalar(now, MICROSECONDS), len(raws))} | origin(messages)
    rules = {
        "invalid_last_seen": pc.greater(columns["last_seen"], pa.scalar(now + HOUR, MICROSECONDS)),
        "percentage_out_of_range": pc.or_(
            pc.or_kleene(pc.less(columns["humidity"], 0), pc.greater(columns["humidity"], 100)),
            pc.or_kleene(pc.less(columns["battery"], 0), pc.greater(columns["battery"], 100)),
        ),
    }
    reason = pc.coalesce(
        pa.array(reasons, pa.string()), *(pc.if_else(broken, name, None) for name, broken in rules.items())
    )
    return split(columns | {"_rescued_data": pa.array(rests, pa.binary()).cast(pa.string())}, reason, raws)


def gateway(messages: list[Message], now: datetime) -> tuple[pa.Table, pa.Table]:
    def rows() -> Iterator[tuple]:
        """(message, element, gateway, reading, reason) of each reading."""
        for number, message in enumerate(messages):
            try:
                batch = decode(message.value())
            except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
                yield number, None, None, None, "malformed_json"
                continue
            for element, each in enumerate(batch.readings):
                try:
                    yield number, element, batch.gateway, msgspec.convert(each, Reading), None
                except msgspec.ValidationError as error:
                    yield number, element, None, None, f"invalid_{str(error).rpartition('$.')[2].rstrip('`')}"

    decode = msgspec.json.Decoder(Readings).decode
    numbers, elements, gateways, readings, reasons = zip(*rows())
    columns = {
        "gateway": pa.array(gateways, pa.string()),
        "event_time": pc.multiply(pa.array([each and each.ts for each in readings], pa.int64()), 1000).cast(
            MICROSECONDS
        ),
        "device_id": pa.array([each and each.id for each in readings], pa.string()),
        "temperature": pa.array([each and each.t for each in readings], pa.float64()),
        "humidity": pa.array([each and each.rh for each in readings], pa.float64()),
        "ingest_time": pa.repeat(pa.scalar(now, MICROSECONDS), len(numbers)),
        "element": pa.array(elements, pa.int32()),
    }
    columns |= {name: column.take(pa.array(numbers)) for name, column in origin(messages).items()}
    outside = pc.or_(pc.less(columns["temperature"], -40), pc.greater(columns["temperature"], 120))
    ahead = pc.greater(columns["event_time"], pa.scalar(now + 24 * HOUR, MICROSECONDS))
    reason = pc.coalesce(
        pa.array(reasons, pa.string()),
        pc.if_else(ahead, "invalid_readings[].ts", None),
        pc.if_else(outside, "out_of_range", None),
    )
    first = [messages[number].value() if element in (0, None) else None for number, element in zip(numbers, elements)]
    return split(columns, reason, first)


def split(columns: dict[str, pa.Array], reason: pa.Array, raws: list[bytes | None]) -> tuple[pa.Table, pa.Table]:
    """The rows of the table, and those of its quarantine."""
    rows = pa.table(columns | {"reject_reason": reason, "raw": pa.array(raws, pa.binary())})
    is_accepted = pc.is_null(reason)
    accepted, rejected = rows.filter(is_accepted), rows.filter(pc.invert(is_accepted))
    text = accepted["raw"].cast(pa.string())
    kept = {"reject_reason", "raw", "ingest_time", "element", *(name for name in columns if name.startswith("kafka_"))}
    rejected = rejected.select(
        [name for name in rejected.column_names if name in {*kept, "topic", "partition", "offset"}]
    )
    return accepted.drop(["raw", "reject_reason"]).append_column("raw_json", text), rejected


if __name__ == "__main__":
    consume({"zigbee2mqtt": zigbee2mqtt, "gateway": gateway}[sys.argv[1]], *sys.argv[2:5], int(sys.argv[5]))
