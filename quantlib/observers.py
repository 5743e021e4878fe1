"""Observers of activation ranges that torch has not: a percentile, and the least squared error."""

import torch
from torch import Tensor

from quantlib import backend

# Of all values, this fraction lies inside the range: 99.99%, as Wu et al. 2020 (arXiv:2004.09602), section 4.2.
PERCENTILE = 0.9999
# Ranges that are tried, as fractions of the largest seen; an optimum lies far above the least of them.
_FRACTIONS = torch.linspace(0.1, 1.0, 91)


class PercentileObserver(backend.HistogramObserver):
    """The range that holds all but the fraction 1 - PERCENTILE of the values, cut off at both ends alike."""

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of the range."""
        edges = torch.linspace(float(self.min_val), float(self.max_val), self.bins + 1)
        share = self.histogram.double().cumsum(0) / self.histogram.double().sum()  # (bins,), below each right edge
        cut = (1 - PERCENTILE) / 2
        low = edges[int((share <= cut).sum())]
        high = edges[int((share < 1 - cut).sum()) + 1]
        return low, high


class MSEObserver(backend.HistogramObserver):
    """The range whose grid has the least squared rounding and clipping error over what was seen.

    Nagel et al. 2021 (arXiv:2106.08295), section 3.1, eq. 8. torch's HistogramObserver minimizes it too, but for a
    grid of 256 steps whatever the number of bits, and not down to the optimum.
    """

    def _non_linear_param_search(self) -> tuple[Tensor, Tensor]:
        """Least and largest value of the range."""
        low, high = self.min_val.double(), self.max_val.double()
        lows, highs = low * _FRACTIONS, high * _FRACTIONS
        # One end after the other: two rounds are enough, as the ends hardly depend on one another.
        for _ in range(2):
            if self.max_val > 0:
                high = highs[self._errors(low.expand_as(highs), highs).argmin()]
            if self.min_val < 0:
                low = lows[self._errors(lows, high.expand_as(lows)).argmin()]
        return low.float(), high.float()

    def _errors(self, low: Tensor, high: Tensor) -> Tensor:
        """Summed squared error of each range, low [n] and high [n] to [n]."""
        step = (float(self.max_val) - float(self.min_val)) / self.bins
        values = float(self.min_val) + step * (torch.arange(self.bins, dtype=torch.float64) + 0.5)  # (bins,)
        quant_min, quant_max = self.quant_min, self.quant_max
        # Zero is always on the grid: Jacob et al. 2018 (arXiv:1712.05877), eq. 1.
        low, high = low.clamp_max(0).unsqueeze(1), high.clamp_min(0).unsqueeze(1)  # (n, 1)
        scale = ((high - low) / (quant_max - quant_min)).clamp_min(self.eps.double())
        zero_point = (quant_min - low / scale).round()
        rounded = ((values / scale).round() + zero_point).clamp(quant_min, quant_max)  # (n, bins)
        return ((rounded - zero_point) * scale - values).square() @ self.histogram.double()
