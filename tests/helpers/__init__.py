"""Helpers shared by several test files: processes, records, files, topics, streams and the oracle."""
