"""Is the difference real? Two models judged on the same images, compared image by image."""

import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class PairedDrop:
    """The loss of top-1 from one model to another."""

    drop: float
    """The first one's top-1 less the second one's, as a fraction."""
    low: float
    high: float
    """Ends of the interval that holds the true drop with the confidence asked for."""
    p_value: float
    """Of McNemar's test: how likely models of equal accuracy differ by this much or more."""


def paired_drop(correct: np.ndarray, other_correct: np.ndarray, confidence: float = 0.95) -> PairedDrop:
    """Compare two models on the same images.

    The interval is Wald's with half an image added to each cell (Agresti and Min 2005, Statistics in Medicine
    24:729-740, section 3), which keeps its confidence where few images differ; the test is McNemar's in its exact
    form, binomial over the images on which just one of the two is right.

    Args:
        correct: [N], bool: whether the first model is right.
        other_correct: [N], bool: whether the second is, on the same images in the same order.
        confidence: Of the two-sided interval, in (0, 1).

    Raises:
        ValueError: If N is 0, or the lengths differ.
    """
    if len(correct) == 0 or len(correct) != len(other_correct):
        raise ValueError(
            f"{len(correct)} and {len(other_correct)} answers: both must be of the same images, one at least"
        )
    lost = int(np.sum(correct & ~other_correct))
    won = int(np.sum(~correct & other_correct))
    total = len(correct)
    center = (lost - won) / (total + 2)
    variance = ((lost + won + 1) / (total + 2) - center**2) / (total + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return PairedDrop((lost - won) / total, center - half, center + half, _mcnemar(lost, won))


def images_to_tell(found: PairedDrop, num_images: int, limit: float) -> int | None:
    """About how many images would put the whole interval on one side of a limit, were the drop as found.

    Returns:
        None where the drop is the limit: no number would.
    """
    distance = abs(limit - found.drop)
    if distance == 0:
        return None
    # The interval's width falls with the square root of the number of images.
    return math.ceil(num_images * ((found.high - found.low) / 2 / distance) ** 2)


def _mcnemar(lost: int, won: int) -> float:
    """Two-sided p-value of `lost` against `won`, each image being either with probability 1/2."""
    differing = lost + won
    tail, term = 0, 1
    for k in range(min(lost, won) + 1):
        tail += term
        term = term * (differing - k) // (k + 1)
    # Whole numbers until here, so nothing is lost to rounding.
    return min(1.0, float(Fraction(2 * tail, 2**differing)))
