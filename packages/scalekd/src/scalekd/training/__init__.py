"""Data, loop, cache and results of a training run."""
