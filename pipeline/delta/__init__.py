"""The Delta tables: columns, properties, log, maintenance, and the locks that make writers take turns."""
