"""Prefect's server, worker and dashboard, as quantflow hosts them on one machine."""
