"""Prefect tasks: each loads its inputs, calls quantlib, and stores the result."""
