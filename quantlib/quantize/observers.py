"""Activation observers that torch lacks: one that collects for all others, and two that choose ranges."""

import math
from typing import Any

import torch
from torch import Tensor

from quantlib.eager.modules import AVERAGING_CONSTANT, HistogramObserver, MovingAverageMinMaxObserver

# The fraction of all values inside the range: 99.99%, as in Wu et al. 2020 (arXiv:2004.09602), section 4.2.
PERCENTILE = 0.9999
# Ranges to try, as fractions of the largest seen; the optimum lies far above the smallest of them.
_FRACTIONS = torch.linspace(0.1, 1.0, 91)

# The most values of one activation and batch that enter its histogram, evenly spaced over all channels:
# MobileNetV2 has 2e8 values for 30 images of 224 px, and counting them all takes longer than computing them.
_MAX_COUNTED = 2**17


class ActivationStatistics(HistogramObserver):
    """Collects what every observer in `preparation` needs, so that one pass over the images feeds all of them."""

    average_min: Tensor
    average_max: Tensor
    min_val: Tensor
    max_val: Tensor
    histogram: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("average_min", torch.tensor(float("inf")))
        self.register_buffer("average_max", torch.tensor(float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        """Take in `x`, [N, ...], and return it unchanged."""
        seen = x.detach()
        if seen.dim() == 4 and not seen.is_contiguous():
            seen = seen.permute(0, 2, 3, 1)  # In memory order: torch copies it otherwise.
        low, high = seen.aminmax()
        if not (low.isfinite() and high.isfinite()):
            seen = seen[seen.isfinite()]
            if seen.numel() == 0:
                return x
            low, high = seen.aminmax()
        counted, weight = _thin_out(seen)
        first = not math.isfinite(self.min_val)
        new_low, new_high = (low, high) if first else (torch.min(self.min_val, low), torch.max(self.max_val, high))
        histogram = weight * torch.histc(counted, self.bins, min=float(new_low), max=float(new_high))
        if first:
            averages = low, high
        else:
            share = AVERAGING_CONSTANT
            averages = torch.lerp(self.average_min, low, share), torch.lerp(self.average_max, high, share)
            if new_low == self.min_val and new_high == self.max_val:
                histogram = histogram + self.histogram
            else:
                histogram = self._combine_histograms(
                    self.histogram, self.min_val, self.max_val, histogram, new_low, new_high
                )
        self.histogram.copy_(histogram)
        self.min_val.copy_(new_low)
        self.max_val.copy_(new_high)
        self.average_min.copy_(averages[0])
        self.average_max.copy_(averages[1])
        return x

    def hand_over(self, observer: Any) -> None:
        """Give another observer the state it would have, had it seen the same values."""
        average = isinstance(observer, MovingAverageMinMaxObserver)
        observer.min_val = (self.average_min if average else self.min_val).clone()
        observer.max_val = (self.average_max if average else self.max_val).clone()
        if isinstance(observer, HistogramObserver):
            observer.histogram = self.histogram.clone()


def _thin_out(x: Tensor) -> tuple[Tensor, float]:
    """Some of the values of `x`, evenly spaced in memory, and how many values each one stands for."""
    values = x.flatten()
    stride = max(1, len(values) // _MAX_COUNTED)
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1  # Otherwise some of the channels would be left out.
    counted = values[::stride]
    return counted, len(values) / len(counted)


class PercentileObserver(HistogramObserver):
    """The range that holds all but the fraction 1 - PERCENTILE of the values, cut off equally at both ends."""

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of the range."""
        edges = torch.linspace(float(self.min_val), float(self.max_val), self.bins + 1)
        share = self.histogram.double().cumsum(0) / self.histogram.double().sum()  # (bins,), below each right edge
        cut = (1 - PERCENTILE) / 2
        low = edges[int((share <= cut).sum())]
        high = edges[int((share < 1 - cut).sum()) + 1]
        return low, high


class MSEObserver(HistogramObserver):
    """The range whose grid has the least squared rounding and clipping error over all values seen.

    Nagel et al. 2021 (arXiv:2106.08295), section 3.1, eq. 8. torch's HistogramObserver minimizes it too, but for a
    grid of 256 steps whatever the number of bits, and it stops short of the optimum.
    """

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of the range."""
        low, high = self.min_val.double(), self.max_val.double()
        lows, highs = low * _FRACTIONS, high * _FRACTIONS
        # One end after the other: two rounds are enough, as the ends hardly depend on each other.
        for _ in range(2):
            if self.max_val > 0:
                high = highs[self._errors(low.expand_as(highs), highs).argmin()]
            if self.min_val < 0:
                low = lows[self._errors(lows, high.expand_as(lows)).argmin()]
        return low.float(), high.float()

    def _errors(self, low: Tensor, high: Tensor) -> Tensor:
        """Summed squared error [n] of each range from low [n] to high [n]."""
        step = (float(self.max_val) - float(self.min_val)) / self.bins
        values = float(self.min_val) + step * (torch.arange(self.bins, dtype=torch.float64) + 0.5)  # (bins,)
        quant_min, quant_max = self.quant_min, self.quant_max
        # Zero is always on the grid: Jacob et al. 2018 (arXiv:1712.05877), eq. 1.
        low, high = low.clamp_max(0).unsqueeze(1), high.clamp_min(0).unsqueeze(1)  # (n, 1)
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(self.eps.double())
        zero_point = (quant_min - low / scale).round()
        rounded = ((values / scale).round() + zero_point).clamp(quant_min, quant_max)  # (n, bins)
        return ((rounded - zero_point) * scale - values).square() @ self.histogram.double()
