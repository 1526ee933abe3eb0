"""Records with an array of readings: judged as a whole first, then element by element.

A fault in the JSON, or in a field outside the array, rejects the whole record; a fault in an element rejects that element only.
The rows of a large record must not take a multiple of its size, so whatever belongs to the record as a whole is in its first
row only.
"""

from collections.abc import Iterable
from typing import NamedTuple

from pipeline.contract.columns import LISTED
from pipeline.contract.contract import OVERSIZED, Contract
from pipeline.contract.fields import json_text, sql_text
from pipeline.contract.strict import MAX_NAMED_FIELDS, element_reading, record_reading, values_of

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

MAX_REPEATED_BYTES = 1_000_000_000  # of text and keys from outside the array, which each of its readings repeats
ONCE = ("raw", "raw_json", LISTED)  # columns that only the first row of a record has


class Read(NamedTuple):
    """Records that have been read. `rows` has the contract's columns. `reason`, `rescued` and `unknown` are SQL over it. `reason` lists
    the possible reasons to reject a row, rules excluded; the first that is not null counts.
    """

    rows: DataFrame
    reason: str
    rescued: str
    unknown: str


def read_elements(records: DataFrame, contract: Contract, given: str) -> Read:
    """Reads records (as in `parse`, with `_json`), each with an array of readings. Returns a row for each element, and a single row for
    a record that is rejected as a whole. `given`: SQL for an earlier reason to reject a record, followed by a comma, or "".

    Adds `element` (int: the position in the array, from 0; null for a whole record) and `_record` (a number shared by all rows of a
    record). `raw`, `raw_json` and the record's own unknown fields are in its first row only.
    """
    of_record, of_element = values_of(contract.record_fields, "_outer"), values_of(contract.element_fields, "_strict")
    once = [f"`{name}`" for name in ONCE if name in records.columns]
    kept = [f"`{name}`" for name in records.columns if name not in (*ONCE, "_json")] + ["_record"]
    repeated = [f"`{each.column}`" for each in contract.record_fields if each.type == "STRING"]
    repeated += [name for name in ("kafka_key", "source_file") if name in records.columns]
    repeated_bytes = " + ".join(["0L", *(f"coalesce(octet_length({column}), 0)" for column in repeated)])
    reason = (
        "CASE WHEN _outer.reason IS NOT NULL THEN _outer.reason WHEN coalesce(size(_elements), 0) = 0 THEN 'malformed_json' "
        f"WHEN size(_elements) * ({repeated_bytes}) > {MAX_REPEATED_BYTES} THEN '{OVERSIZED}' END"
    )
    whole = (
        records.withColumn("_record", F.monotonically_increasing_id())
        .withColumn("_outer", F.expr(record_reading(contract)))
        .withColumn("_elements", F.expr(f"CASE WHEN _outer.reason IS NULL THEN {_elements_of(contract)} END"))
        .select(*kept, *once, "_outer", "_elements", *of_record)
        .withColumn(
            "_first",
            F.expr(
                f"struct({', '.join(once)}, {reason} AS reason, _outer.rescued AS rescued, _outer.unknown AS unknown)"
            ),
        )
        .withColumn(
            "_elements",
            F.expr(
                f"CASE WHEN coalesce({given}_first.reason) IS NULL THEN _elements ELSE CAST(array() AS ARRAY<VARIANT>) END"
            ),
        )
    )
    columns = [*kept, *(f"`{each.column}`" for each in contract.fields if not each.array)]
    rows = (
        whole.select(*columns, F.expr("posexplode(arrays_zip(_elements, array(_first))) AS (element, _row)"))
        .select(*columns, F.expr("IF(_row._elements IS NULL, NULL, element) AS element"), "_row.*")
        .withColumnsRenamed({"_elements": "_element", "1": "_first"})
        .withColumn("_strict", F.expr(f"CASE WHEN element IS NOT NULL THEN {element_reading(contract)} END"))
        .select(*columns, "element", "_first", "_strict", *of_element, *(f"_first.{name}" for name in once))
    )
    name = sql_text(f"{json_text(contract.array[:-2])}:")
    rescued = (
        "CASE WHEN _strict.rescued IS NULL THEN _first.rescued "
        f"ELSE concat(coalesce(left(_first.rescued, length(_first.rescued) - 1) || ',', '{{'), {name}, _strict.rescued, '}}') END"
        if contract.array != "[]"
        else "_strict.rescued"
    )
    unknown = (
        f"slice(concat(coalesce(_first.unknown, array()), transform(coalesce(_strict.unknown, array()), "
        f"name -> concat({sql_text(contract.array + '.')}, name))), 1, {MAX_NAMED_FIELDS})"
    )
    return Read(rows, "_first.reason, _strict.reason", rescued, unknown)


def _elements_of(contract: Contract) -> str:
    """SQL: the elements of the array in `_json`, each a variant with the names of its own fields only. Elements of the array's variant
    would each hold the names of all of them.
    """
    if contract.array == "[]":
        return "from_json(_json, 'ARRAY<VARIANT>')"
    path = ["`" + name.replace("`", "``") + "`" for name in contract.array[:-2].split(".")]
    schema = "ARRAY<VARIANT>"
    for name in reversed(path):
        schema = f"STRUCT<{name}: {schema}>"
    return f"from_json(_json, {sql_text(schema)}).{'.'.join(path)}"


def by_record(judged: DataFrame, columns: Iterable[str]) -> DataFrame:
    """The rejected rows of `parse`, with the quarantine's `columns`: a row for each record and reason. `elements` has the
    positions of the rejected readings, and is null for a whole record. `raw` comes from the first row of the record, if it is there.
    """
    same = [F.first(name).alias(name) for name in columns if name not in ("reject_reason", "elements", "raw")]
    rows = (
        judged.where("reject_reason IS NOT NULL OR element = 0")
        .groupBy("_record", "reject_reason")
        .agg(
            *same,
            F.first("raw", ignorenulls=True).alias("raw"),
            F.expr("nullif(sort_array(collect_list(element)), array())").alias("elements"),
        )
    )
    raw = F.first("raw", ignorenulls=True).over(Window.partitionBy("_record"))
    return rows.withColumn("raw", raw).where("reject_reason IS NOT NULL").select(*columns)
