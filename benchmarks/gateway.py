"""The contract of the benchmark's messages with 20 readings each."""

from pipeline.contract import Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("gateway"),
        Timestamp("readings[].ts", column="event_time", format="epoch_ms", at_most_ahead="1 day"),
        Text("readings[].id", column="device_id"),
        Number("readings[].t", column="temperature"),
        Number("readings[].rh", column="humidity", required=False),
    ),
    rules={"out_of_range": "temperature NOT BETWEEN -40 AND 120"},
)
