"""The run in progress: where its home is, which stages it has met, and who is told."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from quantlib.report import StageRow
from quantlib.store import Store


class Listener(Protocol):
    """Is told what a run does, as it does it."""

    def stage_started(self, label: str) -> None:
        """A stage is being computed."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """The stage in progress has done so much."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """A stage was computed, or its result reused."""


class Silence:
    """Tells nobody."""

    def stage_started(self, label: str) -> None:
        """Nothing."""

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Nothing."""

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Nothing."""


@dataclass
class Run:
    """One run of a flow."""

    run_id: str
    home: Path
    store: Store
    listener: Listener
    stages: list[StageRow] = field(default_factory=list)
    """The stages met so far, in order."""
    _computing: str = ""

    def start_stage(self, label: str) -> None:
        """A stage is computed from now on."""
        self._computing = label
        self.listener.stage_started(label)

    def progress(self, done: int, total: int) -> None:
        """The stage that is computed has done so much."""
        self.listener.stage_progressed(self._computing, done, total)


LISTENER: ContextVar[Listener] = ContextVar("listener")
_RUN: ContextVar[Run] = ContextVar("run")


def home_folder() -> Path:
    """The folder that everything lies under: `$QUANTFLOW_HOME`, else `.quantflow` here."""
    return Path(os.environ.get("QUANTFLOW_HOME", ".quantflow")).expanduser().resolve()


def open_store() -> Store:
    """The store of the home folder."""
    return Store(home_folder() / "store")


@contextmanager
def start_run(run_id: str) -> Iterator[Run]:
    """Make a run the current one inside the block."""
    run = Run(run_id, home_folder(), open_store(), LISTENER.get(Silence()))
    token = _RUN.set(run)
    try:
        yield run
    finally:
        _RUN.reset(token)


def current_run() -> Run:
    """The run that the calling flow or task belongs to.

    Raises:
        RuntimeError: Outside of `start_run`.
    """
    try:
        return _RUN.get()
    except LookupError:
        raise RuntimeError("Stages run inside a flow: call one of flows.quantize, flows.ptq, flows.qat.") from None
