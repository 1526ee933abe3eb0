"""Uplinks as ChirpStack (version 4) publishes them under application/…/event/up. Its codec decodes the payload into `object`.

The messages: https://www.chirpstack.io/docs/chirpstack/integrations/events.html

    python3 streaming_files_to_delta_bronze.py --readings examples/chirpstack.py --input examples/chirpstack --table lake/bronze/chirpstack
    python3 spark_kafka_consumer.py --readings examples/chirpstack.py --topic chirpstack --table lake/silver/chirpstack
"""

from pipeline.contract import Contract, Integer, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("deviceInfo.devEui", column="device"),
        Text("deviceInfo.deviceName", column="name", required=False),
        Text("deviceInfo.applicationName", column="application", required=False),
        Timestamp("time", column="event_time", at_most_ahead="10 minutes"),
        Integer("fCnt", column="counter"),
        Integer("fPort", column="port", required=False, bits=32),
        Number("object.temperature", column="temperature", required=False),  # °C
        Number("object.moisture", column="moisture", required=False),  # %
    ),
    rules={
        "no_clock": "event_time < '2001-01-01'",  # a gateway without GPS or network time
        "no_values": "temperature IS NULL AND moisture IS NULL",
        "out_of_range": "temperature NOT BETWEEN -50 AND 90 OR moisture NOT BETWEEN 0 AND 100",
    },
)
