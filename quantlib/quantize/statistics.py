"""What calibration collects of each activation: one pass over the images serves every way to choose a range."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# Weight that a moving average gives to the range of a new batch.
AVERAGING_CONSTANT = 0.01
NUM_BINS = 2048
# The most values of one activation and batch that enter its histogram, evenly spaced over all channels:
# MobileNetV2 has 2e8 values for 30 images of 224 px, and counting them all takes longer than computing them.
_MAX_COUNTED = 2**17


class ActivationStatistics(nn.Module):
    """Observes the values that pass through: their extremes, averages of each batch's extremes, and a histogram."""

    min_val: Tensor
    max_val: Tensor
    average_min: Tensor
    average_max: Tensor
    histogram: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("min_val", "average_min"):
            self.register_buffer(name, torch.tensor(float("inf")))
        for name in ("max_val", "average_max"):
            self.register_buffer(name, torch.tensor(float("-inf")))
        self.register_buffer("histogram", torch.zeros(NUM_BINS))

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
        new_low, new_high = torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)
        histogram = weight * torch.histc(counted, NUM_BINS, min=float(new_low), max=float(new_high))
        if first:
            self.average_min.copy_(low)
            self.average_max.copy_(high)
        else:
            self.average_min.lerp_(low, AVERAGING_CONSTANT)
            self.average_max.lerp_(high, AVERAGING_CONSTANT)
            histogram += self._rebinned(float(new_low), float(new_high))
        self.histogram.copy_(histogram)
        self.min_val.copy_(new_low)
        self.max_val.copy_(new_high)
        return x

    def _rebinned(self, low: float, high: float) -> Tensor:
        """The histogram so far in the bins of a wider range; values are taken as spread evenly over their bin."""
        own_low, own_high = float(self.min_val), float(self.max_val)
        if (own_low, own_high) == (low, high):
            return self.histogram
        below = torch.cat([torch.zeros(1, dtype=torch.float64), self.histogram.double().cumsum(0)])
        edges = torch.linspace(low, high, NUM_BINS + 1, dtype=torch.float64)
        if own_low == own_high:
            # All in one point: in the bin that holds it.
            found = (edges > own_low).double() * below[-1]
        else:
            position = ((edges - own_low) / (own_high - own_low)).clamp(0, 1) * NUM_BINS
            left = position.floor().clamp_max(NUM_BINS - 1).long()
            found = torch.lerp(below[left], below[left + 1], position - left)
        found[0], found[-1] = 0.0, below[-1]
        return found.diff().float()


def _thin_out(x: Tensor) -> tuple[Tensor, float]:
    """Some of the values of `x`, evenly spaced in memory, and how many values each one stands for."""
    values = x.flatten()
    stride = max(1, len(values) // _MAX_COUNTED)
    while math.gcd(stride, x.shape[-1]) > 1:
        stride += 1  # Otherwise some of the channels would be left out.
    counted = values[::stride]
    return counted, len(values) / len(counted)
