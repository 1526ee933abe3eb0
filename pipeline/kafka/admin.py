"""kafka-python's admin client, with private APIs.

Without them, each attempt to reach an absent broker would leave a thread behind, and large messages could only be read
by unpacking them.
"""

from typing import Any

from kafka import KafkaAdminClient
from kafka.errors import for_code
from kafka.protocol.consumer.fetch import FetchRequest


class Admin(KafkaAdminClient):  # type: ignore[misc]  # kafka-python has no types
    """kafka-python's admin client, which (3.0.12) leaves a thread and three files open when no broker answers. This one closes them."""

    def __init__(self, **settings: Any):
        try:
            super().__init__(**settings)
        except BaseException:
            if hasattr(self, "_net"):
                self._closed = False
                self.close()
            raise

    def messages(self, leader: int, topic: str, partition: int, offset: int) -> bytes:
        """Returns raw record batches, beginning with the batch that contains `offset`: about 1 MB, or a single larger batch, and part
        of the next. No client exposes them; all clients decompress them (3.0.12).
        """
        part = FetchRequest.FetchTopic.FetchPartition(
            partition=partition,
            current_leader_epoch=-1,
            fetch_offset=offset,
            last_fetched_epoch=-1,
            partition_max_bytes=2**20,
        )
        request = FetchRequest(
            replica_id=-1,
            max_wait_ms=1000,
            min_bytes=1,
            max_bytes=2**20,
            isolation_level=0,
            session_id=0,
            session_epoch=-1,
            topics=[FetchRequest.FetchTopic(topic=topic, partitions=[part])],
            forgotten_topics_data=[],
            rack_id="",
            min_version=4,
            max_version=12,
        )
        response = self._manager.run(self._manager.send, request, leader)
        if response.error_code:
            raise for_code(response.error_code)()
        [[answer]] = [found.partitions for found in response.responses]
        if answer.error_code:
            raise for_code(answer.error_code)()
        return bytes(answer.records or b"")
