"""Whether a drop in top-1 is inside the gate, and how certain that is."""

from quantlib.measure import significance
from quantlib.measure.confidence_sequence import sequential_drop
from quantlib.measure.predictions import Predictions
from quantlib.measure.significance import PairedDrop
from quantlib.recipe.sections import GateRecipe

_CONFIDENCE = 0.95
# A drop of exactly the gate must not fail through float64's rounding; one image is far more than this.
_TOLERANCE = 1e-9


def is_inside(drop: float, gate: GateRecipe) -> bool:
    """Whether a drop is no larger than the gate allows."""
    return drop <= gate.max_top1_drop + _TOLERANCE


def find_drop(before: Predictions, after: Predictions, *, stopped: bool) -> PairedDrop:
    """The drop from float to a variant on the images that both answered, with a 95% interval for images like these.

    Args:
        before: Float's answers.
        after: The variant's, for the first of the same images.
        stopped: Whether evaluation ended once the verdict was certain: the interval then is one that may be looked at
            as often as one likes.
    """
    correct = before.first(len(after)).top1_correct
    return (sequential_drop if stopped else significance.paired_drop)(correct, after.top1_correct, _CONFIDENCE)


def certain_interval(before: Predictions, after: Predictions, gate: GateRecipe, out_of: int) -> PairedDrop:
    """The drop with the interval that evaluation ends by.

    Without `gate.confidence` the verdict is about the drop on all validation images, and with it, on all like these.

    Args:
        before: Float's answers.
        after: The variant's, for the first of the same images, which are in random order.
        gate: The gate.
        out_of: How many validation images there are.
    """
    correct = before.first(len(after)).top1_correct
    num_images = out_of if gate.confidence is None else None
    return sequential_drop(correct, after.top1_correct, gate.confidence or _CONFIDENCE, num_images)


def judge_drop(
    before: Predictions, after: Predictions, gate: GateRecipe, out_of: int | None = None
) -> tuple[str, int | None]:
    """Whether a variant is inside, outside or undecided; if undecided, about how many images would decide.

    Args:
        before: Float's answers.
        after: The variant's, for the first of the same images.
        gate: The gate.
        out_of: How many validation images there are, if evaluation ends once the verdict is certain; None: it saw all.
    """
    if out_of is not None:
        found = certain_interval(before, after, gate, out_of)
    elif gate.confidence is not None:
        found = significance.paired_drop(before.top1_correct, after.top1_correct, gate.confidence)
    else:
        found = find_drop(before, after, stopped=False)
        return ("inside" if is_inside(found.drop, gate) else "outside"), None
    if is_inside(found.high, gate):
        return "inside", None
    if not is_inside(found.low, gate):
        return "outside", None
    return "undecided", significance.images_to_tell(found, len(after), gate.max_top1_drop)
