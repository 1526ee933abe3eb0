"""Prints the newest readings of the Silver table, newest first by ingest_time, then event_time.

Below them are the row counts of the table and of its quarantine, which holds the rejected records.

    python3 read_silver.py
    python3 read_silver.py --limit 5 --raw
    python3 read_silver.py --rejected
"""

from pipeline.paths import SILVER
from pipeline.readers.latest import show_latest
from pipeline.terminal.script import run

if __name__ == "__main__":
    run(lambda: show_latest(__doc__, SILVER, written_by="python3 spark_kafka_consumer.py"))
