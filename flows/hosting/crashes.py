"""Reports runs that died to Prefect, which would show them as Running for ever."""

from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from quantlib.store.journal import RunStatus, read_runs


def mark_crashed_runs(home: Path) -> list[RunStatus]:
    """Set every run whose process is gone to Crashed in Prefect, whoever started it.

    Returns:
        The runs that died, newest first.
    """
    crashed = [run for run in read_runs(home / "runs") if run.state == "crashed"]
    if crashed:
        with get_client(sync_client=True) as client:
            for run in crashed:
                if run.file.flow_run_id is None:
                    continue
                identity = UUID(run.file.flow_run_id)
                try:
                    state = client.read_flow_run(identity).state
                except ObjectNotFound:
                    continue  # It ran on another server, or on one that kept no history.
                # A scheduled run waits for a retry, in a process that does not exist yet.
                if state is None or state.type in {StateType.RUNNING, StateType.CANCELLING}:
                    died: State[None] = Crashed(
                        message=f"The process of run {run.file.run_id} is gone: continue it with `quantflow resume`."
                    )
                    client.set_flow_run_state(identity, died, force=True)
    return crashed
