"""Marks runs that Prefect thinks are alive although their process is gone, so that they can be retried.

Prefect's own solution is an automation on heartbeats, which needs a minute and a half at least and mistakes a busy
machine for a dead one. Here server and runs share a machine: the lock that a run's process holds, and the process
itself, say for certain. A server for many machines needs the automation; see automations.yaml.
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
# The worker reports a run that died to Prefect itself, a moment later. If the run was marked and retried before that,
# the worker would set it to Crashed a second time.
_WORKER_TELLS_SECONDS = 10.0
_TASKS_ARRIVE = timedelta(seconds=30)
_UNFINISHED = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


class Reconciler:
    """Looks for dead runs, again and again.

    Args:
        client: Client of the server.
        home: quantflow's home folder.
        pool: The work pool whose workers run on this machine.
    """

    def __init__(self, client: SyncPrefectClient, home: Path, pool: str) -> None:
        self._client = client
        self._home = home
        self._pool = pool
        self._missing_since: dict[object, float] = {}

    def mark_dead(self, patience: float = _PATIENCE_SECONDS) -> list[FlowRun]:
        """Set every run whose process is gone to Crashed, or to Cancelled if that was requested.

        Args:
            patience: Seconds that a run may be without a known process: one that is starting has none yet.

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
        states = self._states(run)
        if states:
            if "running" in states:
                self._missing_since[run.id] = time.monotonic()
                return False
            if "crashed" in states:
                return self._seconds_missing(run) >= min(patience, _WORKER_TELLS_SECONDS)
            # A finished run reports to Prefect itself, unless it dies while doing so.
            return self._is_missing(run, patience)
        if run.work_pool_name != self._pool:
            return False  # Not ours: we know nothing about it.
        return self._is_missing(run, patience)

    def _is_missing(self, run: FlowRun, patience: float) -> bool:
        if run.infrastructure_pid and is_alive(int(run.infrastructure_pid)):
            self._missing_since[run.id] = time.monotonic()
        return self._seconds_missing(run) >= patience

    def _seconds_missing(self, run: FlowRun) -> float:
        return time.monotonic() - self._missing_since[run.id]

    def _states(self, run: FlowRun) -> set[str | None]:
        """The states of this attempt of a run, one per recipe; a retry that has not written a journal yet has none."""
        if run.state is None:
            return set()
        attempts = map(_Attempt, (self._home / "runs").glob(f"*-{str(run.id)[:8]}"))
        return {attempt.state() for attempt in attempts if attempt.began_after(run.state)}

    def _mark(self, run: FlowRun) -> None:
        assert run.state is not None
        cancelled = run.state.type == StateType.CANCELLING
        message = "The run's process is gone. Retry resumes it from its finished stages."
        state: State[None] = Cancelled() if cancelled else Crashed(message=message)
        self._client.set_flow_run_state(run.id, state, force=True)

    def _mark_tasks(self) -> None:
        """Set tasks that are still Running although their run has ended to Crashed."""
        # The last states of a run's tasks arrive some seconds after the run's own.
        ended = FlowRunFilter(end_time=FlowRunFilterEndTime(before_=datetime.now(UTC) - _TASKS_ARRIVE))
        left = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_UNFINISHED)))
        for task_run in self._client.read_task_runs(flow_run_filter=ended, task_run_filter=left):
            died: State[None] = Crashed(message="The process of its run is gone.")
            self._client.set_task_run_state(task_run.id, died, force=True)


class _Attempt:
    """The newest attempt of a run, according to its journal."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def state(self) -> str | None:
        status = Journal(self._folder).status()
        return status.state if status is not None else None

    def began_after(self, state: State[object]) -> bool:
        """Whether this attempt's process wrote its journal during or after a Prefect state."""
        try:
            written = datetime.fromtimestamp((self._folder / "run.json").stat().st_mtime, UTC)
        except FileNotFoundError:
            return False
        return state.timestamp is not None and written >= state.timestamp
