"""Simulated sensors: readings that follow a contract, and readings that break it."""

import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import reduce
from operator import getitem
from typing import Any

from pipeline.contract.contract import Contract, load_readings
from pipeline.contract.fields import Boolean, Elements, Field, Integer, Number, Text
from pipeline.contract.times import Timestamp

BUILDINGS = ("A", "B", "C")
FLOORS = range(6)
READINGS = 3  # in a message, if the contract has an array
# How to break the rules of readings.py, given its sensor types. The simulator can't break other rules.
WRONG_VALUES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no_clock": lambda types: {"timestamp": "1970-01-01T00:30:00Z"},
    "unknown_type": lambda types: {"type": f"not {' or '.join(types)}"},
    "wrong_unit": lambda types: {"unit": f"not {' or '.join(each.unit for each in types.values())}"},
    "out_of_range": lambda types: {"value": max(each.high for each in types.values()) + 1},
}


class Simulator:
    """Generates readings according to `contract`.

    `sensor_types`: the SENSOR_TYPES of the contract's file; empty if it defines none. `breaks`: for each of the contract's reasons, a way
    to break a reading; rules unknown to the simulator have none. `device`: the field that names the device, if any.
    """

    def __init__(self, contract: Contract, sensor_types: dict[str, Any]):
        self.contract, self.sensor_types = contract, sensor_types
        texts = [field for field in contract.json_fields if isinstance(field, Text)]
        array = Elements(contract.array) if contract.array else None
        self.device = next((field for field in texts if field.name == "device_id"), texts[0] if texts else None)
        self.breaks: dict[str, Callable[[dict[str, Any]], bytes | None]] = {
            "empty_record": lambda reading: None,
            "invalid_encoding": lambda reading: to_json(reading)[:-1] + b', "note": "\xff"}',
            "malformed_json": lambda reading: to_json(reading)[:-1],
            **{
                f"missing_{field.name}": changing(field, lambda _: None)
                for field in contract.json_fields
                if field.required
            },
            **{f"invalid_{field.name}": changing(field, lambda value: [value]) for field in contract.json_fields},
            **({f"missing_{array.name}": changing(array, lambda _: [])} if array else {}),
            **({f"invalid_{array.name}": changing(array, lambda elements: [*elements, 7])} if array else {}),
            **{
                reason: having(wrong)
                for reason, wrong_value in WRONG_VALUES.items()
                if reason in contract.rules
                and sensor_types
                and (wrong := wrong_value(sensor_types)).keys() <= {field.name for field in contract.json_fields}
            },
        }

    @classmethod
    def of(cls, readings: str) -> "Simulator":
        """The simulator for the contract in the file `readings`. Raises PipelineError if there is none."""
        names = load_readings(readings)
        return cls(names["CONTRACT"], names.get("SENSOR_TYPES", {}))

    def messages(
        self, devices: int, invalid_fraction: float = 0, seed: int | None = None
    ) -> Iterator[tuple[str, bytes | None]]:
        """Yields messages (device id, record) of `devices` devices in turn, with the current time. A record has the contract's fields
        in their order; fields unknown to the simulator get an arbitrary value of their kind.
        """
        rng = random.Random(seed)
        fleet = [self._device(number, rng) for number in range(1, devices + 1)]
        breaks = itertools.cycle(self.breaks.values())
        for device in itertools.cycle(fleet):
            if sensor := self.sensor_types.get(device.get("type", "")):
                step = (sensor.typical[1] - sensor.typical[0]) / 50
                # A random walk that is pulled back to the value at which the device started, so that it never leaves
                # the sanity range.
                device["exact"] += rng.gauss(0, step) + (device["usual"] - device["exact"]) / 20
                device["value"] = round(device["exact"], 2)
            reading: dict[str, Any] = {}
            for field in self.contract.json_fields:
                value = device["device_id"] if field is self.device else device.get(field.name)
                for object_with_it in objects_with(field, reading):
                    put(object_with_it, field, value if is_of(field, value) else any_value(field, rng))
            is_broken = rng.random() < invalid_fraction
            yield device["device_id"], next(breaks)(reading) if is_broken else to_json(reading)

    def _device(self, number: int, rng: random.Random) -> dict[str, Any]:
        """The constant values of a device, and the value it starts from."""
        device: dict[str, Any] = {"device_id": f"sensor-{number:03}"}
        if self.sensor_types:
            sensor_type, sensor = list(self.sensor_types.items())[number % len(self.sensor_types)]
            usual = rng.uniform(*sensor.typical)
            device |= {"type": sensor_type, "unit": sensor.unit, "usual": usual, "exact": usual}
        return device | {"building": rng.choice(BUILDINGS), "floor": rng.choice(FLOORS)}


def is_of(field: Field, value: Any) -> bool:
    """Whether the field can have this value, found under its name."""
    kinds = ((Text, str), (Integer, int), (Number, (int, float)))
    return any(isinstance(field, kind) and isinstance(value, types) for kind, types in kinds)


def any_value(field: Field, rng: random.Random) -> Any:
    if isinstance(field, Timestamp):
        now = time.time_ns()
        text = datetime.fromtimestamp(now / 1e9, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "rfc3339": text,
            "iso8601": text,
            "epoch_s": now // 1_000_000 / 1000,
            "epoch_ms": now // 1_000_000,
            "epoch_us": now // 1000,
            "epoch_ns": now,
        }[field.format]
    if isinstance(field, Boolean):
        return rng.choice(rng.choice((field.true or (True,), field.false or (False,))))
    if isinstance(field, (Integer, Number)):
        return rng.randrange(100)
    return f"{field.column}-{rng.randrange(10)}"


def objects_with(field: Field, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of the record that have the field: itself, or the elements of its array, which are created if it lacks them."""
    if not field.array:
        return [record]
    *way, last = Elements(field.array).path
    for name in way:
        record = record.setdefault(name, {})
    return record.setdefault(last, [{} for _ in range(READINGS)])


def put(json_object: dict[str, Any], field: Field, value: Any) -> None:
    for name in field.path[:-1]:
        json_object = json_object.setdefault(name, {})
    json_object[field.path[-1]] = value


def to_json(reading: dict[str, Any]) -> bytes:
    return json.dumps(reading.get("[]", reading), ensure_ascii=False).encode()


def changing(field: Field, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], bytes]:
    """A way to break a reading: applies `change` to the field's value."""

    def break_reading(reading: dict[str, Any]) -> bytes:
        broken = copy.deepcopy(reading)
        first = objects_with(field, broken)[0]
        put(first, field, change(reduce(getitem, field.path, first)))
        return to_json(broken)

    return break_reading


def having(wrong: dict[str, Any]) -> Callable[[dict[str, Any]], bytes]:
    """A way to break a reading: sets the values `wrong`."""
    return lambda reading: to_json(reading | wrong)
