"""Expert parallelism: the experts of a model shared out among processes, on one machine or several."""
