"""The drop in top-1 from some of the images, with an interval that holds however often it is looked at.

An interval of `significance.paired_drop` holds for a number of images that was fixed beforehand. Whoever looks after
every hundred images, and stops once the interval lies where it decides, is misled more often than it says. The
intervals here form a confidence sequence: with the confidence that is asked for, all of them together contain the true
drop.

Method: betting on the mean of bounded values, without replacement where the images are finitely many (Waudby-Smith and
Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B 86:1-27, arXiv:2010.09686, sections 4
and 5). For every candidate mean, a gambler bets that it is too low, and another that it is too high. Neither can
expect to gain if the candidate is right, so that one of them becomes 2 / (1 - confidence) times as rich with a
probability of at most 1 - confidence (Ville's inequality); a candidate is ruled out once that has happened.
"""

import math

import numpy as np

from quantlib.measure.significance import PairedDrop

# Each gambler splits the money evenly among these bets. The best one is the distance to the limit over the share of
# images that differ, and these serve where both are a few percent. With at most 1/2, no image ruins a gambler.
_BETS = np.array([0.125, 0.25, 0.5])
# Steps of the bisection for each end: these leave an error of 2 ** -23.
_STEPS = 24


def sequential_drop(
    correct: np.ndarray, other_correct: np.ndarray, confidence: float = 0.95, num_images: int | None = None
) -> PairedDrop:
    """Compare two models on the same images; valid whenever it is called, and however often.

    Args:
        correct: [N], bool: whether the first model is right; the images in random order.
        other_correct: [N], bool: whether the second is, on the same images in the same order.
        confidence: Confidence of the two-sided interval, in (0, 1).
        num_images: How many images there are, of which these are the first: the interval is then about the drop on all
            of them, and a single point once N is their number. None: about the drop on all images like these.

    Returns:
        Its p-value is also valid at any time: the inverse of what both gamblers own together, if they bet against
        equal accuracy with one unit.

    Raises:
        ValueError: If N is 0 or more than `num_images`, or the lengths differ.
    """
    if not 0 < len(correct) == len(other_correct) <= (num_images or len(correct)):
        raise ValueError(
            f"{len(correct)} and {len(other_correct)} answers of {num_images} images: both must cover the same images, "
            "at least one and at most all"
        )
    differences = correct.astype(np.int64) - other_correct  # (N,)
    drop, least, most = float(differences.mean()), -1.0, 1.0
    if num_images is not None:
        # Whatever the images that are not there yet may say.
        rest = num_images - len(differences)
        least, most = (int(differences.sum()) - rest) / num_images, (int(differences.sum()) + rest) / num_images
    ruin = math.log(2 / (1 - confidence))

    def find_end(sign: int, excluded: float, included: float) -> float:
        for _ in range(_STEPS):
            middle = (excluded + included) / 2
            if _log_wealth(differences, middle, sign, num_images) >= ruin:
                excluded = middle
            else:
                included = middle
        return excluded

    low, high = (least, most) if least == most else (find_end(1, least, most), find_end(-1, most, least))
    above, below = (_log_wealth(differences, 0.0, sign, num_images) for sign in (1, -1))
    wealth = float(np.logaddexp(above, below)) - math.log(2)
    return PairedDrop(drop, min(low, drop), max(high, drop), math.exp(min(0.0, -wealth)))


def _log_wealth(differences: np.ndarray, mean: float, sign: int, num_images: int | None) -> float:
    """What has become of one unit, bet on differences above (sign 1) or below (-1) a mean, as a logarithm.

    It falls with the mean for sign 1, and rises with it for -1.
    """
    expected: np.ndarray | float = mean
    if num_images is not None:
        # The mean of the images that were left before each one, if the mean of all of them is `mean`.
        before = np.concatenate([[0], np.cumsum(differences)[:-1]])
        expected = (num_images * mean - before) / (num_images - np.arange(len(differences)))  # (N,)
        if np.abs(expected).max() > 1:
            return math.inf  # No such images exist.
    gains = sign * np.multiply.outer(_BETS, differences - expected)  # (bets, N)
    return float(np.logaddexp.reduce(np.log1p(gains).sum(axis=1))) - math.log(len(_BETS))
