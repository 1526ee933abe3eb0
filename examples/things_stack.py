"""Uplinks as The Things Stack (version 3) publishes them. Its payload formatter decodes the payload.

The Things Stack leaves out empty fields; a counter of 0 counts as empty.
The messages: https://www.thethingsindustries.com/docs/integrations/data-formats/

    python3 streaming_files_to_delta_bronze.py --readings examples/things_stack.py --input examples/things_stack --table lake/bronze/things_stack
    python3 spark_kafka_consumer.py --readings examples/things_stack.py --topic things_stack --table lake/silver/things_stack
"""

from pipeline.contract import Contract, Integer, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("end_device_ids.device_id", column="device"),
        Text("end_device_ids.application_ids.application_id", column="application"),
        Timestamp("received_at", column="event_time", at_most_ahead="10 minutes"),
        Integer("uplink_message.f_port", column="port", bits=32),
        Integer("uplink_message.f_cnt", column="counter", required=False),
        Number("uplink_message.decoded_payload.temperature", column="temperature"),  # °C
        Number("uplink_message.decoded_payload.humidity", column="humidity", required=False),  # %
        Number("uplink_message.decoded_payload.battery", column="battery", required=False),  # V
    ),
    rules={"out_of_range": "temperature NOT BETWEEN -50 AND 90 OR humidity NOT BETWEEN 0 AND 100"},
)
