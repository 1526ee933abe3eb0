"""Samples of records: judging them by a contract without writing anything, and drafting a contract from them."""
