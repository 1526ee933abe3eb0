"""The Kafka brokers as a script sees them: whether they answer, whether they grant access, and what to do if not."""

import argparse
import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.kafka.admin import Admin
from pipeline.kafka.properties import python_settings, security_protocol
from pipeline.terminal.arguments import location
from pipeline.terminal.errors import PipelineError

from kafka import KafkaAdminClient
from kafka.errors import AuthorizationError, KafkaError, SaslAuthenticationFailedError

SERVERS = "localhost:9092"


def add_broker_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options --bootstrap-servers and --kafka-config."""
    parser.add_argument(
        "--bootstrap-servers",
        "--bootstrap-server",
        metavar="HOST:PORT,…",
        help=f"addresses of Kafka's brokers (default: those in --kafka-config, or {SERVERS})",
    )
    parser.add_argument(
        "--kafka-config",
        "--command-config",
        type=location,
        metavar="FILE",
        help="properties of a Kafka client, such as security.protocol and sasl.jaas.config",
    )


class NoBrokerError(PipelineError):
    """No broker answers, perhaps only for a while."""


class _Refusals(logging.Handler):
    """Captures the reason why a broker refuses a connection, which kafka-python only logs before it raises a timeout.

    It loses the broker's last message if the connection is closed at the same moment (3.0.12, over TLS). All that is known
    then is that the broker has hung up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Exception] = []
        self.has_hung_up = False

    def emit(self, record: logging.LogRecord) -> None:
        self.found += [
            value
            for value in record.args or ()
            if isinstance(value, (SaslAuthenticationFailedError, AuthorizationError))
            or isinstance(value, Exception)
            and "[SSL:" in str(value)
        ]
        self.has_hung_up |= "socket disconnected" in record.getMessage()

    def __enter__(self) -> None:
        logging.getLogger("kafka.net").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("kafka.net").removeHandler(self)


class Broker:
    """The brokers of a cluster. `servers`: "host:port,…". `properties`: Kafka client properties, as in `--kafka-config`."""

    def __init__(self, servers: str | None, properties: dict[str, str] | None = None):
        self.properties = properties or {}
        self.servers = servers or self.properties.get("bootstrap.servers", SERVERS)
        self.addresses: list[tuple[str, int]] = []
        for server in filter(None, map(str.strip, self.servers.split(","))):
            scheme, _, address = server.rpartition("://")
            parts = re.fullmatch(r"(?:\[([\da-fA-F:]+)\]|([^\s:]+)):(\d{1,5})", address)
            # The protocol applies to all brokers, whatever an address says.
            if scheme and scheme.upper() != security_protocol(self.properties):
                raise PipelineError(
                    f"The broker's address {server} does not agree with security.protocol, which is "
                    f"{security_protocol(self.properties)}. Correct one of them."
                )
            if parts and 0 < int(parts[3]) < 65_536:
                self.addresses.append((parts[1] or parts[2], int(parts[3])))
            else:
                raise PipelineError(
                    f"{server!r} is not the address of a Kafka broker (HOST:PORT). Correct --bootstrap-servers or "
                    f"bootstrap.servers in --kafka-config."
                )
        # Reports unsupported properties now, before waiting for Kafka.
        python_settings(self.properties, KafkaAdminClient.DEFAULT_CONFIG)

    def client(self, kind: Any, **settings: Any) -> Any:
        """Creates a kafka-python client of this `kind`. The properties override `settings`."""
        return kind(
            **settings | python_settings(self.properties, kind.DEFAULT_CONFIG),
            bootstrap_servers=self.servers.split(","),
        )

    @contextmanager
    def asking(self) -> Iterator[Admin]:
        """Provides a client. Raises NoBrokerError if no broker answers, PipelineError if access is denied."""
        refusals = _Refusals()
        try:
            self.require_listener()
            with refusals, self.client(Admin, bootstrap_timeout_ms=3000) as admin:
                yield admin
        except (KafkaError, OSError) as error:
            if found := refusals.found or [error] * isinstance(error, AuthorizationError):
                raise self.refused(str(found[0])) from error
            if refusals.has_hung_up and "SASL" in security_protocol(self.properties):
                raise NoBrokerError(str(self.refused("the broker closed the connection during the login"))) from error
            is_local = all(host in ("localhost", "127.0.0.1", "::1") for host, _ in self.addresses)
            raise NoBrokerError(
                f"No Kafka broker answers on {self.servers} ({type(error).__name__}). "
                + (
                    "Start one: docker compose up -d, or python3 local_kafka.py."
                    if is_local
                    else "Check the address, and the broker's advertised.listeners, which must be reachable from here too."
                )
            ) from error

    def require_listener(self) -> None:
        """Raises OSError if nothing listens on any of the addresses; a client would retry for seconds."""
        for number, address in enumerate(self.addresses, 1):
            try:
                socket.create_connection(address, timeout=3).close()
                return
            except OSError:
                if number == len(self.addresses):
                    raise

    def refused(self, reason: str) -> PipelineError:
        return PipelineError(
            f"This script can't use Kafka on {self.servers}: {reason.rstrip('.')}. Check the user, the password, "
            f"the permissions and the certificates of --kafka-config."
        )


def answers(port: int) -> bool:
    """Whether a Kafka broker answers on this port of this machine."""
    try:
        Admin(bootstrap_servers=f"localhost:{port}", bootstrap_timeout_ms=1000).close()
        return True
    except (KafkaError, OSError):
        return False
