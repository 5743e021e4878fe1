"""Whoever is told what a run does."""

from typing import Protocol


class Listener(Protocol):
    """Is told what a run does, as it does it."""

    def stage_started(self, label: str) -> None:
        """A stage is being computed."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """The stage in progress has done so much."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """A stage was computed, or its result reused."""


class NullListener:
    """Tells nobody."""

    def stage_started(self, label: str) -> None:
        """Nothing."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Nothing."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Nothing."""
