"""A disk that fills up: a clear error, no damage, and the run resumes once there is room."""

import subprocess
import sys

import harness
import pytest
from dashboard_driver import TINY, own_environment

from quantlib.store.local import Store
from quantlib.store.retention import find_damage


def test_a_full_disk_is_named_harms_nothing_and_the_run_resumes_when_there_is_room(small_disk, undisturbed):
    _, expected = undisturbed
    home = small_disk / "home"
    full = harness.run(home)
    assert "MachineError: The disk is full" in full.error
    assert find_damage(Store(home / "store"))[1] == []
    done = harness.keys_done(home)
    assert done, "the disk filled up too early for this test to mean anything"

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = harness.run(home, run_id=harness.run_id_of(home))
    assert resumed.error == ""
    assert resumed.variants == expected.variants
    assert all(resumed.stages[label] for label in done)


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["300k", "1m", "2m", "4m", "8m"], indirect=True)
def test_every_command_names_a_full_disk_wherever_it_fills_up(small_disk, tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    filled = False
    for command in (
        "run tiny.toml",
        "resume",
        "dashboard --port 0",
        "runs",
        "report",
        "cache verify",
        "plan tiny.toml",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.commands", *command.split(), "--home", str(small_disk / "home")],
            check=False,
            cwd=tmp_path,
            env=own_environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=200,
        )
        said = done.stdout + done.stderr
        assert done.returncode in {0, 2}, f"{command}: {said}"
        assert done.returncode == 0 or "The disk is full" in said or "Nothing to resume" in said, f"{command}: {said}"
        assert "Traceback" not in said
        filled |= "The disk is full" in said
    assert filled
