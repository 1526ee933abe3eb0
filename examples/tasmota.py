"""Readings as Tasmota publishes them under tele/…/SENSOR: local time without a zone, and the device only in the MQTT topic.

The bridge from MQTT to Kafka has to set the message key to the topic. The payloads: https://tasmota.github.io/docs/AM2301

    python3 spark_kafka_consumer.py --readings examples/tasmota.py --topic tasmota --table lake/silver/tasmota
"""

from pipeline.contract import Boolean, Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("@key", column="mqtt_topic"),  # tele/greenhouse/SENSOR
        # Its command `Timezone 99` makes a device follow the zone's daylight saving time.
        Timestamp("Time", column="event_time", format="iso8601", zone="Europe/Berlin", at_most_ahead="1 hour"),
        Number("AM2301.Temperature", column="temperature", required=False),
        Number("AM2301.Humidity", column="humidity", required=False),  # %
        Text("TempUnit", column="unit", required=False),
        Number("ENERGY.Power", column="power", required=False),  # W
        Number("ENERGY.Total", column="energy", required=False),  # kWh
        Boolean("Switch1", column="is_on", true=("ON",), false=("OFF",), required=False),
    ),
    rules={
        "no_clock": "event_time < '2001-01-01'",  # until a device has heard from a time server, it counts from 1970
        "wrong_unit": "unit <> 'C'",
        "out_of_range": "temperature NOT BETWEEN -40 AND 80 OR humidity NOT BETWEEN 0 AND 100",
    },
)
