"""What a flow works with: something that runs stages, or finds out what running them would do."""

from typing import ParamSpec, Protocol, TypeVar

from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.stage import Stage

P = ParamSpec("P")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])


class NotYetKnownError(Exception):
    """A plan cannot know the result of a stage that has not run."""


class Run(Protocol):
    """A run of a flow, or a plan of one."""

    @property
    def store(self) -> Store:
        """The store of artifacts and records."""

    @property
    def keys(self) -> list[str]:
        """The keys of the stages met so far whose outputs exist, in order."""

    def __call__(self, stage: Stage[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The stage's outputs for these arguments; in a plan, stand-ins for those that do not exist yet."""

    def known(self, refs: object) -> Store:
        """The store, if it holds all artifacts in `refs`: the next steps can then depend on their content.

        Raises:
            NotYetKnownError: In a plan, if one of them does not exist yet.
        """

    def copy_out(self, ref: Ref, name: str) -> None:
        """Copy an artifact to a file among the run's models; a plan writes nothing."""
