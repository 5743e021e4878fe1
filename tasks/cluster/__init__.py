"""Stages on other machines, through Dask: the driver's side, the worker's side, and what passes between them."""
