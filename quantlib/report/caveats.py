"""Caveats: why the figures of a run may mislead, where a careful reader would raise an eyebrow."""

from collections.abc import Sequence

from quantlib.measure import significance
from quantlib.recipe.sections import GateRecipe
from quantlib.report.rows import VariantRow

# Fraction of the way from chance to always right: a float model that does not surely get this far has learned
# nothing, or is given images or labels that it was not trained with.
_NEAR_CHANCE = 0.05
# An accuracy known no better than this (3 points to either side) says little.
_MUCH_NOISE = 0.03


def find_caveats(
    variants: Sequence[VariantRow], gate: GateRecipe, num_classes: int, search_best: str | None
) -> list[str]:
    """The caveats of a run, one sentence each.

    Args:
        variants: The float model first.
        gate: The gate that judged them.
        num_classes: Classes of the dataset.
        search_best: The variant that the search ended with; None if there was no search.
    """
    baseline, winner = variants[0], next((row for row in variants if row.winner), None)
    interval = significance.proportion_interval(round(baseline.top1 * baseline.num_images), baseline.num_images)
    found = [_near_chance(baseline, interval, num_classes), _few_images(baseline, interval)]
    if winner is not None:
        found += [_narrow_gate(winner, gate), _no_faster(winner, baseline), _two_winners(winner, search_best)]
    return [text for text in found if text]


def _near_chance(row: VariantRow, interval: tuple[float, float], num_classes: int) -> str:
    chance = 1 / num_classes
    if interval[0] > chance + _NEAR_CHANCE * (1 - chance):
        return ""
    return (
        f"The float model is right on {row.top1:.2%} of {row.num_images:,} images, and guessing would get "
        f"{chance:.2%}: check that the weights, the order of the classes and the size of the images match its training."
    )


def _few_images(row: VariantRow, interval: tuple[float, float]) -> str:
    low, high = interval
    if (high - low) / 2 <= _MUCH_NOISE:
        return ""
    return (
        f"{row.num_images:,} validation images are few: even float's accuracy, {row.top1:.2%}, is only known to lie "
        f"between {low:.1%} and {high:.1%} (95% confidence)."
    )


def _narrow_gate(row: VariantRow, gate: GateRecipe) -> str:
    """A gate without confidence that accepts a variant which may well lose more than it allows."""
    if (
        gate.confidence is not None
        or row.certain_low is not None
        or row.top1_drop_high is None
        or row.top1_drop_low is None
    ):
        return ""
    half = (row.top1_drop_high - row.top1_drop_low) / 2
    if half <= gate.max_top1_drop:
        return ""
    return (
        f"The gate of {100 * gate.max_top1_drop:.2f} points is narrower than the noise: {row.num_images:,} images show "
        f"the change of {row.variant} only to within {100 * half:.2f} points. Evaluate more images, or set "
        "gate.confidence to accept only what is surely inside."
    )


def _no_faster(row: VariantRow, baseline: VariantRow) -> str:
    if row.speedup > 1:
        return ""
    return (
        f"{row.variant} is not faster than float, which takes {baseline.latency_p50_ms:.3g} ms in "
        f"{baseline.runtime}: for such a small model int8 only saves size, or pays off only in batches."
    )


def _two_winners(row: VariantRow, search_best: str | None) -> str:
    if search_best in {None, row.variant}:
        return ""
    return (
        f"The search ended with {search_best}, judged on the selection images; the file to ship is "
        f"{row.variant}'s: of those inside the gate on validation, {row.reason}."
    )
