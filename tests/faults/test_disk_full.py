"""A disk that fills up: a clear error, no damage, and the run goes on once there is room."""

import subprocess

import harness
import pytest

from quantlib.retention import find_damage
from quantlib.store import Store


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_is_named_harms_nothing_and_the_run_goes_on_when_there_is_room(small_disk, undisturbed):
    _, expected = undisturbed
    home = small_disk / "home"
    full = harness.run(home)
    assert "MachineError: The disk is full" in full.error
    assert find_damage(Store(home / "store"))[1] == []
    done = harness.keys_done(home)
    assert done, "the disk was full too early for this test to mean anything"

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    resumed = harness.run(home, run_id=harness.run_id_of(home))
    assert resumed.error == ""
    assert resumed.variants == expected.variants
    assert all(resumed.stages[label] for label in done)
