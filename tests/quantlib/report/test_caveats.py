"""Warnings where a careful reader would have doubts, and nowhere else."""

import pytest
from rows import variant_row

from quantlib.recipe.sections import GateRecipe
from quantlib.report.caveats import find_caveats

FLOAT = variant_row("float", method="float", top1=0.75, num_images=5000, latency_p50_ms=8.0)
WINNER = variant_row(
    "a", num_images=5000, winner=True, speedup=2.0, top1_drop_low=-0.002, top1_drop_high=0.004, reason="the fastest"
)


def caveats(*, float_row=FLOAT, winner=WINNER, gate=None, num_classes=10, search_best=None):
    return find_caveats((float_row, winner), gate or GateRecipe(max_top1_drop=0.01), num_classes, search_best)


def test_a_sound_run_has_none():
    assert caveats() == []
    assert caveats(search_best="a") == []


@pytest.mark.parametrize(
    ("top1", "num_classes", "near"),
    [(0.11, 10, True), (0.3, 10, False), (0.51, 2, True), (0.8, 2, False), (0.002, 1000, True), (0.2, 1000, False)],
)
def test_a_float_model_near_chance_is_reported(top1, num_classes, near):
    row = variant_row("float", method="float", top1=top1, num_images=5000)
    found = caveats(float_row=row, num_classes=num_classes)
    assert [text.startswith(f"The float model is right on {top1:.2%} of 5,000 images") for text in found] == [
        True
    ] * near


@pytest.mark.parametrize(("num_images", "few"), [(100, True), (2000, False)])
def test_few_validation_images_are_reported(num_images, few):
    found = caveats(float_row=variant_row("float", method="float", top1=0.75, num_images=num_images))
    assert [text.startswith(f"{num_images:,} validation images are few") for text in found] == [True] * few


def test_a_gate_narrower_than_the_noise_is_reported_unless_it_asks_for_confidence():
    (found,) = caveats(gate=GateRecipe(max_top1_drop=0.001))
    assert found.startswith(
        "The gate of 0.10 points is narrower than the noise: 5,000 images show the change of a only to "
        "within 0.30 points."
    )
    assert caveats(gate=GateRecipe(max_top1_drop=0.001, confidence=0.9)) == []


def test_int8_that_is_not_faster_is_reported():
    (found,) = caveats(winner=variant_row("a", winner=True, speedup=0.9))
    assert found.startswith("a is not faster than float, which takes 8 ms in torchscript")


def test_a_search_and_a_run_with_different_winners_are_reported():
    (found,) = caveats(search_best="search-2-equalized")
    assert found.startswith("The search ended with search-2-equalized")
    assert found.endswith("the file to ship is a's: of those inside the gate on validation, the fastest.")
