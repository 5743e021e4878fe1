"""Runs that Prefect takes for alive and whose process is gone: marked, so that they can be retried.

Prefect's own way is an automation on heartbeats, which needs a minute and a half at least and takes a busy machine
for a dead one. Here server and runs share a machine: the lock that a run's process holds, and the process itself,
say for certain. A server for many machines needs the automation; see automations.yaml.
"""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Crashed

from flows.hosting.processes import is_alive
from quantlib.store.journal import Journal

_PATIENCE_SECONDS = 45.0
# The worker of a run that died tells Prefect so itself, a moment later. One that was marked and retried before that
# would be Crashed a second time by it.
_WORKER_TELLS_SECONDS = 10.0
_TASKS_ARRIVE = timedelta(seconds=30)
_UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


class Reconciler:
    """Looks for dead runs, again and again.

    Args:
        client: Of the server.
        home: quantflow's home folder.
        pool: The work pool whose workers run on this machine.
    """

    def __init__(self, client: SyncPrefectClient, home: Path, pool: str) -> None:
        self._client = client
        self._home = home
        self._pool = pool
        self._missing_since: dict[object, float] = {}

    def mark_dead(self, patience: float = _PATIENCE_SECONDS) -> list[FlowRun]:
        """Set every run whose process is gone to Crashed, or to Cancelled where that was asked for.

        Args:
            patience: Seconds for which a run may have no process that is known: one that is being started has none.

        Returns:
            The runs that were marked.
        """
        unfinished = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED)))
        runs = self._client.read_flow_runs(flow_run_filter=unfinished)
        self._missing_since = {run.id: self._missing_since.get(run.id, time.monotonic()) for run in runs}
        dead = [run for run in runs if self._is_dead(run, patience)]
        for run in dead:
            self._mark(run)
        self._mark_tasks()
        return dead

    def _is_dead(self, run: FlowRun, patience: float) -> bool:
        journal = self._journal(run)
        if journal is not None:
            state = journal.state()
            if state == "running":
                self._missing_since[run.id] = time.monotonic()
                return False
            if state == "crashed":
                return self._seconds_missing(run) >= min(patience, _WORKER_TELLS_SECONDS)
            # One that has finished tells Prefect so itself, unless it dies over it.
            return self._is_missing(run, patience)
        if run.work_pool_name != self._pool:
            return False  # Not ours: nothing is known about it.
        return self._is_missing(run, patience)

    def _is_missing(self, run: FlowRun, patience: float) -> bool:
        if run.infrastructure_pid and is_alive(int(run.infrastructure_pid)):
            self._missing_since[run.id] = time.monotonic()
        return self._seconds_missing(run) >= patience

    def _seconds_missing(self, run: FlowRun) -> float:
        return time.monotonic() - self._missing_since[run.id]

    def _journal(self, run: FlowRun) -> "_Attempt | None":
        """The journal of this attempt of a run: a retry that has not come so far yet has none."""
        folder = next((self._home / "runs").glob(f"*-{str(run.id)[:8]}"), None)
        if folder is None or run.state is None:
            return None
        attempt = _Attempt(folder)
        return attempt if attempt.began_after(run.state) else None

    def _mark(self, run: FlowRun) -> None:
        assert run.state is not None
        cancelled = run.state.type == StateType.CANCELLING
        message = "The run's process is gone. Retry goes on from its finished stages."
        state: State[None] = Cancelled() if cancelled else Crashed(message=message)
        self._client.set_flow_run_state(run.id, state, force=True)

    def _mark_tasks(self) -> None:
        """Set the tasks that ended runs have left behind as running to Crashed."""
        # The last states of a run's tasks arrive some seconds after its own.
        ended = FlowRunFilter(end_time=FlowRunFilterEndTime(before_=datetime.now(UTC) - _TASKS_ARRIVE))
        left = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED)))
        for task_run in self._client.read_task_runs(flow_run_filter=ended, task_run_filter=left):
            died: State[None] = Crashed(message="The process of its run is gone.")
            self._client.set_task_run_state(task_run.id, died, force=True)


class _Attempt:
    """The newest attempt of a run, as its journal has it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def state(self) -> str | None:
        status = Journal(self._folder).status()
        return status.state if status is not None else None

    def began_after(self, state: State[object]) -> bool:
        """Whether this attempt's process wrote its journal in or after a state of Prefect's."""
        try:
            written = datetime.fromtimestamp((self._folder / "run.json").stat().st_mtime, UTC)
        except FileNotFoundError:
            return False
        return state.timestamp is not None and written >= state.timestamp
