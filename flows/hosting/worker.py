"""Prefect's worker, as a process that ends with the one that started it."""

import runpy
import sys
import tempfile
import warnings
from typing import Any

from prefect.workers.process import ProcessWorker, ProcessWorkerResult

from flows.hosting.processes import end_with_parent
from quantlib import temporary

with warnings.catch_warnings():
    # It takes the place of Prefect's own, for `prefect worker start` below: Prefect warns of that.
    warnings.filterwarnings("ignore", "Type 'Worker' .* has key 'process'", UserWarning)

    class Worker(ProcessWorker):
        """Tells Prefect once of a process that died.

        Prefect's own tells it where the process ended, and again from the exit status, seconds later on a busy
        machine: a run that was retried between the two was Crashed once more.
        """

        async def run(self, *arguments: Any, **options: Any) -> ProcessWorkerResult:
            """Run a flow run's process to its end; its exit status is told to nobody else."""
            result = await super().run(*arguments, **options)
            return result.model_copy(update={"status_code": 0})


if __name__ == "__main__":
    end_with_parent()
    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    # Prefect notes a run's whole environment there, passwords too: what a killed worker leaves, the next run removes.
    with temporary.new_folder() as folder:
        tempfile.tempdir = str(folder)
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)
