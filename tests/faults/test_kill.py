"""kill -9 anywhere: the next run resumes from there, with the same result, and removes what was left half-written."""

import os
import signal
import subprocess
import sys

import harness
import pytest
from dashboard_driver import TINY, own_environment, until
from filelock import FileLock

NUM_KILLS = 44


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n == 13 else pytest.mark.slow) for n in range(NUM_KILLS)]
)
def test_a_killed_run_is_resumed_with_the_same_result(number, undisturbed, tmp_path):
    untouched, expected = undisturbed
    point = (2 * number + 1) * len(expected.points) // (2 * NUM_KILLS)
    home = tmp_path / "home"

    killed = harness.run(home, kill_at=point)
    assert killed.exitcode == -9, killed.error
    done = harness.keys_done(home)

    resumed = harness.run(home, run_id=harness.run_id_of(home) if (home / "runs").exists() else None)
    assert resumed.exitcode == 0
    assert resumed.error == ""
    assert resumed.variants == expected.variants, f"killed at {expected.points[point]}"
    assert harness.outputs_of(home) == harness.outputs_of(untouched), f"killed at {expected.points[point]}"
    assert {label for label in done if not resumed.stages[label]} == set(), "a finished stage ran again"
    assert list(home.rglob(".writing-*")) == []


@pytest.mark.slow
def test_a_write_that_was_cut_short_is_removed_by_the_next_run_and_one_in_progress_is_not(home_copy):
    write = "from pathlib import Path; from quantlib.store.local import Store; import sys, time; " + (
        "Store(Path(sys.argv[1])).write('model', lambda file: (file.write(b'half'), print('begun', flush=True), "
        "time.sleep(600)))"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", write, str(home_copy / "store")], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"begun\n"
        for writer in writers[1:]:
            writer.kill()
            writer.wait()
        assert len(list(home_copy.rglob(".writing-*"))) == 3
        assert harness.run(home_copy).exitcode == 0
        assert len(list(home_copy.rglob(".writing-*"))) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert harness.run(home_copy).exitcode == 0
    assert list(home_copy.rglob(".writing-*")) == []


@pytest.mark.slow
def test_what_a_killed_run_left_in_tmpdir_is_removed_by_the_next(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "tmp").mkdir()
    own = own_environment(TMPDIR=str(tmp_path / "tmp"), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "flows.cli.commands", "run", "tiny.toml", "--home", "home"]
    (tmp_path / "home" / "prefect").mkdir(parents=True)
    # Held as by another run on the same home: the second run keeps Prefect's files in TMPDIR.
    with FileLock(tmp_path / "home" / "prefect" / "server.lock"):
        first = subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        records = tmp_path / "home" / "store" / "records"
        until(lambda: len(list(records.glob("*.json"))) > 3, 200, lambda: f"{first.poll()}")
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
        assert list((tmp_path / "tmp").rglob("prefect.db")) != []
    done = subprocess.run(command, check=False, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode in {0, 3}, done.stderr
    # torch keeps a folder there for the next process.
    assert [path.name for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("torchinductor_")] == []


def test_the_kill_points_lie_at_every_stage_boundary_inside_stages_and_inside_writes(undisturbed):
    _, expected = undisturbed
    for label in expected.stages:
        assert f"before {label}" in expected.points
        assert f"after {label}" in expected.points
    assert sum(point.startswith("inside") for point in expected.points) >= 10
    assert sum(point.startswith("write") for point in expected.points) >= 40
