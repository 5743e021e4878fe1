"""A run that computes: each stage is a Prefect task that reuses its outputs from the store or has them computed.

A reused stage returns Prefect's own `Cached` state.
"""

import functools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from quantlib import temporary
from quantlib.recipe.schema import Recipe
from quantlib.report.rows import StageRow
from quantlib.runtimes import available
from quantlib.runtimes.available import Machine
from quantlib.store.artifacts import Record, Ref
from quantlib.store.journal import Journal
from quantlib.store.local import Store
from quantlib.store.opening import open_store
from tasks.calls import Calls
from tasks.listener import Listener, NullListener
from tasks.stage import Job, Stage, find_inside, key_of
from tasks.tracking import ProgressArtifacts

P = ParamSpec("P")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])
T = TypeVar("T")


class Executor(Protocol):
    """Computes stages."""

    at_once: bool
    """Whether it computes stages that are asked for in several threads."""

    @property
    def machine(self) -> Machine:
        """The machine that files are timed on."""

    def check(self, recipe: Recipe) -> None:
        """Raise an error if a recipe asks for what the machine lacks.

        Raises:
            MachineError: If it does.
        """

    def compute(
        self,
        stage: Stage[..., Any],
        arguments: Mapping[str, Any],
        ingredients: Mapping[str, str],
        job: Job,
        started: Callable[[], None],
        check: Callable[[], None],
    ) -> Any:
        """The stage's outputs, which are then in the job's store.

        Args:
            stage: The stage.
            arguments: Its arguments, by name.
            ingredients: Everything that decides its outputs.
            job: Its store and its progress.
            started: Called when it begins to compute.
            check: Raises an error once the outputs are no longer wanted.
        """

    def close(self) -> None:
        """End what still computes."""


class LocalExecutor:
    """Computes in this process."""

    at_once = False

    @functools.cached_property
    def machine(self) -> Machine:
        """This machine."""
        return available.this_machine()

    def check(self, recipe: Recipe) -> None:
        """Raise an error if a recipe asks for what this machine lacks."""
        available.find_engine(recipe.engine)
        self.machine.find_runtimes(recipe.benchmark.runtimes, recipe.gate.runtimes)

    def compute(
        self,
        stage: Stage[..., Any],
        arguments: Mapping[str, Any],
        ingredients: Mapping[str, str],  # noqa: ARG002 (they were found here)
        job: Job,
        started: Callable[[], None],
        check: Callable[[], None],  # noqa: ARG002 (nothing runs beside it that could fail)
    ) -> Any:
        """The stage's outputs, which are then in the job's store."""
        started()
        _prepare_process(alone=stage.alone)
        return stage.work(job, **arguments)

    def close(self) -> None:
        """Nothing: what it computes is done when `compute` returns."""


@dataclass(frozen=True)
class Maker:
    """The task that made an artifact."""

    ref: Ref
    """Kept alive, so that no other object gets the same id()."""
    state: State[Any]
    """State of the task run; it holds the task run's id."""


@dataclass
class LiveRun:
    """One run of a flow."""

    home: Path
    store: Store
    journal: Journal
    listener: Listener
    executor: Executor = field(default_factory=LocalExecutor)
    prefix: str = ""
    """Put before the labels that users see, where several runs share a flow run."""
    makers: dict[int, Maker] = field(default_factory=dict)
    """The maker of every artifact of this run, by id() of its Ref: two with equal content are two."""

    def __post_init__(self) -> None:
        self._calls: Calls[StageRow] = Calls(at_once=self.executor.at_once)

    @property
    def machine(self) -> Machine:
        """The machine that files are timed on."""
        return self.executor.machine

    @property
    def at_once(self) -> bool:
        """Whether stages that do not depend on each other run at the same time."""
        return self.executor.at_once

    @property
    def stages(self) -> list[StageRow]:
        """The stages met so far, in the order of the flow."""
        return self._calls.notes

    @property
    def run_id(self) -> str:
        """The name of the run."""
        return self.journal.run_id

    @property
    def keys(self) -> list[str]:
        """The keys of the stages met so far."""
        return [row.key for row in self.stages]

    @property
    def models(self) -> Path:
        """The folder for the run's files."""
        return self.home / "models" / self.run_id

    def __call__(self, stage: Stage[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The stage's outputs, reused or computed."""
        self._calls.check()
        arguments = stage.bind(*args, **kwargs)
        work = functools.partial(self.reuse_or_compute, stage, arguments)
        return cast("R", self.call_task(stage.name, stage.label_for(arguments), work, arguments))

    def begin(self, call: Callable[[], T]) -> Callable[[], T]:
        """Begin a call, in a thread if the executor computes stages at once; return what waits for its result."""
        return self._calls.begin(call)

    def once(self, name: str, call: Callable[[], T]) -> T:
        """The result of a call that several branches need; only the first one makes it."""
        return self._calls.once(name, call)

    def end(self) -> None:
        """Stop the calls that were begun, and wait until they have stopped."""
        self._calls.end()

    def known(self, refs: object) -> Store:  # noqa: ARG002 (a run that computes has all of them)
        """The store."""
        return self.store

    def copy_out(self, ref: Ref, name: str) -> None:
        """Copy an artifact to a file among the run's models; the copy outlives the artifact in the store."""
        self.store.copy_out(ref, self.models / name)

    def progress(self, label: str, done: int, total: int) -> None:
        """Report how far the stage with this label is."""
        self.listener.stage_progressed(self.prefix + label, done, total)

    def call_task(self, name: str, label: str, work: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        """Call a function as a Prefect task, with one edge from each task whose artifacts it uses.

        Prefect would look for task results in the arguments, and mistakes one object for another, such as a string
        that two artifacts' names share. So the task has no arguments, and is given the tasks to wait for.

        Args:
            name: Name of the task.
            label: Label of the task run.
            work: The function, with its arguments bound.
            arguments: Its arguments, searched for artifacts.
        """
        found = [self.makers[id(ref)] for ref in find_inside(arguments, Ref) if id(ref) in self.makers]
        states = {maker.state.state_details.task_run_id: maker.state for maker in found}

        def task_function() -> Any:
            return work()

        task_function.__name__ = task_function.__qualname__ = name
        task = Task(
            task_function, name=name, task_run_name=self.prefix + label, persist_result=False, cache_policy=NO_CACHE
        )
        state: State[Any] = task(wait_for=list(states.values()), return_state=True)
        outputs: Any = state.result()
        # Prefect must not look inside the state either: True is the only result that it mistakes for no other.
        ended = state.model_copy(update={"data": True})
        # Distinct objects: two tasks may produce the same content, and an output may be one of the inputs.
        if isinstance(outputs, Ref):
            outputs = replace(outputs)
            self.makers[id(outputs)] = Maker(outputs, ended)
        elif isinstance(outputs, tuple):
            outputs = tuple(replace(ref) for ref in outputs)
            self.makers.update({id(ref): Maker(ref, ended) for ref in outputs})
        return outputs

    def reuse_or_compute(self, stage: Stage[..., Any], arguments: Mapping[str, Any]) -> Any:
        """The stage's work, inside its task: the Refs of its outputs, or a Prefect state if they are reused."""
        label, ingredients = stage.label_for(arguments), stage.ingredients(arguments)
        key = key_of(ingredients)
        started, clock = datetime.now(UTC), time.perf_counter()
        self.journal.stage_started(label, key)
        record, cached = self.store.find_record(key), True
        if record is None:
            with self.store.computing(key, self.run_id):
                # Another run may have computed it while this one waited.
                record = self.store.find_record(key)
                if record is None:
                    begun: list[tuple[datetime, float]] = []

                    def begin() -> None:
                        begun.append((datetime.now(UTC), time.perf_counter()))
                        if len(begun) == 1:
                            self.listener.stage_started(self.prefix + label)

                    job = Job(self.store, functools.partial(self.progress, label))
                    outputs = self.executor.compute(stage, arguments, ingredients, job, begin, self._calls.check)
                    # The wait for the lock, or for a machine, does not count.
                    started, clock = begun[-1]
                    seconds, cached = time.perf_counter() - clock, False
                    refs = outputs if isinstance(outputs, tuple) else (outputs,)
                    made = Record(key, stage.name, ingredients, refs, seconds, started.isoformat())
                    record = self.store.add_record(made)
        if cached:
            seconds = time.perf_counter() - clock
        self._calls.note(StageRow(label, key, cached, seconds, started))
        self.journal.stage_finished(label, key, cached=cached)
        self.listener.stage_finished(self.prefix + label, cached=cached, seconds=seconds)
        outputs = stage.outputs_of(record)
        return Completed(name="Cached", message=f"Reused from {record.created_at}", data=outputs) if cached else outputs


@contextmanager
def start_run(
    flow: str,
    recipe: Recipe,
    flow_run_id: str | None,
    home: Path,
    listener: Listener | None = None,
    run_id: str | None = None,
    prefix: str = "",
    executor: Executor | None = None,
) -> Iterator[LiveRun]:
    """Start a run or resume one.

    First removes the unfinished files that killed runs left.

    Args:
        flow: quantize, ptq or qat.
        recipe: The recipe to run.
        flow_run_id: Prefect's id, if there is one: a flow run that Prefect retries resumes its run.
        home: The home folder.
        listener: Notified of each stage, if given.
        run_id: The run to resume; None: the run of the flow run, or a new one.
        prefix: Put before the labels that users see.
        executor: Computes the stages; None: this process.

    Raises:
        MachineError: If the home shares its store with other machines, and the shared store cannot be used.
    """
    temporary.remove_abandoned(home)
    store = open_store(home)
    journal = Journal(home / "runs" / (run_id or _run_id(home, recipe, flow_run_id)))
    with journal.record(flow, recipe, flow_run_id), store.in_use(journal):
        progress = ProgressArtifacts(listener or NullListener())
        run = LiveRun(home, store, journal, progress, executor or LocalExecutor(), prefix)
        try:
            yield run
        finally:
            run.end()


def _run_id(home: Path, recipe: Recipe, flow_run_id: str | None) -> str:
    named = f"{recipe.name}-{(flow_run_id or str(uuid.uuid4()))[:8]}"
    # A flow run has one run for each of its recipes, and one recipe's name may end with another's.
    retried = next((found.name for found in (home / "runs").glob(f"*-{named}") if found.name[16:] == named), None)
    return retried or f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{named}"


@functools.cache
def _prepare_process(*, alone: bool) -> None:
    """Set up this process for computing; one that only reuses does not need it."""
    from quantlib import helper
    from quantlib.process import prepare_process

    prepare_process()
    if not alone:
        # What computes usually ends in files, which are checked there: it imports torch meanwhile, on another core.
        helper.start()
