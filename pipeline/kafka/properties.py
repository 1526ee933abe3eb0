"""The properties of a Kafka client (`--kafka-config FILE`), for kafka-python and for Spark's Kafka source.

The file is the one that Kafka's own tools take as `--command-config`, a Java properties file. For the names see
https://kafka.apache.org/39/documentation.html#consumerconfigs. Certificates must be PEM files
(`ssl.truststore.type=PEM`, `ssl.keystore.type=PEM`), because both clients can read those.
"""

import difflib
import os
import re
import ssl
from typing import Any

from pipeline.terminal.errors import PipelineError
from pipeline.terminal.messages import warn

import javaproperties
import kafka.codec

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
USER_AND_PASSWORD = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
SASL_NAMES = ("sasl.mechanism", "sasl.jaas.config", "sasl.kerberos.service.name")
SSL_NAMES = (
    "ssl.truststore.location",
    "ssl.truststore.certificates",
    "ssl.truststore.type",
    "ssl.keystore.location",
    "ssl.keystore.type",
    "ssl.key.password",
    "ssl.endpoint.identification.algorithm",
)
SECURITY_NAMES = ("security.protocol", *SASL_NAMES, *SSL_NAMES)  # supported by both clients
SECRETS = {"sasl.jaas.config", "ssl.key.password"}
CODECS = {"snappy": "python-snappy", "lz4": "lz4", "zstd": "zstandard"}  # and the libraries that kafka-python uses
# Properties whose value is a Java class, or the name of a default that has no name in kafka-python.
JAVA_ONLY = r"((key|value)\.serializer|metric\.reporters)=.*|compression\.type=none"


def read_properties(path: str) -> dict[str, str]:
    """Returns the properties in the file at `path`. Raises PipelineError, which never quotes the file, if it can't be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            properties = {name: value.strip() for name, value in javaproperties.load(file).items()}
            if os.fstat(file.fileno()).st_mode & 0o004 and properties.keys() & SECRETS:
                warn(f"Every user of this machine can read the password in {path}: chmod o= {path}")
            return properties
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a properties file in UTF-8"
        raise PipelineError(
            f"The Kafka properties file {path} can't be read: {reason}. Its lines have the form name=value."
        ) from None


def python_settings(properties: dict[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """The properties as settings of a kafka-python client whose own settings are `known` (its DEFAULT_CONFIG).

    Like Kafka's own clients, it ignores properties of other kinds of clients, but never a security property; see
    `check_security`.
    """
    check_security(properties)
    not_taken_over = (*SSL_NAMES, "sasl.jaas.config", "bootstrap.servers")
    settings = {
        setting: _as_type_of(known[setting], value, name)
        for name, value in properties.items()
        if (setting := name.replace(".", "_")) in known
        and name not in not_taken_over
        and not re.fullmatch(JAVA_ONLY, f"{name}={value}")
    }
    settings["security_protocol"] = security_protocol(properties)
    if properties.get("sasl.mechanism") in USER_AND_PASSWORD:
        settings |= _user_and_password(properties.get("sasl.jaas.config", ""))
    if security_protocol(properties).endswith("SSL"):
        settings["ssl_context"] = _ssl_context(properties)
    codec = settings.get("compression_type")
    if codec in CODECS and not getattr(kafka.codec, f"has_{codec}")():
        warn(f"Sending with gzip instead of {codec}, for which Python needs a library: pip install {CODECS[codec]}.")
        settings["compression_type"] = "gzip"
    return settings


def security_protocol(properties: dict[str, str]) -> str:
    """One of `PROTOCOLS`. Kafka's own clients also accept them in lower case."""
    return properties.get("security.protocol", "PLAINTEXT").upper()


def check_security(properties: dict[str, str]) -> None:
    """Raises PipelineError if one of the two clients would ignore a security property.

    Both silently ignore misspelt names, and `sasl.…` and `ssl.…` properties that the protocol does not use.
    """
    for name in properties.keys() - set(SECURITY_NAMES):
        similar = difflib.get_close_matches(re.sub("[_-]", ".", name.lower()), SECURITY_NAMES, 1, cutoff=0.75)
        if similar or re.search("sasl|ssl|jaas|secur|(key|trust)store", name, re.IGNORECASE):
            raise PipelineError(
                f"The Kafka property {name} is unknown to at least one of the two clients (Java's and kafka-python). "
                + (f"Did you mean {similar[0]}? " if similar else "")
                + f"Both support {', '.join(SECURITY_NAMES)}."
            )
    protocol = security_protocol(properties)
    if protocol not in PROTOCOLS:
        raise PipelineError(
            f"The Kafka property security.protocol is {protocol}; it must be one of {', '.join(PROTOCOLS)}."
        )
    for names, user in ((SASL_NAMES, "SASL"), (SSL_NAMES, "SSL")):
        if user not in protocol and (unused := sorted(properties.keys() & set(names))):
            raise PipelineError(
                f"The Kafka property {unused[0]} does nothing while security.protocol is {protocol}. Set "
                f"security.protocol to {' or '.join(each for each in PROTOCOLS if user in each)}, or remove {unused[0]}."
            )
    mechanisms = (*USER_AND_PASSWORD, "GSSAPI")
    if "SASL" in protocol and properties.get("sasl.mechanism") not in mechanisms:
        raise PipelineError(f"The Kafka property sasl.mechanism has to be one of {', '.join(mechanisms)}.")
    if (algorithm := properties.get("ssl.endpoint.identification.algorithm", "")).lower() not in ("", "https"):
        raise PipelineError(
            f"The Kafka property ssl.endpoint.identification.algorithm is {algorithm}; it can be https, or empty to "
            f"accept a certificate for any host."
        )


def _as_type_of(default: object, value: str, name: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        try:
            return value if value == "all" else int(value)
        except ValueError:
            raise PipelineError(f"The Kafka property {name} must be a whole number.") from None
    return value


def _user_and_password(jaas: str) -> dict[str, str]:
    """Extracts user and password from `sasl.jaas.config`: a login module with username="…" and password="…"; a backslash escapes."""
    found = {
        name: re.sub(r"\\(.)", r"\1", text)
        for name, text in re.findall(r'\b(username|password)\s*=\s*"((?:[^"\\]|\\.)*)"', jaas)
    }
    if found.keys() != {"username", "password"}:
        raise PipelineError(
            'The Kafka property sasl.jaas.config has to name the login module, username="…" and '
            'password="…", and to end with a semicolon.'
        )
    return {f"sasl_plain_{name}": text for name, text in found.items()}


def _ssl_context(properties: dict[str, str]) -> ssl.SSLContext:
    for store in ("truststore", "keystore"):
        if f"ssl.{store}.location" in properties and properties.get(f"ssl.{store}.type") != "PEM":
            raise PipelineError(
                f"The Kafka property ssl.{store}.type has to be PEM, and ssl.{store}.location a PEM file: "
                f"kafka-python reads no other format. keytool -exportcert -rfc writes one."
            )
    try:
        context = ssl.create_default_context(
            cafile=properties.get("ssl.truststore.location"), cadata=properties.get("ssl.truststore.certificates")
        )
        if keystore := properties.get("ssl.keystore.location"):
            context.load_cert_chain(keystore, password=properties.get("ssl.key.password"))
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise PipelineError(f"The certificates named in the Kafka properties can't be loaded: {error}.") from None
    # Kafka's clients also verify the host name, unless this property is empty.
    context.check_hostname = properties.get("ssl.endpoint.identification.algorithm", "https") != ""
    return context
