"""Running a stream: the interface of a source, the checks of a start, the checkpoint, the writing of batches, metrics."""
