"""What a run would do: walks its flow with a planner in place of its stages."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from quantlib.runtimes import available
from quantlib.store.artifacts import Ref
from quantlib.store.local import Store
from tasks.run import NotYetKnownError
from tasks.stage import Stage, find_inside, key_of

P = ParamSpec("P")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])
T = TypeVar("T")


@dataclass(frozen=True)
class Pending:
    """Stands in for an artifact that does not exist yet."""

    label: str
    """Label of the stage that would produce it."""


@dataclass(frozen=True)
class PlannedStage:
    """What a run would do with one stage."""

    label: str
    reused: bool
    reason: str
    """Why it would run; empty if it would be reused."""


class Plan:
    """Stands in for the stages of a flow: finds what can be reused, and why the rest cannot.

    Args:
        store: Only read.
        last_run: Keys of the last run of the same recipe, by label; reasons compare with them.
        finished: Those of the keys whose stage that run finished.
    """

    at_once = False

    def __init__(self, store: Store, last_run: Mapping[str, str], finished: Collection[str]) -> None:
        self.store = store
        self.machine = available.this_machine()
        self._last_run = last_run
        self._finished = finished
        self.stages: list[PlannedStage] = []
        self.keys: list[str] = []
        self._made: dict[str, Any] = {}

    def __call__(self, stage: Stage[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The stage's outputs if they can be reused, else stand-ins for them."""
        return cast("R", self._visit(stage, stage.bind(*args, **kwargs)))

    def begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """Make the call."""
        result = call()
        return lambda: result

    def once(self, name: str, call: Callable[[], T]) -> T:
        """The result of the first call of this name."""
        if name not in self._made:
            self._made[name] = call()
        return cast("T", self._made[name])

    def known(self, refs: object) -> Store:
        """The store.

        Raises:
            NotYetKnownError: If `refs` holds an artifact that does not exist yet.
        """
        if next(find_inside(refs, Pending), None) is not None:
            raise NotYetKnownError
        return self.store

    def copy_out(self, ref: Ref, name: str) -> None:
        """Do nothing: a plan writes no files."""

    def _visit(self, stage: Stage[Any, Any], arguments: Mapping[str, Any]) -> Any:
        label = stage.label_for(arguments)
        awaited = next(find_inside(arguments, Pending), None)
        if awaited is None:
            ingredients = stage.ingredients(arguments)
            record = self.store.find_record(key_of(ingredients))
            if record is not None:
                self.stages.append(PlannedStage(label, reused=True, reason=""))
                self.keys.append(record.key)
                return stage.outputs_of(record)
            reason = self._reason(label, ingredients)
        else:
            reason = f"follows {awaited.label}"
        self.stages.append(PlannedStage(label, reused=False, reason=reason))
        return Pending(label) if stage.num_outputs == 1 else (Pending(label),) * stage.num_outputs

    def _reason(self, label: str, ingredients: Mapping[str, str]) -> str:
        last_key = self._last_run.get(label)
        if last_key is None:
            return "new in this recipe"
        if last_key == key_of(ingredients) and last_key not in self._finished:
            return "the last run did not finish it"
        if last_key == key_of(ingredients):
            return "its record or artifact is missing or damaged"
        before = self.store.read_record(last_key)
        return (
            "the last run's record is gone" if before is None else explain_difference(before.ingredients, ingredients)
        )


def explain_difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Differences between the ingredients of two stages, in the form "qconfig: default -> fbgemm"."""
    changes = [
        _describe(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def _describe(name: str, before: str | None, after: str | None) -> str:
    if name.startswith("code."):
        return f"the code of {name.removeprefix('code.')} changed"
    if name.startswith("library."):
        return f"{name.removeprefix('library.')} {before} -> {after}"
    if _is_hash(before) or _is_hash(after):
        return f"{name} changed"
    return f"{name}: {_plain(before)} -> {_plain(after)}"


def _is_hash(text: str | None) -> bool:
    return text is not None and len(text.strip('"')) == 64


def _plain(text: str | None) -> str:
    return "none" if text is None else str(json.loads(text))
