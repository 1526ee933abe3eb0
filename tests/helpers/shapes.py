"""Records of any size that are hard on a reader that takes quadratic time anywhere, or memory for every part of a record."""

import itertools
import random
from collections.abc import Callable

# A record for readings.py, one for examples/zigbee2mqtt.py, one with the other kinds of fields, and one with an array. In
# PLACES, @ marks where a shape inserts its text: as additional fields, at a deeper level, as a string or as a number.
FLAT = (
    '{"timestamp": "2026-11-20T10:00:00Z", "device_id": "sensor-001", "building": "A", "floor": 2, "type": "temperature", '
    '"value": 21.5, "unit": "°C"}'
)
NESTED = (
    '{"device":{"friendlyName":"a","ieeeAddr":"b","model":"m","type":"t"},"last_seen":1763625600123,"temperature":21.5,'
    '"humidity":45.1,"linkquality":120}'
)
KINDS = '{"time":"2026-11-20 10:00:00","quoted":"21.5","switch":"ON","seen":"1763625600123456"}'
ARRAY = '{"gateway":"g","readings":[{"id":"a","t":21.5,"ts":"2026-11-20T10:00:00Z"}]}'
PLACES = {
    FLAT: {
        "fields": ('"}', '",@}'),
        "first": ("{", "{@,"),
        "text": ('"sensor-001"', '"@"'),
        "number": ("21.5", "@"),
        "integer": ('"floor": 2', '"floor": @'),
        "time": ("00:00Z", "00:00.@Z"),
        "all": (FLAT, "@"),
    },
    NESTED: {
        "fields": ("0}", "0,@}"),
        "first": ("{", "{@,"),
        "text": ('"a"', '"@"'),
        "number": ("21.5", "@"),
        "inner": ('"t"}', '"t",@}'),
        "object": ('"device":{', '"device":@,"was":{'),
        "all": (NESTED, "@"),
    },
    KINDS: {
        "first": ("{", "{@,"),
        "text": ('"ON"', '"@"'),
        "number": ('"21.5"', "@"),
        "quoted": ('"21.5"', '"@"'),
        "integer": ("1763625600123456", "@"),
        "time": ("00:00", "00:00.@"),
        "all": (KINDS, "@"),
    },
}


PLACES[ARRAY] = {
    "first": ("{", "{@,"),
    "text": ('"g"', '"@"'),
    "number": ("21.5", "@"),
    "inner": ('"a",', '"a",@,'),
    "object": ('"readings":', '"readings":@,"was":'),
    "elements": ("[{", "[@,{"),
    "all": (ARRAY, "@"),
}


def times(part: str, between: str = ",") -> Callable[[int], str]:
    """The part, repeated as often as it fits."""
    return lambda size: between.join([part] * max(1, size // len((part + between).encode())))


def counted(part: str) -> Callable[[int], str]:
    """The part, repeated as often as it fits, with 0, 1, 2 and so on in place of #."""
    return lambda size: ",".join(part.replace("#", str(number)) for number in range(size // (len(part) + 6) + 1))


def short_names(size: int) -> str:
    """Fields with as many different names as fit."""
    letters = [chr(code) for code in range(32, 127) if chr(code) not in '"\\']
    return ",".join(
        f'"{"".join(name)}":1' for name in itertools.islice(itertools.product(letters, repeat=3), size // 8 + 1)
    )


def same_hash(count: int) -> list[str]:
    """Different names of eight letters with the same hash in Spark (Murmur3 of two words, seed 42)."""

    def mixed(hash_: int, word: int) -> int:
        hash_ ^= rotated(word * 0xCC9E2D51, 15) * 0x1B873593 & 0xFFFFFFFF
        return rotated(hash_, 13) * 5 + 0xE6546B64 & 0xFFFFFFFF

    def rotated(word: int, bits: int) -> int:
        word &= 0xFFFFFFFF
        return (word << bits | word >> 32 - bits) & 0xFFFFFFFF

    undo = {number: pow(number, -1, 2**32) for number in (0xCC9E2D51, 0x1B873593, 5)}
    letters = bytes(code for code in range(32, 127) if code not in b'"\\')
    names = []
    for first in itertools.product(letters, repeat=4):
        middle = mixed(42, int.from_bytes(first, "little"))
        word = rotated(-0xE6546B64 * undo[5], 19) ^ middle  # makes the hash 0
        last = (rotated(word * undo[0x1B873593], 17) * undo[0xCC9E2D51] & 0xFFFFFFFF).to_bytes(4, "little")
        if not last.strip(letters):
            names.append((bytes(first) + last).decode())
            if len(names) == count:
                break
    return names


def within(left: str, shape: Callable[[int], str], right: str) -> Callable[[int], str]:
    return lambda size: left + shape(size) + right


FIELDS = [
    counted('"n#":1'),
    counted('"#":"#"'),
    counted('"#":{}'),
    counted(r'"\u0041#":""'),
    counted('"#":1.7976931348623157e308'),
    counted('"#":null'),
    short_names,
    times('"":1'),
    times('"a":1'),
    times('"value":1'),
    times('"device":{"friendlyName":"a"}'),
    within('"', times("n", ""), '":1'),
    lambda size: counted(f'"{"n" * 49_000}#":1')(size),
    times(",", ""),
    times(":", ""),
    within('"', times('"', ""), '":1'),
    within('"u":{', short_names, "}"),
    within('"u":{', times('"":1'), "}"),
    times(" ", ""),
]
VALUES = [
    within("[", counted('{"n#":1}'), "]"),
    within("{", counted('"n#":1'), "}"),
    within('{"a":[', counted('{"n#":1}'), "]}"),
    within("[", times('{"a":1}'), "]"),
    within("[", times("[]"), "]"),
    within("[", times("1"), "]"),
    within("[", times('""'), "]"),
    within("[", times('1,"a",{},[],null,1.5'), "]"),
    times("[", ""),
    lambda size: "[" * (size // 2) + "]" * (size // 2),
    times('{"a":', ""),
    within("[", times("[" * 900 + "]" * 900), "]"),
    within("[", times('{"a":' * 900 + "1" + "}" * 900), "]"),
    times("9", ""),
    within("1.", times("9", ""), ""),
    within("1e", times("9", ""), ""),
    times("0", ""),
    within("[", times("9" * 999), "]"),
    within("[", times("0." + "9" * 990), "]"),
    within("[", times("9" * 990 + "e99"), "]"),
    within("[", times("1e999999999"), "]"),
    within("[", times("4.9406564584124654e-324"), "]"),
    within('"', times("{", ""), '"'),
]
TEXTS = [
    times(part, "")
    for part in (
        r"\u0041",
        r"\\",
        r"\"",
        r"\ud83d\ude00",
        r"\ud83d",
        r"\ude00",
        r"\\u",
        r"\ud83d\u",
        r"\u0001",
        "n",
        "é",
        "😀",
        " ",
        "\u3000",
        "\x01",
        "\ufffd",
        "\\",
    )
] + [within("", times("\u3000", ""), "x")]
WHOLE = [
    times(part, "")
    for part in (
        "\x01",
        "{\x01",
        "[",
        '{"a":',
        " ",
        "\u3000",
        "\x00",
        "\\",
        r"\u",
        '"',
        ",",
        "{",
        FLAT,
        FLAT[:-1],
        FLAT + "\n",
        FLAT + ',{"end":"x"}',
    )
]
WHOLE += [
    within("{", times(" ", ""), ""),
    within(FLAT, times(" ", ""), ""),
    within(FLAT, times(" ", ""), "x"),
    within("[", times(FLAT), "]"),
    within("{", times("\x01", ""), ""),
    within("{", counted(" " * 1000 + '"u#":1'), "}"),
]
BYTES: list[Callable[[int], bytes]] = [
    lambda size: b"\xff" * size,
    lambda size: b"\xe2\x82" * (size // 2),
    lambda size: random.Random(1).randbytes(size),
]
SHAPES = {
    "fields": FIELDS,
    "first": FIELDS,
    "inner": FIELDS,
    "number": VALUES,
    "integer": VALUES[:3],
    "object": VALUES[:6],
    "text": TEXTS,
    "quoted": [
        times("9", ""),
        within("1.", times("9", ""), ""),
        within("1e", times("9", ""), ""),
        within("", times(" ", ""), "1"),
    ],
    "time": [times("1", "")],
    "elements": [
        times(element)
        for element in (
            "{}",
            "7",
            "[]",
            "null",
            '{"id":"a","t":1,"ts":"2026-11-20T10:00:00Z"}',
            '{"id":"\\u0061","t":"x"}',
        )
    ]
    + [counted('{"n#":1}'), counted('{"id":"a","t":1,"ts":"2026-11-20T10:00:00Z","n#":[]}')],
    "all": WHOLE,
}


def records(record: str, size: int) -> list[bytes]:
    """The record in every shape, each of about `size` bytes."""
    return [
        record.replace(*PLACES[record][place], 1).replace("@", shape(size), 1).encode("utf-8", "surrogatepass")
        for place in SHAPES
        if place in PLACES[record]
        for shape in SHAPES[place]
    ] + [shape(size) for shape in BYTES]
