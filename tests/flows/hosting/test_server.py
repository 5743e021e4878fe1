"""A run's server: what was reported to it by the time it stops, and what the terminal shows of it."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from functools import partial

import harness
import prefect.client.orchestration
import pytest
import torch
from dashboard_driver import TINY, find_processes, own_environment

from flows.cli import running
from quantlib.errors import MachineError
from quantlib.recipe.schema import parse_recipe
from quantlib.store.journal import read_runs
from tasks.listener import NullListener


@pytest.fixture
def start_run(tmp_path):
    """Starts `quantflow run` of the tiny recipe on tmp_path / "home", in its own session, as a terminal does."""
    (tmp_path / "tiny.toml").write_text(TINY)

    def start(*settings):
        command = [sys.executable, "-m", "flows.cli.commands", "run", "tiny.toml", "--home", "home"]
        for setting in settings:
            command += ["--set", setting]
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=own_environment(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def told_to_prefect(home):
    """(state, log) of the only flow run."""
    with closing(sqlite3.connect(home / "prefect" / "prefect.db")) as database:
        ((state,),) = database.execute("SELECT state_name FROM flow_run")
        return state, "\n".join(message for (message,) in database.execute("SELECT message FROM log"))


def test_a_run_that_fails_says_why_once_and_prefect_has_its_state_and_its_log(start_run, tmp_path):
    torch.save({"no": torch.zeros(1)}, tmp_path / "other.pth")
    process = start_run("model.weights=other.pth")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert len(said.splitlines()) == 1, said
    assert "other.pth" in said
    state, log = told_to_prefect(tmp_path / "home")
    assert state == "Failed"
    assert "Finished in state Failed" in log
    assert "other.pth" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("name", ["server.lock", "dashboard.lock"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_is_left_alone(start_run, tmp_path, name):
    folder = tmp_path / "home" / "prefect"
    folder.mkdir(parents=True)
    (tmp_path / "thesis").write_text("years of work")
    (folder / name).symlink_to(tmp_path / "thesis")
    (folder / "dashboard.json").write_text('{"url": "http://127.0.0.1:1/api"}')
    process = start_run()
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said.splitlines()[0].endswith(
        f"{name} is a symbolic link, where a regular file belongs. Remove it, then run again."
    )
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.usefixtures("ctrl_c_works")
def test_ctrl_c_ends_a_run_with_one_message_and_is_reported_to_prefect(start_run, tmp_path):
    process = start_run("qat.0.epochs=50")
    deadline = time.monotonic() + 200
    while not any(run.num_stages >= 6 for run in read_runs(tmp_path / "home" / "runs")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # Sent to every foreground process, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines() == ["quantflow: Interrupted. Run the same command again: finished stages are kept."]
    state, _ = told_to_prefect(tmp_path / "home")
    assert state == "Crashed"


def test_prefect_finds_its_home_in_a_new_folder(tmp_path):
    code = "import sys; from pathlib import Path; from flows.hosting.server import set_defaults\n"
    code += "set_defaults(Path(sys.argv[1]), verbose=False); import prefect.context"
    command = [sys.executable, "-W", "error:Failed to create", "-c", code, tmp_path / "new" / "prefect"]
    subprocess.run(command, env=own_environment(), check=True)


def servers_of(process):
    return find_processes(process.pid, "flows.hosting.server")


@pytest.mark.timeout(200)
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_outlives_the_death_of_its_server_and_ends_as_its_journal_says(number, start_run, tmp_path):
    process = start_run("qat.0.epochs=20" if number == signal.SIGKILL else "qat.0.epochs=300")
    deadline = time.monotonic() + 100
    while not any(run.num_stages >= 6 for run in read_runs(tmp_path / "home" / "runs")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (server,) = servers_of(process)
    os.kill(server, number)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    (run,) = read_runs(tmp_path / "home" / "runs")
    assert run.state == "completed"
    assert len({line["key"] for line in harness.stage_lines(tmp_path / "home") if line.get("cached") is False}) == len(
        [line for line in harness.stage_lines(tmp_path / "home") if line.get("cached") is False]
    )
    assert "Traceback" not in said
    assert told_to_prefect(tmp_path / "home")[0] == "Completed"


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_starts_is_restarted(start_run, tmp_path):
    process = start_run()
    deadline = time.monotonic() + 100
    while not servers_of(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(servers_of(process)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert told_to_prefect(tmp_path / "home")[0] == "Completed"


@pytest.mark.parametrize("finishes", [True, False])
def test_a_run_that_is_completed_has_its_report_whatever_prefect_raises_then(monkeypatch, tmp_path, finishes):
    report = object()

    def make_flow(_name, _home, _listener, _run_id, finished, *_):
        def flow(_recipe):
            if finishes:
                finished(report)
            raise RuntimeError("told too late")

        return flow

    monkeypatch.setenv("QUANTFLOW_HOME", str(tmp_path))
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(running, "prefect_server", lambda *_, **__: nullcontext())
    monkeypatch.setattr(running, "_reach_server", lambda: None)
    monkeypatch.setattr("flows.hosting.crashes.mark_crashed_runs", lambda _: None)
    monkeypatch.setattr("flows.graphs.run.make_flow", make_flow)
    recipe = parse_recipe(harness.RECIPE)
    run = partial(running.run_here, "quantize", recipe, tmp_path, NullListener(), print)
    if finishes:
        assert run() is report
    else:
        with pytest.raises(RuntimeError, match="told too late"):
            run()


class _AwayAtFirst:
    """A client that reaches its server only at the third attempt."""

    asked = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def raise_for_api_version_mismatch_once(self):
        _AwayAtFirst.asked += 1
        if _AwayAtFirst.asked < 3:
            raise RuntimeError("Failed to reach API at http://127.0.0.1:1/api")


def test_a_server_that_dies_just_before_the_flow_begins_is_waited_for(monkeypatch):
    monkeypatch.setattr(prefect.client.orchestration, "get_client", lambda **_: _AwayAtFirst())
    running._reach_server()
    assert _AwayAtFirst.asked == 3


def test_a_server_that_never_comes_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(running, "_REACH_SECONDS", 0.0)
    monkeypatch.setattr(_AwayAtFirst, "asked", 0)
    monkeypatch.setattr(prefect.client.orchestration, "get_client", lambda **_: _AwayAtFirst())
    with pytest.raises(MachineError, match="Failed to reach API at .*unset PREFECT_API_URL"):
        running._reach_server()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_whose_server_dies_over_and_over_continues_without_it(start_run, tmp_path):
    process = start_run("qat.0.epochs=20")
    deadline = time.monotonic() + 250
    while process.poll() is None:
        assert time.monotonic() < deadline
        if any(run.num_stages >= 4 for run in read_runs(tmp_path / "home" / "runs")):
            for server in servers_of(process):
                os.kill(server, signal.SIGKILL)
        time.sleep(0.2)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert [run.state for run in read_runs(tmp_path / "home" / "runs")] == ["completed"]
    assert len(said.splitlines()) == 1, said
    assert "continues without Prefect's server" in said
