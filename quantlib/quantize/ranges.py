"""The range of an activation's grid, chosen from what calibration has collected."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlib.quantize.grids import Grid, activation_grid
from quantlib.quantize.statistics import NUM_BINS, ActivationStatistics
from quantlib.recipe.scheme import ObserverName

# The fraction of all values inside the range: 99.99%, as in Wu et al. 2020 (arXiv:2004.09602), section 4.2.
PERCENTILE = 0.9999
# Ranges to try, as fractions of the largest seen; the optimum lies far above the smallest of them.
_FRACTIONS = torch.linspace(0.1, 1.0, 91)
# Of "histogram": the share of all values that one step of its search leaves outside, and the steps of its grid.
_SHARE = 1e-5
_NUM_STEPS = 256


def find_grid(seen: ActivationStatistics, observer: ObserverName, bits: int) -> Grid:
    """The grid that an observer chooses; one that has seen nothing chooses a grid around 0."""
    if not torch.isfinite(seen.min_val):
        return activation_grid(torch.zeros(()), torch.zeros(()), bits)
    return activation_grid(*_RANGES[observer](seen, bits), bits)


def _extremes(seen: ActivationStatistics, _bits: int) -> tuple[Tensor, Tensor]:
    return seen.min_val, seen.max_val


def _averages(seen: ActivationStatistics, _bits: int) -> tuple[Tensor, Tensor]:
    return seen.average_min, seen.average_max


def _percentile(seen: ActivationStatistics, _bits: int) -> tuple[Tensor, Tensor]:
    """The range that holds all but the fraction 1 - PERCENTILE of the values, cut off equally at both ends."""
    edges = torch.linspace(float(seen.min_val), float(seen.max_val), NUM_BINS + 1)
    share = seen.histogram.double().cumsum(0) / seen.histogram.double().sum()  # (bins,), below each right edge
    cut = (1 - PERCENTILE) / 2
    return edges[int((share <= cut).sum())], edges[int((share < 1 - cut).sum()) + 1]


def _least_squares(seen: ActivationStatistics, bits: int) -> tuple[Tensor, Tensor]:
    """The range whose grid has the least squared rounding and clipping error over all values seen.

    Nagel et al. 2021 (arXiv:2106.08295), section 3.1, eq. 8.
    """
    low, high = seen.min_val.double(), seen.max_val.double()
    lows, highs = low * _FRACTIONS, high * _FRACTIONS
    # One end after the other: two rounds are enough, as the ends hardly depend on each other.
    for _ in range(2):
        if seen.max_val > 0:
            high = highs[_errors(seen, low.expand_as(highs), highs, bits).argmin()]
        if seen.min_val < 0:
            low = lows[_errors(seen, lows, high.expand_as(lows), bits).argmin()]
    return low.float(), high.float()


def _errors(seen: ActivationStatistics, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Summed squared error [n] of each range from low [n] to high [n]."""
    step = (float(seen.max_val) - float(seen.min_val)) / NUM_BINS
    values = float(seen.min_val) + step * (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5)  # (bins,)
    quant_max = 2**bits - 1
    # Zero is always on the grid.
    low, high = low.clamp_max(0).unsqueeze(1), high.clamp_min(0).unsqueeze(1)  # (n, 1)
    scale = ((high - low) / quant_max).clamp_min(torch.finfo(torch.float32).eps)
    zero_point = (-low / scale).round()
    rounded = ((values / scale).round() + zero_point).clamp(0, quant_max)  # (n, bins)
    return ((rounded - zero_point) * scale - values).square() @ seen.histogram.double()


def _narrowed(seen: ActivationStatistics, _bits: int) -> tuple[Tensor, Tensor]:
    """The range that torch's HistogramObserver takes.

    From the extremes on, the end where the next outermost values are spread wider moves inwards, until the squared
    error, of values spread evenly over their bin on a grid of 256 steps, would grow.
    """
    if int((seen.histogram > 0).sum()) <= 1:
        return seen.min_val, seen.max_val
    below = seen.histogram.double().cumsum(0)
    total = float(below[-1])
    first, last, least = 0, NUM_BINS - 1, float("inf")
    left_out = [0.0, 0.0]
    while sum(left_out) < 1.0:
        shares = [share + _SHARE for share in left_out]
        inner_first = min(max(first, int((below < shares[0] * total).sum())), last)
        inner_last = max(min(last, int((below <= (1 - shares[1]) * total).sum()) - 1), first)
        moved = (first, last)
        if inner_first - first > last - inner_last:
            moved, left_out[0] = (inner_first, last), shares[0]
        else:
            moved, left_out[1] = (first, inner_last), shares[1]
        if moved == (first, last):
            continue
        error = _error_of_bins(seen, *moved)
        if error > least:
            break
        (first, last), least = moved, error
    width = (seen.max_val - seen.min_val) / NUM_BINS
    return seen.min_val + width * first, seen.min_val + width * (last + 1)


def _error_of_bins(seen: ActivationStatistics, first: int, last: int) -> float:
    """Squared error of the whole histogram on a grid over some of its bins; in units that only compare."""
    step = (last - first + 1) / _NUM_STEPS  # In bins.
    starts = torch.arange(NUM_BINS, dtype=torch.float64) - first
    ends = starts + 1
    first_step, last_step = ((edge / step).floor().clamp(0, _NUM_STEPS - 1) for edge in (starts, ends))
    # Integrals of the squared distance to the middle of a step; a bin reaches over many steps or lies within one.
    from_start, to_end = starts - (first_step + 0.5) * step, ends - (last_step + 0.5) * step
    within = (to_end**3 - from_start**3) / 3
    whole_step = step**3 / 12
    across = (
        ((step / 2) ** 3 - from_start**3) / 3
        + (last_step - first_step - 1) * whole_step
        + (to_end**3 + (step / 2) ** 3) / 3
    )
    return float(torch.where(first_step == last_step, within, across) @ seen.histogram.double())


_RANGES: dict[ObserverName, Callable[[ActivationStatistics, int], tuple[Tensor, Tensor]]] = {
    "minmax": _extremes,
    "moving_average": _averages,
    "histogram": _narrowed,
    "percentile": _percentile,
    "mse": _least_squares,
}
