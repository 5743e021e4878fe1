"""A run whose process was killed is reported to Prefect, which would show it as Running forever."""

import os
import subprocess
import sys

import harness
import httpx

from quantlib.store.journal import read_runs

MARK = """
import sys
from pathlib import Path
from flows.hosting.crashes import mark_crashed_runs
mark_crashed_runs(Path(sys.argv[1]))
"""


def state_in_prefect(flow_run):
    answer = httpx.get(f"{os.environ['PREFECT_API_URL']}/flow_runs/{flow_run}")
    return answer.json()["state"]["type"]


def test_a_killed_run_is_running_to_prefect_until_it_is_marked_crashed(undisturbed, tmp_path):
    home = tmp_path / "home"
    assert harness.run(home, kill_at=40).exitcode == -9
    killed = read_runs(home / "runs")[0]
    assert killed.state == "crashed"
    assert state_in_prefect(killed.file.flow_run_id) == "RUNNING"
    subprocess.run([sys.executable, "-c", MARK, home], check=True)
    assert state_in_prefect(killed.file.flow_run_id) == "CRASHED"
    assert harness.run(home, run_id=killed.file.run_id).error == ""
    assert read_runs(home / "runs")[0].state == "completed"
