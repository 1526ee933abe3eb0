"""The fast path for plain records: a single pattern match instead of parsing.

A plain record, which nearly all should be, is an object with the contract's fields, each with its usual JSON and without
escapes; optional fields may be absent or null. A single pattern match extracts the values. The pattern for the contract's
order is the fastest; the other one accepts any order, and unknown fields. All quantifiers are possessive, because backtracking
would never help.
"""

import re

from pipeline.contract.contract import Contract

from pyspark.sql import Column
from pyspark.sql import functions as F

SPACE = r"[ \t\r\n]*+"
SEPARATOR = "\x01"  # valid JSON contains it only as an escape
# Characters of a string without escapes, except U+FFFD, which Java substitutes for invalid UTF-8.
CHARACTERS = r"[ !#-\[\]-\x{fffc}]*+"
UNKNOWN = rf'(?:"{CHARACTERS}"|-?(?:0|[1-9]\d{{0,14}}+)(?:\.\d{{1,15}}+)?+|true|false|null)'


def plain_parts(contract: Contract) -> tuple[Column, Column]:
    """For a plain record: an empty string, the text of each field's value and, if there are unknown fields, a quote. For any
    other record: the record itself. The first pattern accepts the contract's order only.
    """
    # A nested field, or a name that needs an escape.
    if any(not re.fullmatch(r'[^."\\\x00-\x1f]+', field.name) for field in contract.json_fields):
        nothing = F.lit(None).cast("ARRAY<STRING>")
        return nothing, nothing
    in_order, any_order, seen = "", "", ""
    # The numbers of each field's groups in the two patterns.
    groups: list[list[int]] = []
    groups_any_order: list[list[int]] = []
    for number, field in enumerate(contract.json_fields):
        comma = (
            ""
            if number == 0
            else ","
            if any(earlier.required for earlier in contract.json_fields[:number])
            else r"(?:(?<=\A\{)|(?<!\A\{),)"
        )
        name, value = (
            rf'{SPACE}"\Q{field.name}\E"',
            f"{SPACE}:{SPACE}{field.plain if field.required else f'(?:null|{field.plain})'}{SPACE}",
        )
        in_order += f"{comma}{name}{value}" if field.required else f"(?:{comma}{name}{value})?+"
        first, size = 1 + sum(map(len, groups)), len(re.findall(r"(?<!\\)\((?!\?)", field.plain))
        groups.append([*range(first, first + size)])
        groups_any_order.append([*range(first + number + 1, first + number + 1 + size)])
        # The group matches only once: its reference to itself fails until it has matched.
        any_order += rf"{name}(?<f{number}>(?!\k<f{number}>)){value}|"
        seen += rf"\k<f{number}>" if field.required else ""
    known = "|".join(rf"\Q{field.name}\E" for field in contract.json_fields)
    any_order += rf'{SPACE}(")(?!(?:{known})"){CHARACTERS}"{SPACE}:{SPACE}{UNKNOWN}{SPACE}'
    unknown = [groups_any_order[-1][-1] + 1]
    return (
        _replaced(rf"\A\{{{in_order}\}}{SPACE}\z", groups),
        _replaced(
            rf'\A\{{(?:(?:{any_order})(?:,(?={SPACE}")|(?=\}})))*+{SPACE}\}}{seen}{SPACE}\z',
            [*groups_any_order, unknown],
        ),
    )


def _replaced(pattern: str, groups: list[list[int]]) -> Column:
    """The groups of the pattern, each list joined, as an array after an empty string, or the record itself if the pattern does
    not match.
    """
    template = "".join(SEPARATOR + "".join(f"${group}" for group in joined) for joined in groups)
    # The limit matters for records that do not match and consist of separators only.
    return F.split(F.regexp_replace("_json", pattern, template), SEPARATOR, len(groups) + 1)
