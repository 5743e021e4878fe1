"""The run in progress: where its home is, which stages it has met, and who is told."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from quantlib import temporary
from quantlib.recipe.schema import Recipe
from quantlib.report.tables import Report, StageRow
from quantlib.store.artifacts import Ref
from quantlib.store.journal import Journal
from quantlib.store.local import Store
from tasks.listener import Listener, NullListener
from tasks.tracking import ProgressArtifacts


@dataclass(frozen=True)
class Maker:
    """The task that made an artifact."""

    ref: Ref
    """Kept, so that no other object gets its identity."""
    state: State[Any]
    """Of the task run, which it names."""


@dataclass
class Run:
    """One run of a flow."""

    home: Path
    store: Store
    journal: Journal
    listener: Listener
    stages: list[StageRow] = field(default_factory=list)
    """The stages met so far, in order."""
    makers: dict[int, Maker] = field(default_factory=dict)
    """Of every artifact that a stage of this run gave, by its Ref's identity: two of equal content are two."""

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.journal.run_id

    @contextmanager
    def computing(self, label: str) -> Iterator[None]:
        """Inside the block `progress` is of the stage `label`."""
        token = _LABEL.set(label)
        try:
            yield
        finally:
            _LABEL.reset(token)

    def progress(self, done: int, total: int) -> None:
        """The stage that is computed has done so much."""
        self.listener.stage_progressed(_LABEL.get(), done, total)


LISTENER: ContextVar[Listener] = ContextVar("listener")
RUN_ID: ContextVar[str | None] = ContextVar("run_id", default=None)
"""Set to go on with a run."""
FINISHED: ContextVar[list[Report]] = ContextVar("finished")
"""Takes the report of a run that is completed, whatever becomes of the flow run then."""
_RUN: ContextVar[Run] = ContextVar("run")
_LABEL: ContextVar[str] = ContextVar("label", default="")


def home_folder() -> Path:
    """The folder that everything lies under: `$QUANTFLOW_HOME`, else `.quantflow` here."""
    return Path(os.environ.get("QUANTFLOW_HOME", ".quantflow")).expanduser().resolve()


def open_store() -> Store:
    """The store of the home folder."""
    return Store(home_folder() / "store")


@contextmanager
def start_run(flow: str, recipe: Recipe, flow_run_id: str | None) -> Iterator[Run]:
    """Begin a run, or go on with the one that RUN_ID or Prefect's flow run names, and make it the current one.

    What runs that were killed left half-made is removed first.

    Args:
        flow: quantize, ptq or qat.
        recipe: What is run.
        flow_run_id: Prefect's, where there is one: a flow run that Prefect retries goes on with its run.
    """
    home, store = home_folder(), open_store()
    temporary.remove_abandoned(home)
    journal = Journal(home / "runs" / (RUN_ID.get() or _run_id(home, recipe, flow_run_id)))
    run = Run(home, store, journal, ProgressArtifacts(LISTENER.get(NullListener())))
    with store.in_use(), journal.record(flow, recipe, flow_run_id):
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


def _run_id(home: Path, recipe: Recipe, flow_run_id: str | None) -> str:
    identity = (flow_run_id or str(uuid.uuid4()))[:8]
    retried = next((home / "runs").glob(f"*-{identity}"), None)
    return retried.name if retried else f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{recipe.name}-{identity}"
