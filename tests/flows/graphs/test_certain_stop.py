"""Evaluation that ends once the verdict is certain: `evaluation.stop = "certain"`."""

import harness
import pandas as pd
import pyarrow.parquet as pq
import pytest

from flows.graphs.planning import plan_run
from quantlib.measure.confidence_sequence import sequential_drop
from quantlib.recipe.schema import parse_recipe
from quantlib.report import comparison, html, tables

NUM_IMAGES, SHARD = 599, 250
RECIPE = harness.RECIPE | {
    "evaluation": {"num_held_out": 40, "stop": "certain", "num_examples": 3},
    "ptq": [{"name": "careful"}, {"name": "coarse", "weights": "per_tensor", "activation_bits": 7}],
    "qat": [],
}
# The first verdict is certain with any images; the other one is not before the last, as one image more or less counts.
EASY, HARD = ({**RECIPE, "gate": {"max_top1_drop": drop, "min_speedup": 0.0}} for drop in (1.0, 0.0))


@pytest.fixture(scope="module")
def runs(prefect_server, tmp_path_factory):
    """A home with a run whose verdicts are easy, then one whose verdicts are hard; the stages of both."""
    home = tmp_path_factory.mktemp("stop") / "home"
    outcomes = [harness.run(home, recipe=recipe) for recipe in (EASY, HARD)]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    return home, *(outcome.stages for outcome in outcomes)


@pytest.fixture(scope="module")
def reports(runs):
    """The reports of both runs, the easy one first."""
    names = sorted(place.name.removeprefix("run_id=") for place in (runs[0] / "reports" / "variants").iterdir())
    return [tables.read_report(runs[0] / "reports", name) for name in names]


def test_an_easy_verdict_takes_one_shard_and_no_other_is_even_decoded(runs, reports):
    _, stages, _ = runs
    assert [row.num_images for row in reports[0].variants] == [SHARD] * 3
    assert [row.gate for row in reports[0].variants[1:]] == ["inside"] * 2
    assert [row.num_images_available for row in reports[0].variants] == [None, NUM_IMAGES, NUM_IMAGES]
    assert {label for label in stages if label.startswith("decode-validation")} == {"decode-validation-0"}
    assert {label for label in stages if label.startswith("evaluate_baseline")} == {
        "evaluate_baseline-float-0",
        "evaluate_baseline-float-held_out",
    }


def test_a_hard_verdict_takes_more_images_and_reuses_those_evaluated_before(runs, reports):
    _, _, stages = runs
    used = {row.variant: row.num_images for row in reports[1].variants}
    assert set(used.values()) <= {SHARD, 2 * SHARD, NUM_IMAGES}
    assert used["float"] == max(used["careful"], used["coarse"]) > SHARD
    assert stages["decode-validation-0"]
    assert stages["evaluate_baseline-float-0"]
    assert not stages["evaluate_baseline-float-1"]


def test_a_variant_that_has_seen_all_images_has_a_point_for_an_interval(reports):
    whole = [row for row in reports[1].variants[1:] if row.num_images == NUM_IMAGES]
    assert whole
    assert all(row.certain_low == row.certain_high == pytest.approx(row.top1_drop) for row in whole)
    assert all((row.gate == "inside") == (row.top1_drop <= 0) for row in whole)


def test_the_report_has_the_interval_that_the_evaluation_ended_by(runs, reports):
    home = runs[0]
    row = reports[0].variants[1]
    answers = pd.read_parquet(home / "reports" / "predictions" / f"run_id={reports[0].run_id}")
    right = {
        name: (own.label == [likeliest[0] for likeliest in own.top5]).to_numpy()
        for name, own in answers.groupby("variant")
    }
    found = sequential_drop(right["float"], right["careful"], 0.95, NUM_IMAGES)
    assert (row.certain_low, row.certain_high) == (found.low, found.high)
    assert row.top1_drop_low <= row.certain_low <= row.top1_drop <= row.certain_high <= row.top1_drop_high
    assert any(
        "Of 599 images, as many were evaluated as the verdict took: careful after 250 (" in text
        for text in reports[0].remarks
    )


def test_files_and_documents_say_how_many_images_they_saw(runs, reports):
    assert {row.num_images for row in reports[0].files} == {SHARD}
    onnx = next((runs[0] / "models" / reports[0].run_id).glob("careful*.onnx"))
    content = onnx.read_bytes()
    assert b'"num_images":250' in content.replace(b" ", b"")


def test_runs_with_different_numbers_of_images_are_compared_on_those_that_both_have(runs, reports):
    found = comparison.compare_runs(runs[0], *(report.run_id for report in reports))
    assert all(change.paired for change in found.variants)


def test_the_page_says_how_many_images_each_variant_saw(runs, reports):
    for report in reports:
        page = html.render(runs[0] / "reports", report.run_id)
        assert all(f'<td class="wide">{row.num_images}</td>' in page for row in report.variants)


def test_images_are_in_an_order_drawn_by_the_seed(runs, reports):
    rows = pq.read_table(runs[0] / "reports" / "predictions" / f"run_id={reports[1].run_id}").to_pandas()
    names = [int(name.split()[0]) for name in rows[rows.variant == "float"].image]
    assert names != sorted(names)
    assert len(set(names)) == len(names)


def test_a_plan_that_cannot_know_goes_through_every_shard(tmp_path):
    labels = [stage.label for stage in plan_run(parse_recipe(EASY), tmp_path)]
    assert {label for label in labels if label.startswith("decode-validation")} == {
        f"decode-validation-{n}" for n in range(3)
    }
