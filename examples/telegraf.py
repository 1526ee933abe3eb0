"""Metrics of Telegraf in its JSON batch format: each metric of a batch is a reading.

Telegraf writes this format with data_format = "json" and use_batch_format = true; times are in seconds unless json_timestamp_units
says otherwise. The format: https://docs.influxdata.com/telegraf/v1/data_formats/output/json/

    python3 streaming_files_to_delta_bronze.py --readings examples/telegraf.py --input examples/telegraf --table lake/bronze/telegraf
    python3 spark_kafka_consumer.py --readings examples/telegraf.py --topic telegraf --table lake/silver/telegraf
"""

from pipeline.contract import Contract, Number, Text, Timestamp

CONTRACT = Contract(
    fields=(
        Timestamp("metrics[].timestamp", column="event_time", format="epoch_s", at_most_ahead="1 day"),
        Text("metrics[].name", column="measurement"),
        Text("metrics[].tags.host", column="host"),
        Text("metrics[].tags.sensor", column="sensor", required=False),
        # A metric has only the fields of its measurement.
        Number("metrics[].fields.temperature", column="temperature", required=False),  # °C
        Number("metrics[].fields.humidity", column="humidity", required=False),  # %
        Number("metrics[].fields.battery", column="battery", required=False),  # V
    ),
    rules={
        "no_values": "temperature IS NULL AND humidity IS NULL AND battery IS NULL",
        "out_of_range": "temperature NOT BETWEEN -60 AND 150 OR humidity NOT BETWEEN 0 AND 100",
    },
)
