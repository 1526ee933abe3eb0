"""Kafka: client properties, brokers, the topic, and the topic as the source of a stream."""
