"""Packs of SenML records (RFC 8428) in resolved form: the message is an array, and each record in it is a reading.

Resolved records have their whole name and time in themselves. In other packs, the base name and the base time of one record
apply to those that follow, which no contract can express: such records are rejected as unresolved.
The format: https://www.rfc-editor.org/rfc/rfc8428

    python3 streaming_files_to_delta_bronze.py --readings examples/senml.py --input examples/senml --table lake/bronze/senml
    python3 spark_kafka_consumer.py --readings examples/senml.py --topic senml --table lake/silver/senml
"""

from pipeline.contract import Boolean, Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("[].n", column="sensor"),
        Timestamp("[].t", column="event_time", format="epoch_s", at_most_ahead="1 day"),
        Text("[].u", column="unit", required=False),
        # Each record has one of these.
        Number("[].v", column="value", required=False),
        Boolean("[].vb", column="is_on", required=False),
        Text("[].vs", column="text", required=False),
        Text("[].bn", column="base_name", required=False),
        Number("[].bt", column="base_time", required=False),
    ),
    rules={
        # Times below 2^28 are relative to now (section 4.5.3).
        "unresolved": "base_name IS NOT NULL OR base_time IS NOT NULL OR sensor NOT LIKE 'urn:%' OR unix_seconds(event_time) < 268435456",
        "no_value": "value IS NULL AND is_on IS NULL AND text IS NULL",
    },
)
