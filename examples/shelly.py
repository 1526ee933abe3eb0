"""The status of a Shelly switch of the second generation or later, as published under …/events/rpc.

A notification holds only the values that have changed.
The frames: https://shelly-api-docs.shelly.cloud/gen2/General/Notifications

    python3 streaming_files_to_delta_bronze.py --readings examples/shelly.py --input examples/shelly --table lake/bronze/shelly
    python3 spark_kafka_consumer.py --readings examples/shelly.py --topic shelly --table lake/silver/shelly
"""

from pipeline.contract import Boolean, Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("src", column="device"),
        Text("method"),
        Timestamp("params.ts", column="event_time", format="epoch_s", at_most_ahead="1 hour"),
        Boolean("params.switch:0.output", column="is_on", required=False),
        Number("params.switch:0.apower", column="power", required=False),  # W
        Number("params.switch:0.voltage", column="voltage", required=False),  # V
        Number("params.switch:0.current", column="current", required=False),  # A
        Number("params.switch:0.aenergy.total", column="energy", required=False),  # Wh
        Number("params.switch:0.temperature.tC", column="temperature", required=False),  # °C, inside the device
    ),
    rules={
        "no_status": "method NOT IN ('NotifyStatus', 'NotifyFullStatus')",
        "out_of_range": "power NOT BETWEEN -5000 AND 5000 OR voltage NOT BETWEEN 0 AND 300",
    },
)
