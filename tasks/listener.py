"""Listeners to the progress of a run."""

from typing import Protocol


class Listener(Protocol):
    """Notified of each step of a run."""

    def stage_started(self, label: str) -> None:
        """A stage has started to compute."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """A stage has done `done` of `total` steps."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """A stage was computed, or its result reused."""


class NullListener:
    """Does nothing."""

    def stage_started(self, label: str) -> None:
        """Nothing."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Nothing."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Nothing."""
