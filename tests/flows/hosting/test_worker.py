"""What the dashboard's worker does differently from Prefect's."""

import asyncio
import signal

from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessWorker, ProcessWorkerResult

from flows.hosting.worker import Worker


def test_the_exit_status_of_a_run_is_not_reported_a_second_time(monkeypatch):
    async def run(worker, flow_run, configuration, task_status=None):
        return ProcessWorkerResult(identifier="1", status_code=-signal.SIGKILL)

    monkeypatch.setattr(ProcessWorker, "run", run)
    result = asyncio.run(Worker(work_pool_name="quantflow").run("run", "configuration"))
    assert result == ProcessWorkerResult(identifier="1", status_code=0)


def test_it_is_the_one_that_prefect_starts_for_a_process_pool():
    assert BaseWorker.get_worker_class_from_type("process") is Worker
