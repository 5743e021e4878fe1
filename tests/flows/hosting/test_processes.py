"""Processes that a command starts: they end with it, show that they are alive, and their logs are read."""

import os
import signal
import subprocess
import sys
import time

import pytest

from flows.hosting.processes import Child, Pulse, RepeatedErrors, is_alive
from quantlib.errors import MachineError

LATE = """
import time
time.sleep({})
from flows.hosting.processes import end_with_parent
end_with_parent()
time.sleep(600)
"""
PARENT = """
import os, pathlib, sys, time
from flows.hosting.processes import Child
child = Child("late", [sys.executable, "-c", sys.argv[1]], dict(os.environ), pathlib.Path("late.log"))
print(child.process.pid, flush=True)
time.sleep(float(sys.argv[2]))
os._exit(0)
"""


@pytest.mark.parametrize(("begins", "dies"), [(0, 2), (2, 0)], ids=["while it looks", "before it looks"])
def test_a_child_ends_with_its_parent_whenever_that_dies(tmp_path, begins, dies):
    command = [sys.executable, "-c", PARENT, LATE.format(begins), str(dies)]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 30
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_child_that_ends_is_restarted_but_not_forever(tmp_path):
    child = Child("late", [sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), tmp_path / "log")
    assert not child.watch()
    pids = [child.process.pid]
    for _ in range(4):
        kill(child)
        assert child.watch()
        pids.append(child.process.pid)
    assert len(set(pids)) == 5
    kill(child)
    with pytest.raises(MachineError, match="late keeps exiting"):
        child.watch()


def kill(child):
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.wait()


def test_a_pulse_is_asked_for_when_half_of_the_time_has_passed(monkeypatch):
    now, asked, lives = [0.0], [], [True]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = Pulse(lambda: asked.append(now[0]) or lives[0], 10)
    silent = []
    for second in range(1, 30):
        now[0] = float(second)
        lives[0] = second < 12
        silent.append(pulse.is_silent())
    assert asked[:2] == [6.0, 12.0]  # Time counts from the last answer.
    assert silent.index(True) + 1 == 17


def test_an_error_that_a_log_repeats_is_found_once(tmp_path):
    log = tmp_path / "worker.log"
    log.write_text("pkg.HTTPError: of yesterday\n" * 5)
    errors = RepeatedErrors(log)
    assert errors.news() == []
    with log.open("a") as file:
        file.write("pkg.HTTPError: 500 for http://127.0.0.1:4200/api\nWorker started\nWorker started\n")
        file.flush()
        assert errors.news() == []
        file.write("  File x, line 3\npkg.HTTPError: 500 for http://127.0.0.1:4201/a")
        file.flush()
        assert errors.news() == []  # The line is not complete yet.
        file.write("pi\n")
        file.flush()
        assert errors.news() == ["pkg.HTTPError: 500 for http://127.0.0.1:4201/api"]
        file.write("pkg.HTTPError: 500 for http://127.0.0.1:4202/api\n")
        file.flush()
        assert errors.news() == []


def test_a_log_that_does_not_exist_yet_repeats_nothing(tmp_path):
    assert RepeatedErrors(tmp_path / "worker.log").news() == []
