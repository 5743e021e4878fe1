"""Parallel runs on one home compute each stage once, and never wait for a dead process."""

import harness
import pytest
from harness import computed, wait_until


def test_four_runs_at_once_compute_each_stage_once(undisturbed, tmp_path):
    untouched, expected = undisturbed
    home = tmp_path / "home"
    processes = [harness.start_run(home) for _ in range(4)]
    outcomes = [harness.finish(process) for process in processes]
    assert [outcome.error for outcome in outcomes] == [""] * 4
    assert all(outcome.variants == expected.variants for outcome in outcomes)
    assert computed(home) == computed(untouched)


@pytest.mark.slow
def test_the_others_take_over_from_one_that_is_killed_inside_a_stage(undisturbed, tmp_path):
    untouched, expected = undisturbed
    home = tmp_path / "home"
    doomed = harness.start_run(home, hold_at="inside qat_epoch-qat-0")
    wait_until(doomed.held.exists)
    others = [harness.start_run(home) for _ in range(3)]
    wait_until(lambda: num_waiting(home, "qat_epoch-qat-0") == 4)
    doomed.kill()
    outcomes = [harness.finish(process) for process in others]
    assert [outcome.error for outcome in outcomes] == [""] * 3
    assert all(outcome.variants == expected.variants for outcome in outcomes)
    # What the killed run had finished was not computed again; everything else was computed once.
    assert computed(home) == computed(untouched)


@pytest.mark.slow
def test_stages_that_run_at_once_give_the_same_run_in_the_same_order(undisturbed, tmp_path):
    untouched, expected = undisturbed
    home = tmp_path / "home"
    outcome = harness.run(home, at_once=True)
    assert outcome.error == ""
    assert outcome.variants == expected.variants
    assert list(outcome.stages) == list(expected.stages)
    assert computed(home) == computed(untouched)
    assert harness.outputs_of(home) == harness.outputs_of(untouched)


def num_waiting(home, label):
    lines = [line for line in harness.stage_lines(home) if line["label"] == label]
    return len(lines) - 2 * sum("cached" in line for line in lines)
