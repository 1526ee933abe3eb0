"""The columns of the tables that do not come from the contract."""

FILE_ORIGIN = {"source_file": "STRING"}
KAFKA_ORIGIN = {
    "topic": "STRING",
    "partition": "INT",
    "offset": "BIGINT",
    "kafka_timestamp": "TIMESTAMP",
    "kafka_key": "BINARY",
}
# Intermediate columns. A contract's columns are identifiers, so these names can't be among them.
ROW = "@row"  # a number for each row of a batch
BEFORE = "@before"  # the reject_reason that a row of the quarantine had
LISTED = "@listed"  # the rejected elements that it lists
ELEMENT = {"element": "INT"}  # the position of a reading in the array of its record, from 0
# Further lower-case names that the columns of a contract with an array can't have.
ELEMENT_COLUMNS = {*ELEMENT, "_element", "_elements", "_first", "_outer", "_record", "_row"}
# Lower-case names that a contract's columns can't have: the tables' own columns, and the intermediate columns used
# while processing.
RESERVED_COLUMNS = {
    *FILE_ORIGIN,
    *KAFKA_ORIGIN,
    "ingest_time",
    "arrival_time",
    "raw_json",
    "raw",
    "reject_reason",
    "_rescued_data",
    "_unknown_fields",
    "_json",
    "_parts",
    "_strict",
}
