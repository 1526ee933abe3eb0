"""JSON files: reading them whole, and the folder as the source of a stream."""
