"""Sweeps: a matrix of checkpoints, sizes, precisions, plugins and targets, as a task graph on Dask.

The package itself imports nothing, so that a worker on a device loads only what its tasks need.
"""
