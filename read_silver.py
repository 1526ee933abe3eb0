"""Prints the newest readings of the Silver table, newest first by ingest_time, then event_time.

Below them are the row counts of the table and of its quarantine, which has the rejected records.

    python3 read_silver.py
    python3 read_silver.py --limit 5 --raw
    python3 read_silver.py --rejected
"""

import common.process  # isort: skip  # noqa: F401 # first, so that Ctrl+C during the other imports is clean too

from common.console import run
from common.reader import show_latest
from common.tables import SILVER

if __name__ == "__main__":
    run(lambda: show_latest(__doc__, SILVER, written_by="python3 spark_kafka_consumer.py"))
