"""`quantflow plan`: what would be reused, what would run, and why."""

import harness
import pytest

from flows.graphs.planning import plan_run
from quantlib.recipe.schema import parse_recipe


def test_a_finished_recipe_would_reuse_every_stage(home_copy, undisturbed, equally_fast):
    planned = plan_run(parse_recipe(harness.RECIPE), home_copy)
    assert {stage.label for stage in planned} == set(undisturbed[1].stages)
    assert [stage for stage in planned if not stage.reused] == []


def test_whichever_record_is_missing_its_stage_would_run_and_the_plan_continues(home_copy, equally_fast):
    recipe = parse_recipe(harness.RECIPE)
    for label, key in harness.keys_done(home_copy).items():
        record = home_copy / "store" / "records" / f"{key}.json"
        hidden = record.rename(record.with_suffix(".hidden"))
        planned = {stage.label: stage.reused for stage in plan_run(recipe, home_copy)}
        assert planned[label] is False
        hidden.rename(record)


def test_fewer_calibration_batches_recompute_calibration_and_what_follows_and_say_why(home_copy):
    changed = harness.RECIPE | {"calibration": {"batch_size": 16, "num_batches": 1}}
    reasons = {s.label: s.reason for s in plan_run(parse_recipe(changed), home_copy) if not s.reused}
    assert reasons["decode-calibration-0"].startswith("images.stop: ")
    # Channels are smoothed by what calibration images give.
    assert reasons["smooth-0.5"] == "follows decode-calibration-0"
    assert reasons["calibrate-per_channel"] == "follows fuse-eval-smoothed-0.5"
    assert not {"load_float", "fuse-eval", "evaluate_baseline-float", "decode-validation-0"} & set(reasons)


def test_activations_alone_are_rounded_in_a_model_whose_biases_are_floats(tmp_path):
    recipe = harness.RECIPE | {"evaluation": harness.RECIPE["evaluation"] | {"simulate": True}}
    reasons = {s.label: s.reason for s in plan_run(parse_recipe(recipe), tmp_path)}
    assert reasons["convert-per_channel"] == "follows correct_bias-per_channel"
    assert reasons["convert-per_channel-uncorrected"] == "follows choose_ranges-per_channel"
    follows = {"both": "per_channel", "weights": "per_channel", "activations": "per_channel-uncorrected"}
    for parts, converted in follows.items():
        assert reasons[f"simulate-per_channel-{parts}"] == f"follows convert-{converted}"
        assert reasons[f"simulate-qat-{parts}"] == "follows choose_epoch-qat"


def test_a_stage_that_was_interrupted_is_not_called_damaged(tmp_path):
    held = harness.start_run(tmp_path / "home", hold_at="inside load_float")
    while not held.held.exists():
        assert held.is_alive()
        held.join(0.05)
    held.kill()
    held.join()
    reasons = {s.label: s.reason for s in plan_run(parse_recipe(harness.RECIPE), tmp_path / "home")}
    assert reasons["load_float"] == "the last run did not finish it"


ONNX_ALONE = {"gate": {"runtimes": ["onnxruntime"]}}
TORCHSCRIPT_ALONE = {"gate": {"runtimes": ["torchscript"]}}
TORCHSCRIPT_TIMED = ONNX_ALONE | {"benchmark": {"runtimes": ["torchscript", "onnxruntime"]}}


@pytest.mark.parametrize(
    ("changes", "written", "judged_by"),
    [
        (ONNX_ALONE, {"draft_onnx", "save_onnx"}, "save_onnx-{}-onnxruntime"),
        (TORCHSCRIPT_ALONE, {"script_and_save", "try_file"}, "script_and_save-{}"),
        (TORCHSCRIPT_TIMED, {"draft_onnx", "save_onnx", "script_and_save", "try_file"}, "save_onnx-{}-onnxruntime"),
    ],
)
def test_only_files_for_runtimes_that_the_gate_allows_are_evaluated(tmp_path, changes, written, judged_by):
    pytest.importorskip("onnxruntime", reason="the gate allows ONNX Runtime")
    stages = plan_run(parse_recipe(harness.RECIPE | changes), tmp_path)
    writers = ("draft_onnx", "save_onnx", "script_and_save", "try_file", "save_program")
    found = {stage.label.partition("-")[0] for stage in stages}
    assert found & set(writers) == written
    reasons = {stage.label: stage.reason for stage in stages}
    assert reasons["evaluate_baseline-float"] == f"follows {judged_by.format('float')}"
    assert reasons["evaluate-qat-0"] == f"follows {judged_by.format('qat-0')}"
    # One file may be shipped, and it is evaluated once its fastest runtime is known.
    assert [label for label in reasons if label.startswith("evaluate-per_channel")] == [
        "evaluate-per_channel-benchmark",
        "evaluate-per_channel-benchmark-held_out",
    ]


def test_branches_of_one_smoothing_share_a_model_which_other_branches_do_not_wait_for(tmp_path):
    branches = [
        {"name": "plain", "smoothing": False},
        {"name": "smoothed", "equalize": True},
        {"name": "both", "equalize": True, "smoothing": 0.5, "bias_correction": False},
        {"name": "alone", "smoothing": 0.2},
    ]
    stages = plan_run(parse_recipe(harness.RECIPE | {"ptq": branches, "qat": []}), tmp_path)
    follows = {stage.label: stage.reason for stage in stages}
    shared = [stage.label for stage in stages if stage.label.startswith(("equalize", "smooth", "fuse"))]
    assert len(set(shared)) == len(shared) == 6
    assert follows["smooth-0.5-equalized"] == "follows equalize"
    assert follows["smooth-0.2"] == "follows load_float"
    assert follows["calibrate-smoothed"] == follows["calibrate-both"] == "follows fuse-eval-equalized-smoothed-0.5"
    assert follows["calibrate-alone"] == "follows fuse-eval-smoothed-0.2"
    assert follows["calibrate-plain"] == "follows fuse-eval"
