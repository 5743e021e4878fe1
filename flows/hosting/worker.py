"""Prefect's worker, in a process that ends with its parent."""

import runpy
import sys
import tempfile
import warnings
from typing import Any

from prefect.workers.process import ProcessWorker, ProcessWorkerResult

from flows.hosting.processes import end_with_parent
from quantlib import temporary

with warnings.catch_warnings():
    # It replaces Prefect's own for `prefect worker start` below, and Prefect warns about that.
    warnings.filterwarnings("ignore", "Type 'Worker' .* has key 'process'", UserWarning)

    class Worker(ProcessWorker):
        """Reports a process that died to Prefect once.

        Prefect's own worker reports when the process ends, and again from the exit status, seconds later on a busy
        machine: a run that was retried in between was set to Crashed again.
        """

        async def run(self, *arguments: Any, **options: Any) -> ProcessWorkerResult:
            """Run a flow run's process to its end; do not report its exit status."""
            result = await super().run(*arguments, **options)
            return result.model_copy(update={"status_code": 0})


if __name__ == "__main__":
    end_with_parent()
    sys.argv = ["prefect", "worker", "start", *sys.argv[1:]]
    # Prefect writes a run's whole environment there, passwords too. The next run removes what a killed worker leaves.
    with temporary.new_folder() as folder:
        tempfile.tempdir = str(folder)
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)
