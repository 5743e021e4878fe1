"""Is the difference real? Two models compared image by image on the same images, or call by call in the same rounds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np

LEVEL = 0.05
"""How often models of equal accuracy or speed are taken to differ."""


@dataclass(frozen=True)
class PairedDrop:
    """The drop in top-1 from one model to another."""

    drop: float
    """The first one's top-1 minus the second one's, as a fraction."""
    low: float
    high: float
    """Ends of the interval that contains the true drop with the requested confidence."""
    p_value: float
    """p-value of McNemar's test: how likely it is that models of equal accuracy differ by this much or more."""


def paired_drop(correct: np.ndarray, other_correct: np.ndarray, confidence: float = 0.95) -> PairedDrop:
    """Compare two models on the same images.

    The interval is Wald's with half an image added to each cell (Agresti and Min 2005, Statistics in Medicine
    24:729-740, section 3), which keeps its confidence where few images differ; the test is McNemar's in its exact
    form, binomial over the images on which exactly one of the two is right.

    Args:
        correct: [N], bool: whether the first model is right.
        other_correct: [N], bool: whether the second is, on the same images in the same order.
        confidence: Confidence of the two-sided interval, in (0, 1).

    Raises:
        ValueError: If N is 0, or the lengths differ.
    """
    if len(correct) == 0 or len(correct) != len(other_correct):
        raise ValueError(
            f"{len(correct)} and {len(other_correct)} answers: both must cover the same images, at least one"
        )
    lost = int(np.sum(correct & ~other_correct))
    won = int(np.sum(~correct & other_correct))
    total = len(correct)
    center = (lost - won) / (total + 2)
    variance = ((lost + won + 1) / (total + 2) - center**2) / (total + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(variance)
    return PairedDrop((lost - won) / total, center - half, center + half, _sign_test(lost, won))


def is_slower(samples: Sequence[float], others: Sequence[float], level: float = LEVEL) -> bool:
    """Whether a model is slower than another by more than the noise of timing.

    Decided round by round, as both were timed in the same rounds: a machine that slows down affects both alike. The
    sign test assumes nothing about how timings are distributed.

    Args:
        samples: Times of the model, one per round.
        others: Times of the other, in the same rounds.
        level: Level of the two-sided test: how often two models of equal speed are taken to differ.
    """
    slower = sum(own > other for own, other in zip(samples, others, strict=True))
    faster = sum(own < other for own, other in zip(samples, others, strict=True))
    return slower > faster and _sign_test(slower, faster) < level


def is_less_accurate(correct: np.ndarray, other_correct: np.ndarray, level: float = LEVEL) -> bool:
    """Whether a model is less accurate than another by more than chance, by McNemar's test.

    Args:
        correct: [N], bool: whether the model is right.
        other_correct: [N], bool: whether the other is, on the same images in the same order.
        level: How often models of equal accuracy are taken to differ.
    """
    paired = paired_drop(other_correct, correct)
    return paired.drop > 0 and paired.p_value < level


def proportion_interval(num_right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The ends of Wilson's interval for a proportion (Wilson 1927, JASA 22:209-212).

    Args:
        num_right: Successes.
        total: Number of trials, at least one.
        confidence: Two-sided, in (0, 1).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = num_right / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return center - half, center + half


def unpaired_interval(
    top1: float, num_images: int, other_top1: float, other_num_images: int, confidence: float = 0.95
) -> tuple[float, float]:
    """The ends of the interval of the drop from one model to another, on images that are not the same.

    Newcombe's hybrid of Wilson's intervals (Newcombe 1998, Statistics in Medicine 17:873-890, method 10).

    Args:
        top1: The first one's, a fraction of its images.
        num_images: How many these are, at least one.
        other_top1: The second one's.
        other_num_images: How many images that one was measured on.
        confidence: Two-sided, in (0, 1).
    """
    low, high = proportion_interval(round(top1 * num_images), num_images, confidence)
    other_low, other_high = proportion_interval(round(other_top1 * other_num_images), other_num_images, confidence)
    drop = top1 - other_top1
    return drop - math.hypot(top1 - low, other_high - other_top1), drop + math.hypot(
        high - top1, other_top1 - other_low
    )


def images_to_tell(found: PairedDrop, num_images: int, limit: float) -> int | None:
    """About how many images would put the whole interval on one side of a limit, if the drop is as found.

    Returns:
        None if the drop equals the limit: no number would do.
    """
    distance = abs(limit - found.drop)
    if distance == 0:
        return None
    # The interval's width falls with the square root of the number of images.
    return math.ceil(num_images * ((found.high - found.low) / 2 / distance) ** 2)


def _sign_test(lost: int, won: int) -> float:
    """Two-sided p-value of `lost` against `won`, each being either with probability 1/2; on images, McNemar's test."""
    differing = lost + won
    tail, term = 0, 1
    for k in range(min(lost, won) + 1):
        tail += term
        term = term * (differing - k) // (k + 1)
    # Integers up to here, so nothing is lost to rounding.
    return min(1.0, float(Fraction(2 * tail, 2**differing)))
