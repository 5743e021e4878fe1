"""Where a quantized model answers differently from float."""

from collections import Counter
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

_MAX_BROKEN = 12
_MAX_CONFUSIONS = 10


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another, by float and by a quantized model."""

    label: int
    answer: int
    in_float: int
    in_variant: int


@dataclass(frozen=True)
class Disagreement:
    """Where a quantized model answers differently from float."""

    variant: str
    num_images: int
    num_broken: int
    """Images that float gets right and the variant does not."""
    num_fixed: int
    """Images that the variant gets right and float does not."""
    worse: tuple[Confusion, ...]
    """Confusions that are more frequent than with float, the worst first."""
    broken: tuple[int, ...]
    """The first broken images, by their place in the validation images."""


def compare(predictions: pa.Table, variant: str) -> Disagreement:
    """Compare a variant's answers with float's.

    Args:
        predictions: The table `predictions` of one run.
        variant: Any but "float".
    """
    labels, answers = _answers(predictions, variant)
    # Float may have answered more images, where a variant's verdict was certain early.
    float_answers = _answers(predictions, "float")[1][: len(answers)]
    places = range(len(labels))
    broken = [n for n in places if float_answers[n] == labels[n] != answers[n]]
    fixed = [n for n in places if float_answers[n] != labels[n] == answers[n]]
    before = Counter(pair for pair in zip(labels, float_answers, strict=True) if pair[0] != pair[1])
    after = Counter(pair for pair in zip(labels, answers, strict=True) if pair[0] != pair[1])
    worse = [Confusion(*pair, before[pair], after[pair]) for pair in after if after[pair] > before[pair]]
    worse.sort(key=lambda found: (found.in_float - found.in_variant, found.label, found.answer))
    return Disagreement(
        variant=variant,
        num_images=len(labels),
        num_broken=len(broken),
        num_fixed=len(fixed),
        worse=tuple(worse[:_MAX_CONFUSIONS]),
        broken=tuple(broken[:_MAX_BROKEN]),
    )


def _answers(predictions: pa.Table, variant: str) -> tuple[list[int], list[int]]:
    """(labels, likeliest classes) in the images' order."""
    rows = predictions.filter(pc.field("variant") == variant).sort_by("image_index")
    return rows["label"].to_pylist(), pc.list_element(rows["top5"], 0).to_pylist()
