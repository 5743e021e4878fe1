"""Runs beside each other on one home compute each stage once, and wait for nobody who is dead."""

import time
from collections import Counter

import harness


def computed(outcomes):
    return Counter(label for outcome in outcomes for label, cached in outcome.stages.items() if not cached)


def test_four_runs_at_once_compute_each_stage_once(undisturbed, tmp_path):
    _, expected = undisturbed
    processes = [harness.start_run(tmp_path / "home") for _ in range(4)]
    outcomes = [harness.finish(process) for process in processes]
    assert [outcome.error for outcome in outcomes] == [""] * 4
    assert all(outcome.variants == expected.variants for outcome in outcomes)
    assert computed(outcomes) == dict.fromkeys(expected.stages, 1)


def test_the_others_take_over_from_one_that_is_killed_inside_a_stage(undisturbed, tmp_path):
    _, expected = undisturbed
    home = tmp_path / "home"
    inside = expected.points.index("inside qat_epoch-qat-0")
    doomed = harness.start_run(home, kill_at=inside)
    while not (home / "store" / "locks").exists() and doomed.exitcode is None:
        time.sleep(0.05)
    others = [harness.start_run(home) for _ in range(3)]
    outcomes = [harness.finish(process) for process in others]
    harness.finish(doomed)
    assert doomed.exitcode == -9
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert all(outcome.variants == expected.variants for outcome in outcomes)
    # What the killed one finished, nobody computed again; everything else once.
    assert max(computed(outcomes).values()) == 1
    assert set(computed(outcomes)) | set(harness.keys_done(home)) == set(expected.stages)
