"""The Delta tables: their columns and properties, their log, their maintenance, and turns for their writers."""
