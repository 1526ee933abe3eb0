"""Prints the newest readings of the Bronze table, newest first by ingest_time, then event_time.

Below them are the row counts of the table and of its quarantine, which holds the rejected records.

    python3 read_bronze.py
    python3 read_bronze.py --limit 5
    python3 read_bronze.py --rejected
"""

from pipeline.paths import BRONZE
from pipeline.readers.latest import show_latest
from pipeline.terminal.script import run

if __name__ == "__main__":
    run(lambda: show_latest(__doc__, BRONZE, written_by="python3 streaming_files_to_delta_bronze.py"))
