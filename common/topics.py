"""The Kafka topic from a script's point of view: is there a broker, is there the topic, and what to do if not."""

import argparse
import re
import time

from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from common.console import PipelineError, at_least, say

TOPIC = "sensor_data"
PARTITIONS = 3


def add_topic_options(parser: argparse.ArgumentParser) -> None:
    """The options --bootstrap-servers, --topic and --wait."""
    parser.add_argument("--bootstrap-servers", default="localhost:9092", metavar="HOST:PORT,…", help="Kafka's brokers")
    parser.add_argument("--topic", default=TOPIC, help="Kafka topic")
    parser.add_argument("--wait", type=at_least(0, float), default=30, metavar="SECONDS",
                        help="how long to wait for a broker or a topic that is not there yet")


def wait_for_topic(servers: str, topic: str, seconds: float, create: bool = False) -> None:
    """Returns once the topic is there; `create` makes it where it is missing.

    Raises PipelineError where no broker answers, or there is no topic, for so many seconds.
    """
    deadline = time.monotonic() + seconds
    said = None
    while problem := _problem(servers, topic, create):
        if time.monotonic() >= deadline:
            raise PipelineError(problem)
        if problem != said:
            say(f"{problem} Waiting up to {seconds:g} s for it …")
            said = problem
        time.sleep(0.5)


def _problem(servers: str, topic: str, create: bool) -> str | None:
    try:
        with KafkaAdminClient(bootstrap_servers=servers.split(","), bootstrap_timeout_ms=3000) as admin:
            if topic in admin.list_topics():
                return None
            if create:
                admin.create_topics({topic: {"num_partitions": PARTITIONS, "replication_factor": 1}},
                                    wait_for_metadata=True)
                say(f'Created the topic "{topic}" with {PARTITIONS} partitions.')
                return None
    except TopicAlreadyExistsError:  # another script was quicker
        return None
    except (KafkaError, OSError) as error:
        return (f"No Kafka broker answers on {servers} ({type(error).__name__}). Start one: docker compose up -d, "
                f"or python3 local_kafka.py.")
    return (f'No topic "{topic}" on {servers}. Create it: python3 kafka_producer.py --create-topic, or '
            f"kafka-python admin -b {servers} topics create -t {topic} --num-partitions {PARTITIONS} "
            f"--replication-factor 1.")


def explain_kafka_error(message: str, options: argparse.Namespace) -> str | None:
    """What to do about an error of Spark's Kafka source; None for one that is not known here."""
    topic = f'the topic "{options.topic}" on {options.bootstrap_servers}'
    if "may have been lost" in message:
        reason = re.search(r"Reason: (.*?)\.?$", message, re.MULTILINE)
        return (f"Kafka no longer has records of {topic} that were not read yet"
                f"{f' ({reason[1]})' if reason else ''}: its retention removed them, or the topic was deleted and made "
                f"again. Nothing was skipped. To go on with what the topic has now, give a new --table and --checkpoint.")
    if "UNKNOWN_TOPIC" in message or "UnknownTopic" in message or "does not host this topic" in message:
        return (f"{topic[0].upper()}{topic[1:]} is gone, with what was not read yet. Create it again and give a new --table "
                f"and --checkpoint.")
    if re.search(r"[Tt]imed out|[Tt]imeout|[Dd]isconnect", message):
        return (f"Kafka on {options.bootstrap_servers} does not answer any more. Start it again, then this script: it goes "
                f"on from the last committed offsets.")
    return None
