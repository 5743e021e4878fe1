"""What a flow is given: something that runs stages, or that finds out what running them would do."""

from typing import ParamSpec, Protocol, TypeVar

from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.stage import Stage

P = ParamSpec("P")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])


class NotYetKnownError(Exception):
    """A run that is only planned cannot say what a stage would find."""


class Run(Protocol):
    """A run of a flow, or a plan of one."""

    @property
    def store(self) -> Store:
        """Holds the artifacts and records of stages."""

    @property
    def keys(self) -> list[str]:
        """The keys of the stages met so far whose outputs are there, in order."""

    def __call__(self, stage: Stage[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The stage's outputs for these arguments; in a plan, stand-ins where they are not made yet."""

    def known(self, refs: object) -> Store:
        """The store, where it holds all artifacts of a value: what comes next can depend on what they say.

        Raises:
            NotYetKnownError: Where the run is only planned, and one of them is still to be made.
        """

    def copy_out(self, ref: Ref, name: str) -> None:
        """Give an artifact a file of its own among the run's models; a plan writes nothing."""
