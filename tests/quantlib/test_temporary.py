"""Unfinished files and folders, and what is left of them when their process is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from quantlib import temporary

_HOLD = """
import sys, time
from pathlib import Path
from quantlib import temporary
made = temporary.new_file(Path(sys.argv[2])) if sys.argv[1] == "file" else temporary.new_folder(Path(sys.argv[2]))
with made as found:
    print(found.name if sys.argv[1] == "file" else found, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold():
    """Starts processes that make a temporary file or folder and keep running: (process, path)."""
    started = []

    def start(kind, folder):
        command = [sys.executable, "-c", _HOLD, kind, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, and a TMPDIR beside it."""
    for name in ("home", "home/prefect", "home/store/blobs", "home/runs/one", "tmp"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "home"


PLACES = [("file", "store/blobs"), ("file", "runs/one"), ("folder", "prefect"), ("folder", "../tmp")]


@pytest.mark.parametrize(("kind", "place"), PLACES)
def test_what_a_killed_process_left_is_removed_and_what_a_live_one_holds_is_not(home, hold, kind, place):
    process, path = hold(kind, home / place)
    _, other = hold(kind, home / place)
    temporary.remove_abandoned(home)
    assert path.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    temporary.remove_abandoned(home)
    assert not path.exists()
    assert other.exists()


def test_nothing_but_our_own_is_removed(home, tmp_path):
    # The second is a home that somebody put there.
    for name in ("quantflow-x", "quantflow-home/store", "other"):
        (tmp_path / "tmp" / name).mkdir(parents=True)
    (tmp_path / "tmp" / "quantflow-link").symlink_to(home)
    (home / "runs" / "writing").touch()
    (tmp_path / "elsewhere").touch()
    (home / "data").mkdir()
    (home / "data" / ".writing-of-somebody").touch()
    (home / "runs" / ".writing-link").symlink_to(tmp_path / "elsewhere")
    before = {path for path in tmp_path.rglob("*") if path.name != ".writing-link"}
    temporary.remove_abandoned(home)
    assert before <= set(tmp_path.rglob("*"))


def test_what_is_made_is_gone_after_the_block_however_it_ends(home):
    for make in (temporary.new_file, temporary.new_folder):
        with make(home):
            assert list(home.glob("*-*")) != []
        assert list(home.glob("*-*")) == []
        with pytest.raises(RuntimeError, match="stopped"), make(home):
            raise RuntimeError("stopped")
        assert list(home.glob("*-*")) == []


def test_a_file_that_was_taken_for_abandoned_before_it_was_locked_is_made_again(home, monkeypatch):
    locks = []
    lock = temporary.fcntl.flock

    def steal_the_first(file, operation):
        if not locks:
            Path(file.name).unlink()
        locks.append(file.name)
        lock(file, operation)

    monkeypatch.setattr(temporary.fcntl, "flock", steal_the_first)
    with temporary.new_file(home) as file:
        assert Path(file.name).exists()
    assert len(set(locks)) == 2
