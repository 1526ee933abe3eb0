"""A broker with SASL/SCRAM over TLS, and who may see what: passwords, ports, and texts of records and file names."""

import os
import re
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress

from pipeline.kafka.properties import SECURITY_NAMES, python_settings, read_properties
from pipeline.kafka.topics import Topic
from pipeline.spark.java import SCALA, find_java, resolve_jars
from pipeline.terminal.errors import PipelineError
from pipeline.terminal.ports import free_ports, is_free

import javaproperties
import psutil
import pytest
import yaml
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from helpers.processes import REPOSITORY, run_script
from helpers.topics import origins
from local_kafka import LOGGING, Server, kafka_properties, kafka_version, zookeeper_properties

CONSUMER, PRODUCER = "spark_kafka_consumer.py", "kafka_producer.py"
PASSWORD = 'Tr0ub4dor&"3\\;='


@pytest.fixture(scope="module")
def secure_broker(tmp_path_factory):
    """The broker of docker-compose.yml, with SASL/SCRAM over TLS on its port for this machine.

    Yields that address, an address that needs no password, and the client properties for the first one.
    """
    folder = tmp_path_factory.mktemp("secure")
    store, certificate = folder / "kafka.p12", folder / "kafka.pem"
    keytool = ["keytool", "-keystore", store, "-storepass", "changeit", "-alias", "kafka"]
    subprocess.run(
        [
            *keytool,
            "-genkeypair",
            "-keyalg",
            "RSA",
            "-storetype",
            "PKCS12",
            "-dname",
            "CN=localhost",
            "-ext",
            "san=dns:localhost,ip:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run([*keytool, "-exportcert", "-rfc", "-file", certificate], check=True, capture_output=True)

    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    jars = resolve_jars([f"org.apache.kafka:kafka_{SCALA}:{kafka_version(services['kafka']['image'])}", LOGGING])
    java = [find_java().path, "-cp", os.pathsep.join(jars)]
    port, zookeeper_port = free_ports(2)
    environment = services["zookeeper"]["environment"]
    zookeeper = Server(
        "ZooKeeper",
        [*java, "org.apache.zookeeper.server.quorum.QuorumPeerMain"],
        environment,
        zookeeper_properties(environment, zookeeper_port, str(folder)),
        str(folder),
        lock_file=0,
    )
    environment = services["kafka"]["environment"] | {
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "HOST:SASL_SSL,DOCKER:PLAINTEXT",
        "KAFKA_SASL_ENABLED_MECHANISMS": "SCRAM-SHA-512",
        "KAFKA_LISTENER_NAME_HOST_SCRAM-SHA-512_SASL_JAAS_CONFIG": "org.apache.kafka.common.security.scram.ScramLoginModule required;",
        "KAFKA_AUTHORIZER_CLASS_NAME": "kafka.security.authorizer.AclAuthorizer",
        "KAFKA_SUPER_USERS": "User:ANONYMOUS",
        "KAFKA_ALLOW_EVERYONE_IF_NO_ACL_FOUND": "true",
        "KAFKA_SSL_KEYSTORE_TYPE": "PKCS12",
        "KAFKA_SSL_KEYSTORE_LOCATION": store,
        "KAFKA_SSL_KEYSTORE_PASSWORD": "changeit",
    }
    properties = kafka_properties(environment, port, zookeeper_port, str(folder))
    plain_port = int(properties["listeners"].split(":")[-1])
    with zookeeper:
        while is_free(zookeeper_port):
            time.sleep(0.1)
        with Server("Kafka", [*java, "kafka.Kafka"], environment, properties, str(folder), lock_file=0):
            while is_free(plain_port):
                time.sleep(0.1)
            with KafkaAdminClient(bootstrap_servers=f"localhost:{plain_port}") as admin:
                admin.alter_user_scram_credentials(
                    [UserScramCredentialUpsertion("sensors", ScramMechanism.SCRAM_SHA_512, PASSWORD.encode())]
                )
            yield (
                f"localhost:{port}",
                f"localhost:{plain_port}",
                {
                    "security.protocol": "sasl_ssl",
                    "sasl.mechanism": "SCRAM-SHA-512",
                    "sasl.jaas.config": jaas("sensors", PASSWORD),
                    "ssl.truststore.type": "PEM",
                    "ssl.truststore.location": str(certificate),
                },
            )


def jaas(user: str, password: str) -> str:
    escaped = re.sub(r'(["\\])', r"\\\1", password)
    return f'org.apache.kafka.common.security.scram.ScramLoginModule required username="{user}" password="{escaped}";'


@pytest.fixture(autouse=True)
def closed_files():
    """Makes the tests' files unreadable to others; the scripts would warn about readable ones."""
    mask = os.umask(0o077)
    yield
    os.umask(mask)


@pytest.fixture
def secure(secure_broker, tmp_path):
    """The script options for that broker, and a function that changes the properties in their file."""
    broker, _, properties = secure_broker
    file = tmp_path / "kafka.properties"

    def change(**changes):
        file.write_text(javaproperties.dumps(properties | {name.replace("_", "."): v for name, v in changes.items()}))

    change()
    return ["--bootstrap-servers", broker, "--kafka-config", file, "--topic", tmp_path.name], change


def pages(address: str) -> str:
    """The contents of all pages of Spark's web UI."""
    seen, to_do = {}, ["/jobs/", "/api/v1/applications"]
    while to_do:
        page = to_do.pop()
        if page in seen or "/static/" in page or "kill" in page:
            continue
        try:
            seen[page] = urllib.request.urlopen(address + page).read().decode()
        except urllib.error.HTTPError:
            seen[page] = ""
            continue
        to_do += re.findall(r'href="(/[^"#]+)"', seen[page].replace("&amp;", "&"))
        for application in re.findall(r'"id" : "(local-\d+)"', seen[page]):
            to_do += [
                f"/api/v1/applications/{application}/{what}"
                for what in ("environment", "jobs", "stages", "sql?details=true&length=1000")
            ]
    assert any("/SQL/execution" in page for page in seen) and any("/environment" in page for page in seen)
    return "\n".join(seen.values())


def test_scram_over_tls_works_and_the_password_is_nowhere_to_be_seen(
    spark, secure_broker, secure, tmp_path, start, account, run_here
):
    _, plain, _ = secure_broker
    topic, _ = secure
    options = [*topic, "--table", tmp_path / "silver", "--checkpoint", tmp_path / "checkpoint"]
    [port] = free_ports(1)
    ui = f"--conf spark.ui.enabled=true --conf spark.ui.port={port} pyspark-shell"
    producer = start(PRODUCER, *topic, "--create-topic", "--rate", 50, "--verbose")
    consumer = start(
        CONSUMER, *options, "--trigger", "0 seconds", "--verbose", env=os.environ | {"PYSPARK_SUBMIT_ARGS": ui}
    )
    consumer.wait_for("rows in", times=2)

    everyone = [process.info for process in psutil.process_iter(["cmdline", "environ"])]
    shown = pages(f"http://localhost:{port}")
    assert producer.stop() == 0 and consumer.stop() == 0
    assert run_here(CONSUMER, *options, "--once").returncode == 0
    secrets = [PASSWORD, jaas("", PASSWORD).split('password="')[1][:-2], "Tr0ub4dor"]
    files = [
        file.read_bytes()
        for folder in ("silver", "silver_quarantine", "checkpoint")
        for file in (tmp_path / folder).rglob("*")
        if file.is_file()
    ]
    for secret in secrets:
        assert secret not in str(everyone) and secret not in shown
        assert secret not in producer.output and secret not in consumer.output
        assert not any(secret.encode() in content for content in files)
    assert "silver" in shown  # the pages really are those of the consumer

    account("SASL/SCRAM over TLS", *origins(spark, plain, options))


@pytest.mark.parametrize("script", [PRODUCER, CONSUMER])
def test_the_wrong_password_is_said_and_not_shown(script, secure):
    options, change = secure
    change(sasl_jaas_config=jaas("sensors", "swordfish"))
    run = run_script(script, *options)
    # The broker may hang up first and only answer the next attempt. Then another line comes before the error.
    assert run.returncode == 1 and run.stderr.count("\n") <= 2, run.stderr
    for line in run.stderr.splitlines():
        assert (
            re.search("invalid credentials|closed the connection during the login", line) and "--kafka-config" in line
        )
    assert line.startswith("error: ")
    assert "swordfish" not in run.stderr + run.stdout


def test_what_the_user_may_not_do_is_said_and_is_no_reason_to_stop_where_it_need_not_be(
    spark, secure_broker, secure, tmp_path, run_here
):
    _, plain, _ = secure_broker
    topic, _ = secure
    options = [
        *topic,
        "--table",
        tmp_path / "silver",
        "--checkpoint",
        tmp_path / "checkpoint",
        "--group-id",
        "closed",
        "--once",
    ]
    send = [PRODUCER, *topic, "--create-topic", "--rate", 0, "--count", 10]
    assert run_here(*send).returncode == 0

    def forbid(kind: ResourceType, name: str) -> None:
        with KafkaAdminClient(bootstrap_servers=plain) as admin:
            admin.create_acls(
                [
                    ACL("User:sensors", "*", operation, permission, ResourcePattern(kind, name))
                    for operation, permission in (
                        (ACLOperation.READ, ACLPermissionType.DENY),
                        (ACLOperation.DESCRIBE, ACLPermissionType.ALLOW),
                    )
                ]
            )

    forbid(ResourceType.GROUP, "closed")
    run = run_here(CONSUMER, *options)
    assert run.returncode == 0 and "10 rows in" in run.stdout
    assert re.fullmatch(
        r"Kafka does not accept the stream's offsets \(GroupAuthorizationFailedError\), .* the group closed\. .*\n",
        run.stderr,
    )
    forbid(ResourceType.TOPIC, topic[-1])
    with KafkaProducer(bootstrap_servers=plain) as producer:
        producer.send(topic[-1], b"{}")
    run = run_here(CONSUMER, *options)
    assert run.returncode == 1 and re.fullmatch(
        "error: This script can't use Kafka on .*Not authorized to access topics.*\n", run.stderr
    )
    assert spark.read.format("delta").load(str(tmp_path / "silver")).count() == 10


def test_a_certificate_that_is_not_trusted_is_said(secure, tmp_path, run_here):
    options, change = secure
    other = tmp_path / "other.pem"
    subprocess.run(
        [
            "keytool",
            "-keystore",
            tmp_path / "o.p12",
            "-storepass",
            "changeit",
            "-alias",
            "o",
            "-genkeypair",
            "-keyalg",
            "RSA",
            "-dname",
            "CN=other",
        ],
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            "keytool",
            "-keystore",
            tmp_path / "o.p12",
            "-storepass",
            "changeit",
            "-alias",
            "o",
            "-exportcert",
            "-rfc",
            "-file",
            other,
        ],
        check=True,
        capture_output=True,
    )
    change(ssl_truststore_location=str(other))
    run = run_here(PRODUCER, *options, "--wait", 0)
    assert run.returncode == 1 and "certificate" in run.stderr.lower() and run.stderr.count("\n") == 1, run.stderr


CONFIGS = [
    ("security.protocol=SASL_SSL\nsasl.mechanism=PLAIN\nsasl.jaas.config=none", "sasl.jaas.config has to name"),
    ("security.protocol=SSL\nssl.truststore.location=/etc/hosts", "ssl.truststore.type has to be PEM"),
    ("security.protocol=SSL\nssl.truststore.type=PEM\nssl.truststore.location=/nowhere", "can't be loaded"),
    ("security.protocol=TLS", "security.protocol is TLS"),
    ("sasl.mechanism=PLAIN", "sasl.mechanism does nothing while security.protocol is PLAINTEXT"),
    ("security.protocol=SSL\nsasl.mechanism=PLAIN", "sasl.mechanism does nothing while security.protocol is SSL"),
    ("security.protocol=SASL_PLAINTEXT\nssl.truststore.type=PEM", "ssl.truststore.type does nothing"),
    ("security.protocol=SASL_SSL", "sasl.mechanism has to be one of"),
    ("security.protocol=SASL_SSL\nsasl.mechanism=SCRAM_SHA_512", "sasl.mechanism has to be one of"),
    (
        "security.protocol=SSL\nssl.endpoint.identification.algorithm=htps",
        "ssl.endpoint.identification.algorithm is htps",
    ),
    ("bootstrap.servers=SSL://localhost:9093", "does not agree with security.protocol, which is PLAINTEXT"),
    ("ssl.crlfile=/etc/revoked.pem", "ssl.crlfile is unknown to at least one of the two clients"),
    (
        "sasl.login.callback.handler.class=x",
        "sasl.login.callback.handler.class is unknown to at least one of the two clients",
    ),
    ("request.timeout.ms=soon", "request.timeout.ms must be a whole number"),
]


def misspelt(name: str) -> set[str]:
    """The name with a letter missing, doubled or swapped, in a different case, or as other tools write it."""
    letters = range(len(name))
    return (
        {name[:i] + name[i + 1 :] for i in letters}
        | {name[:i] + name[i] + name[i:] for i in letters if name[i].isalpha()}
        | {name[:i] + name[i + 1 : i + 2] + name[i] + name[i + 2 :] for i in letters}
        | {name.upper(), name.title()}
        | {name.replace(".", "_"), name.replace(".", "-"), f"kafka.{name}", f"consumer.{name}", f" {name}s"}
    ) - {name}


@pytest.mark.parametrize("name", SECURITY_NAMES)
def test_a_misspelt_property_never_leaves_a_connection_less_safe(name):
    for wrong in misspelt(name):
        with pytest.raises(PipelineError, match="is unknown to at least one of the two clients"):
            Topic(None, properties={wrong: "SSL"})


@pytest.mark.parametrize("script", [CONSUMER, PRODUCER, "dashboard.py"])
def test_every_script_refuses_it(script, tmp_path):
    file = tmp_path / "kafka.properties"
    file.write_text("securtiy.protocol=SSL\n")
    run = run_script(script, "--kafka-config", file)
    assert (run.returncode, run.stdout) == (1, "") and "Did you mean security.protocol?" in run.stderr, run.stderr


@pytest.mark.parametrize("config, complaint", CONFIGS, ids=[complaint for _, complaint in CONFIGS])
def test_a_property_that_cannot_be_followed_is_said(config, complaint, tmp_path, run_here):
    file = tmp_path / "kafka.properties"
    file.write_text(config)
    run = run_here(PRODUCER, "--kafka-config", file, "--wait", 0)
    assert run.returncode == 1 and complaint in run.stderr and run.stderr.count("\n") == 1, run.stderr


def test_what_a_producer_of_java_needs_is_left_out(broker, silver, tmp_path, run_here):
    file = tmp_path / "producer.properties"
    file.write_text(
        f"bootstrap.servers={broker}\nkey.serializer=org.apache.kafka.common.serialization.StringSerializer\n"
        f"value.serializer=x.Y\ncompression.type=none\nmetric.reporters=a.B,c.D\npartitioner.class=z\nbatch.size=16384\n"
    )
    run = run_here(PRODUCER, *silver[0][2:], "--kafka-config", file, "--create-topic", "--count", 1)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.endswith("1 sent, 1 acknowledged.\n")


@pytest.mark.parametrize("codec, library", [("snappy", "python-snappy"), ("lz4", "lz4"), ("zstd", "zstandard")])
def test_a_codec_that_python_lacks_is_replaced_and_said(monkeypatch, capsys, codec, library):
    for is_there, expected in ((True, codec), (False, "gzip")):
        monkeypatch.setattr(f"kafka.codec.has_{codec}", lambda is_there=is_there: is_there)
        settings = python_settings({"compression.type": codec}, KafkaProducer.DEFAULT_CONFIG)
        assert settings["compression_type"] == expected
        assert (f"instead of {codec}" in (said := capsys.readouterr().err)) is not is_there
    assert said.endswith(f"pip install {library}.\n")


def test_a_config_file_that_cannot_be_read_is_said(tmp_path, run_here):
    run = run_here(PRODUCER, "--kafka-config", tmp_path / "none")
    assert (run.returncode, run.stderr) == (
        1,
        f"error: The Kafka properties file {tmp_path}/none can't be read: No such file or "
        f"directory. Its lines have the form name=value.\n",
    )


def test_nothing_listens_beyond_this_machine(broker, silver, start, run_here):
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)

    topic, options = silver
    run_here(PRODUCER, *topic, "--create-topic", "--count", 5, "--rate", 0)
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch")
    ours = [
        process
        for process in psutil.process_iter(["cmdline"])
        if re.search(r"local_kafka|kafka\.Kafka|QuorumPeerMain|spark", " ".join(process.info["cmdline"] or ()))
    ]
    listening = [socket.laddr.ip for process in ours for socket in listeners(process)]
    assert len(listening) > 5 and set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert consumer.stop() == 0


def listeners(process: psutil.Process) -> list:
    return [socket for socket in process.net_connections("inet") if socket.status == psutil.CONN_LISTEN]


def answer(port: int, message: bytes) -> bytes:
    """The port's reply within a second to a client that does not know the secret."""
    with socket.create_connection(("127.0.0.1", port)) as client, suppress(TimeoutError, ConnectionResetError):
        client.settimeout(1)
        client.sendall(message)
        return client.recv(10_000)
    return b""


def test_no_port_of_a_stream_takes_orders_from_another_user_of_the_machine(broker, silver, start, run_here):
    topic, options = silver
    run_here(PRODUCER, *topic, "--create-topic", "--count", 5, "--rate", 0)
    consumer = start(CONSUMER, *options, "--trigger", "0 seconds")
    consumer.wait_for("batch")
    process = psutil.Process(consumer.process.pid)
    ports = [socket.laddr.port for each in (process, *process.children(recursive=True)) for socket in listeners(each)]
    assert len(ports) >= 5  # two of py4j, one of the accumulators and two of the driver
    py4j = [b"c\nz:java.lang.Runtime\ngetRuntime\ne\n", b"g\np0\ne\n", b"c\np0\ncall\ne\n"]
    # A frame of Spark's protocol: its length, the type (RpcRequest), and the request's number and length.
    spark_rpc = struct.pack(">qbqi", 29, 3, 7, 8) + b"any call"
    answers = [answer(port, message) for port in ports for message in (*py4j, spark_rpc)]
    refused = b"Expected SaslMessage|Authentication error|Unknown command"
    assert all(re.search(refused, each) for each in answers if each), [each[:200] for each in answers]
    assert len([each for each in answers if b"Sasl" in each]) == 2
    assert consumer.stop() == 0


def test_a_password_that_every_user_can_read_is_named_and_not_shown(tmp_path, capsys):
    file = tmp_path / "kafka.properties"
    for properties, mode, is_named in (
        ("sasl.jaas.config=x secret;", 0o644, True),
        ("sasl.jaas.config=x secret;", 0o640, False),
        ("ssl.key.password=secret", 0o604, True),
        ("client.id=secret", 0o644, False),
    ):
        file.write_text(properties)
        file.chmod(mode)
        read_properties(str(file))
        said = capsys.readouterr().err
        assert (
            f"Every user of this machine can read the password in {file}" in said
        ) == is_named and "secret" not in said
