"""All that makes a task a stage: its key, its lock, and the reuse of what was computed under that key.

Prefect's own result cache is not used: its records are pickled or unverified, are not written atomically, and do
not say what their key was made of. A stage that is reused returns Prefect's own `Cached` state.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from filelock import FileLock
from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import BaseModel

from quantlib.report.tables import StageRow
from quantlib.store import codehash
from quantlib.store.artifacts import Record, Ref
from quantlib.store.local import Store
from tasks.run import Maker, current_run
from tasks.side_by_side import beside, in_turn, is_stopped

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])

# They name a task run, or say how to compute and not what.
_NOT_IN_KEY = {"branch"}
_LIBRARIES = ("torch", "torchvision", "pillow")
_PARSING = threading.Lock()


class Planner(Protocol):
    """Stands in for the stages, to find out what a run would do."""

    store: Store
    """Where it looks for what was made before."""
    keys: list[str]
    """Of the stages that it has found there."""

    def visit(self, stage: "Stage[Any, Any]", arguments: Mapping[str, Any]) -> Any:
        """What the stage would give for these arguments, or a stand-in for it."""


_ARGUMENTS: ContextVar[Mapping[str, Any]] = ContextVar("arguments")
"""Of the stage that is called, for its task."""
PLANNER: ContextVar[Planner | None] = ContextVar("planner", default=None)


class Stage(Task[P, R], Generic[P, R]):
    """A Prefect task whose outputs are kept in the store under a key of everything that decides them.

    The code behind a key is what the stage's function imports from quantlib in its own body, and what those
    modules import. So a stage imports what computes, there; and what is imported at the top of its file must not
    compute.
    """

    def __init__(self, work: Callable[P, R], label: str, *, aside: bool) -> None:
        self.work = work
        self.label = label
        self._aside = aside
        self._signature = inspect.signature(work)
        self.num_outputs = len(getattr(self._signature.return_annotation, "__args__", (Ref,)))
        super().__init__(
            fn=self._task_function(),  # type: ignore[arg-type]
            name=work.__name__,
            task_run_name=lambda: self.label_for(_ARGUMENTS.get()),
            persist_result=False,
            cache_policy=NO_CACHE,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:  # type: ignore[override]
        """Run inside a flow; the outputs' Refs."""
        planner, arguments = PLANNER.get(), self.bind(*args, **kwargs)
        if planner is not None:
            return cast("R", planner.visit(self, arguments))
        token = _ARGUMENTS.set(arguments)
        try:
            return call_with_edges(super().__call__, arguments)
        finally:
            _ARGUMENTS.reset(token)

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def label_for(self, arguments: Mapping[str, Any]) -> str:
        """The task run's name, as `calibrate-per_channel`."""
        return self.label.format(**arguments)

    def ingredients(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Everything that decides the outputs, by name: inputs, recipe fields, code, libraries."""
        found = {"stage": self.name, **self._code()}
        for library in _LIBRARIES:
            found[f"library.{library}"] = importlib.metadata.version(library)
        for name, value in arguments.items():
            if name not in _NOT_IN_KEY:
                found.update(_flatten(name, value))
        return found

    def outputs_of(self, record: Record) -> R:
        """A record's outputs in the shape that the stage returns."""
        outputs = record.outputs if self.num_outputs > 1 else record.outputs[0]
        return cast("R", outputs)

    def _code(self) -> dict[str, str]:
        # Python 3.11 miscounts where two threads parse at once, and fails (python/cpython issue 106905).
        with _PARSING:
            try:
                return self._hash_code()
            except SystemError:  # A library has parsed meanwhile, which this lock does not keep from it.
                return self._hash_code()

    @functools.cache  # noqa: B019 (stages live as long as the process)
    def _hash_code(self) -> dict[str, str]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.work)))
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        modules = {name for name in codehash.imported_modules(function) if name.startswith("quantlib")}
        function.decorator_list = []  # Names and labels decide nothing.
        found = {f"code.{self.name}": codehash.hash_tree(tree)}
        for module in modules:
            try:
                hashes = codehash.module_hashes(module)
            except ModuleNotFoundError:
                continue  # `from quantlib.store import Ref` names a class, not a module.
            found.update({f"code.{name}": sha256 for name, sha256 in hashes.items()})
        return found

    def _task_function(self) -> Callable[[], Any]:
        """What Prefect calls: without arguments, for it draws each edge as often as the task before has of them."""

        def task_function() -> Any:
            return self.reuse_or_compute(**_ARGUMENTS.get())  # type: ignore[call-arg]

        functools.update_wrapper(task_function, self.work)
        del task_function.__wrapped__  # type: ignore[attr-defined]  # Prefect would ask for its arguments.
        return task_function

    def reuse_or_compute(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The stage's work, inside its task: the outputs' Refs, or Prefect's state where they are reused."""
        run = current_run()
        arguments = self.bind(*args, **kwargs)
        label, ingredients = self.label_for(arguments), self.ingredients(arguments)
        key = key_of(ingredients)
        started, clock = datetime.now(UTC), time.perf_counter()

        def compute() -> tuple[R, datetime, float]:
            run.listener.stage_started(label)
            _prepare_process()
            # The wait for its turn is no part of it.
            started, clock = datetime.now(UTC), time.perf_counter()
            with run.computing(label):
                outputs = self.work(*args, **kwargs)
            return outputs, started, time.perf_counter() - clock

        # Whoever comes second waits, then finds the record. The kernel frees the lock of a process that died.
        run.journal.stage_started(label, key)
        with FileLock(run.store.lock_file(key)).acquire(cancel_check=is_stopped):
            record = run.store.find_record(key)
            if record is None:
                outputs, started, seconds = beside(compute) if self._aside else in_turn(compute)
                refs = outputs if isinstance(outputs, tuple) else (outputs,)
                run.store.add_record(Record(key, self.name, ingredients, refs, seconds, started.isoformat()))
            else:
                seconds = time.perf_counter() - clock
        run.stages.append(StageRow(label, key, record is not None, seconds, started))
        run.journal.stage_finished(label, key, cached=record is not None)
        run.listener.stage_finished(label, cached=record is not None, seconds=seconds)
        if record is None:
            return outputs
        return Completed(name="Cached", message=f"Reused from {record.created_at}", data=self.outputs_of(record))


def call_with_edges(call: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a task so that Prefect shows an edge from each task whose artifacts it is given, once, and no other.

    Prefect would look for results of tasks in the arguments, and takes one object for another: of an artifact's name
    every string that two share. So it is told which tasks these are, and does not look.

    Args:
        call: The task, with its arguments.
        arguments: What it is given, for what is in it.
    """
    makers = current_run().makers
    found = [makers[id(ref)] for ref in find_inside(arguments, Ref) if id(ref) in makers]
    states = {maker.state.state_details.task_run_id: maker.state for maker in found}
    state = call(wait_for=list(states.values()), return_state=True)
    outputs = state.result()
    # Nor is it to look inside the state: True is the one result that Prefect takes for no other.
    ended = state.model_copy(update={"data": True})
    # Objects of their own: the same content may come from two tasks, and an output may be one of the inputs.
    if isinstance(outputs, Ref):
        outputs = replace(outputs)
        makers[id(outputs)] = Maker(outputs, ended)
    elif isinstance(outputs, tuple):
        outputs = tuple(replace(ref) for ref in outputs)
        makers.update({id(ref): Maker(ref, ended) for ref in outputs})
    return outputs


def find_inside(value: Any, kind: type[T]) -> Iterator[T]:
    """Every object of a type inside a value: in mappings, sequences and dataclasses."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        yield from find_inside(list(value.values()), kind)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from find_inside(part, kind)
    elif dataclasses.is_dataclass(value):
        yield from find_inside([getattr(value, field.name) for field in dataclasses.fields(value)], kind)


def stage(label: str, *, aside: bool = False) -> Callable[[Callable[P, R]], Stage[P, R]]:
    """Make a function a stage.

    Args:
        label: Names its task runs; may hold the function's arguments, as "calibrate-{branch}".
        aside: Whether it leaves its work to `side_by_side.aside`, and needs no turn of its own.
    """
    return lambda work: Stage(work, label, aside=aside)


def key_of(ingredients: Mapping[str, str]) -> str:
    """The key that a stage's outputs are kept under, in hex."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@functools.cache
def _prepare_process() -> None:
    """Not done by a process that only reuses: it imports torch."""
    from quantlib.process import prepare_process

    prepare_process()


def _flatten(name: str, value: Any) -> dict[str, str]:
    """A value by dotted names, down to what JSON can write."""
    if isinstance(value, Ref):
        return {name: value.sha256}
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.metadata.get("in_key", True)}
    if isinstance(value, Mapping):
        return {k: v for field, part in value.items() for k, v in _flatten(f"{name}.{field}", part).items()}
    if isinstance(value, tuple | list):
        return {k: v for place, part in enumerate(value) for k, v in _flatten(f"{name}.{place}", part).items()}
    return {name: json.dumps(value)}
