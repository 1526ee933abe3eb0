"""Running a stream: the interface of a source, the checks at startup, the checkpoint, the writing of batches, metrics."""
