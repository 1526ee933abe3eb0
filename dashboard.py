"""A live web page about the tables: the newest readings, readings over time, rejected records with their reasons,
the lag of the streams, the duration of their batches, and the size of each table.

    lake/*/* ──> http://127.0.0.1:8501

It reads the Delta tables in --lake without Spark, whatever their contract, refreshes automatically, and asks the broker
how many records are waiting in Kafka. The page is visible on this machine only, and loads nothing from elsewhere. Ctrl+C
stops it. It needs additional libraries:

    pip install -r requirements-dashboard.txt
    python3 dashboard.py
    python3 dashboard.py --lake /data/lake --port 8600
"""

import argparse
import os
import resource
import sys

from pipeline.dashboard import is_installed
from pipeline.kafka.brokers import add_broker_options
from pipeline.kafka.topics import Topic
from pipeline.paths import LAKE, REPOSITORY
from pipeline.terminal.arguments import argument_parser, local_folder, port_number
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import say
from pipeline.terminal.ports import is_free
from pipeline.terminal.script import has_no_end, run
from pipeline.terminal.signals import on_stop_signal

STREAMLIT = {  # https://docs.streamlit.io/develop/api-reference/configuration/config.toml
    "server.address": "127.0.0.1",
    "server.allowedHosts": ["localhost", "127.0.0.1", "::1"],  # other sites can point their host name to this address
    "server.headless": "true",  # otherwise it opens a browser and asks for an e-mail address
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "logger.hideWelcomeMessage": "true",
    "logger.level": "warning",
}


def main() -> None:
    options = parse_options()
    has_no_end()
    if not is_installed():
        raise PipelineError(
            "The page needs libraries that are not installed: pip install -r requirements-dashboard.txt"
        )
    Topic.of(options)  # rejects an invalid --kafka-config here, where the user sees it
    if not is_free(options.port):
        raise PipelineError(f"Port {options.port} is in use. Choose another: --port {options.port + 1}.")
    say(f"http://127.0.0.1:{options.port} shows {options.lake}. Press Ctrl+C to stop.")
    on_stop_signal(lambda: os._exit(0))  # until Streamlit has its own handlers, nothing needs an orderly shutdown
    from pipeline.dashboard.private import keep_to_this_machine

    from streamlit.web.cli import main as streamlit

    keep_to_this_machine()
    # A file of a few kilobytes can unpack to gigabytes. With this limit, reading it fails, and half of the memory stays free
    # for everything else.
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (half, half))
    settings = [
        f"--{name}={value}"
        for name, values in (STREAMLIT | {"server.port": options.port}).items()
        for value in (values if isinstance(values, list) else [values])
    ]
    streamlit(["run", str(REPOSITORY / "dashboard.py"), *settings, "--", *sys.argv[1:]], standalone_mode=False)


def parse_options() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--lake", type=local_folder, default=str(LAKE), help="folder with the tables")
    parser.add_argument("--port", type=port_number, default=8501, help="local port to serve the page on")
    add_broker_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    if "streamlit.runtime.scriptrunner" in sys.modules:  # somebody opens the page
        from pipeline.dashboard.page import show_page

        show_page(parse_options())
    else:
        run(main)
