"""Printing the rows of a table: for people, for programs, and live."""
