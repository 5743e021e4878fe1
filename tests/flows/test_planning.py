"""`quantflow plan`: what would be reused, what would run, and why."""

import harness

from flows.planning import plan_run
from quantlib.recipe import parse_recipe


def test_a_finished_recipe_would_reuse_every_stage(home_copy, undisturbed):
    planned = plan_run(parse_recipe(harness.RECIPE), home_copy)
    assert {stage.label for stage in planned} == set(undisturbed[1].stages)
    assert [stage for stage in planned if not stage.reused] == []


def test_fewer_calibration_batches_recompute_calibration_and_what_follows_and_say_why(home_copy):
    changed = harness.RECIPE | {"calibration": {"batch_size": 16, "num_batches": 1}}
    reasons = {s.label: s.reason for s in plan_run(parse_recipe(changed), home_copy) if not s.reused}
    assert reasons["decode-calibration-0"].startswith("images.stop: ")
    assert reasons["calibrate-per_channel"] == "follows decode-calibration-0"
    assert not {"load_float", "fuse-eval", "evaluate_baseline-float", "decode-validation-0"} & set(reasons)
