"""What a flow works with: something that runs stages, or finds out what running them would do."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from quantlib.runtimes.available import Machine
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.stage import Stage

P = ParamSpec("P")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])
T = TypeVar("T")


class NotYetKnownError(Exception):
    """A plan cannot know the result of a stage that has not run."""


class Run(Protocol):
    """A run of a flow, or a plan of one."""

    @property
    def store(self) -> Store:
        """The store of artifacts and records."""

    @property
    def machine(self) -> Machine:
        """The machine that times the files and runs them: what its CPU and its runtimes are decides about stages."""

    @property
    def keys(self) -> list[str]:
        """The keys of the stages met so far whose outputs exist, in order."""

    @property
    def at_once(self) -> bool:
        """Whether stages that do not depend on each other run at the same time."""

    def __call__(self, stage: Stage[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The stage's outputs for these arguments; in a plan, stand-ins for those that do not exist yet."""

    def begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """Begin a call whose stages may run beside those that follow; return what waits for its result.

        Where stages cannot run at once, the call is made before this returns.
        """

    def once(self, name: str, call: Callable[[], T]) -> T:
        """The result of a call that several branches need; only the first one makes it."""

    def known(self, refs: object) -> Store:
        """The store, if it holds all artifacts in `refs`: the next steps can then depend on their content.

        Raises:
            NotYetKnownError: In a plan, if one of them does not exist yet.
        """

    def copy_out(self, ref: Ref, name: str) -> None:
        """Copy an artifact to a file among the run's models; a plan writes nothing."""


def home_folder() -> Path:
    """The folder that holds everything: `$QUANTFLOW_HOME`, else `.quantflow` in the current folder."""
    return Path(os.environ.get("QUANTFLOW_HOME", ".quantflow")).expanduser().resolve()


def together(run: Run, calls: Iterable[Callable[[], T]]) -> tuple[T, ...]:
    """The results of calls that do not depend on each other, in their order."""
    return tuple(wait() for wait in [run.begin(call) for call in calls])
