"""kill -9 anywhere: the next run goes on from there, with the same result."""

import harness
import pytest

NUM_KILLS = 44


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=() if n % 9 == 4 else pytest.mark.slow) for n in range(NUM_KILLS)]
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
    leftovers = [path for path in home.rglob(".writing-*") if path.stat().st_size]
    assert len(leftovers) <= 1, "more than the write that was cut short is left over"


def test_the_kill_points_lie_at_every_stage_boundary_inside_stages_and_inside_writes(undisturbed):
    _, expected = undisturbed
    for label in expected.stages:
        assert f"before {label}" in expected.points
        assert f"after {label}" in expected.points
    assert sum(point.startswith("inside") for point in expected.points) >= 10
    assert sum(point.startswith("write") for point in expected.points) >= 40
