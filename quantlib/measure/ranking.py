"""Is the order of models by speed certain? Valid while they are still being timed, however often one asks.

Method: betting on signs (Ramdas and others 2023, "Game-theoretic statistics and safe anytime-valid inference",
Statistical Science 38:576-601, section 2). A gambler who bets in every round that one model is faster than another
cannot expect to gain if it is not, so that becoming 1 / p times as rich has a probability of at most p, at any time
(Ville's inequality). As with `significance.is_slower`, nothing is assumed about how timings are distributed.
"""

from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

from quantlib.measure.significance import LEVEL

SETTING = (1, 1)
"""The setting that models are ranked by: batch size, and threads."""
TIE = 1.02
"""Two models are as fast as each other if the slower one takes less than this many times as long."""
# The gambler splits the money evenly among these bets: some for clear differences, some for those of one round in four.
_BETS = np.array([0.25, 0.5, 0.9])


def certainty_faster(samples: Sequence[float], others: Sequence[float], margin: float = 1.0) -> float:
    """How certain it is that a model takes less than `margin` times as long as another in most rounds.

    Args:
        samples: Times of the model, one per round.
        others: Times of the other, in the same rounds.
        margin: Factor for the other's times.

    Returns:
        In [0, 1): where it is not so, a certainty of c or more is ever found with a probability of at most 1 - c.
    """
    own, other = np.asarray(samples), margin * np.asarray(others)
    wealth = np.mean((1 + _BETS) ** np.sum(own < other) * (1 - _BETS) ** np.sum(own > other))
    return float(max(0.0, 1 - 1 / wealth))


def is_order_certain(samples: Sequence[Sequence[float]], files: Sequence[Hashable], level: float = LEVEL) -> bool:
    """Whether it is certain in which runtime each file is the fastest, and how the files are ordered by that.

    Of two that come one after the other, the first must be faster, or as fast up to a tie.

    Args:
        samples: Times of each model, one per round.
        files: The file that each of them is; models of one file differ by their runtime.
        level: How often an order is taken to be certain that is wrong.
    """
    by_file: dict[Hashable, list[Sequence[float]]] = {}
    for times, file in sorted(zip(samples, files, strict=True), key=lambda pair: float(np.median(pair[0]))):
        by_file.setdefault(file, []).append(times)
    fastest = [own[0] for own in by_file.values()]
    pairs = [(own[0], other) for own in by_file.values() for other in own[1:]]
    pairs += pairwise(fastest)
    # Which ones come one after the other depends on the times, so that any two in either order count.
    needed = 1 - level / max(1, len(samples) * (len(samples) - 1))
    return all(
        certainty_faster(first, second) >= needed or certainty_faster(second, first, TIE) >= needed
        for first, second in pairs
    )
