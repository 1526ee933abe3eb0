"""Readings as Zigbee2MQTT publishes them: one record with all the values that a device measures.

Two of its settings are needed: `last_seen: epoch`, and `include_device_information: true`, which adds the object `device`.
For the field names, see https://www.zigbee2mqtt.io/guide/usage/mqtt_topics_and_messages.html

    python3 streaming_files_to_delta_bronze.py --readings examples/zigbee2mqtt.py --input examples/zigbee2mqtt --table lake/bronze/zigbee2mqtt
    python3 spark_kafka_consumer.py --readings examples/zigbee2mqtt.py --topic zigbee2mqtt --table lake/silver/zigbee2mqtt
"""

from pipeline.contract import Boolean, Contract, Integer, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Text("device.friendlyName", column="device"),
        Text("device.ieeeAddr", column="address", required=False),
        Text("device.model", column="model", required=False),
        Timestamp("last_seen", format="epoch_ms", at_most_ahead="1 hour", required=False),
        Number("temperature", required=False),  # °C
        Number("humidity", required=False),  # %
        Number("pressure", required=False),  # hPa
        Number("illuminance", required=False),  # lx
        Boolean("occupancy", required=False),
        Boolean("contact", required=False),  # true: closed
        Number("battery", required=False),  # %
        Integer("voltage", required=False, bits=32),  # mV
        Integer("linkquality", required=False, bits=32),  # 0 to 255
    ),
    rules={
        "temperature_out_of_range": "temperature NOT BETWEEN -60 AND 150",
        "percentage_out_of_range": "humidity NOT BETWEEN 0 AND 100 OR battery NOT BETWEEN 0 AND 100",
    },
)
