"""The process that computes for another one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from quantlib.errors import MachineError, RecipeError
from quantlib.helper import Helper
from quantlib.recipe import file


@pytest.fixture
def helper():
    found = Helper()
    yield found
    found.stop()


def test_it_computes_in_a_process_of_its_own(helper):
    pid = helper.call(os.getpid)
    assert pid != os.getpid()
    assert helper.call(os.getpid) == pid
    assert helper.call(pow, 7, 2, mod=10) == 9


def test_what_a_function_raises_is_raised_here_and_the_process_goes_on(helper):
    with pytest.raises(RecipeError, match="nowhere"):
        helper.call(file.load_recipe, Path("/nowhere.toml"))
    assert helper.call(abs, -1) == 1


def _die_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_process_that_is_killed_is_replaced_and_the_call_begins_again(helper, tmp_path):
    assert helper.call(_die_once, tmp_path / "killed") == "done"
    assert (tmp_path / "killed").exists()


def test_a_process_that_somebody_has_stopped_goes_on(helper, monkeypatch):
    monkeypatch.setattr("quantlib.helper._LOOK_SECONDS", 0.2)
    pid = helper.call(os.getpid)
    os.kill(pid, signal.SIGSTOP)
    assert helper.call(os.getpid) == pid


def test_a_process_that_dies_twice_is_an_error_and_the_next_call_has_another(helper):
    with pytest.raises(MachineError, match=r"died in posix._exit \(exit status 3\)"):
        helper.call(os._exit, 3)
    assert helper.call(abs, -1) == 1


def test_it_can_be_stopped_in_the_middle_of_a_call(helper):
    helper.start()
    stopper = threading.Timer(0.5, helper.stop)
    stopper.start()
    before = time.monotonic()
    with pytest.raises(MachineError, match="exit status -9"):
        helper.call(time.sleep, 60)
    assert time.monotonic() - before < 30
    stopper.join()


def test_it_ends_with_the_process_that_started_it():
    code = (
        "import os; from quantlib.helper import Helper; helper = Helper();"
        "print(helper.call(os.getpid), flush=True); os._exit(0)"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 30
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_ends_without_a_word_where_nobody_waits_for_its_answer():
    code = (
        "import os, threading; from quantlib.helper import Helper; import time; helper = Helper(); helper.call(abs, 1);"
        "threading.Timer(1, os._exit, [0]).start(); helper.call(time.sleep, 3)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    # Its standard error is open until the helper has ended, too.
    assert (done.returncode, done.stderr) == (0, "")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
