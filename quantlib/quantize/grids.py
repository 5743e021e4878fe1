"""int8 grids: where they lie, and rounding to them.

Affine map, Jacob et al. 2018 (arXiv:1712.05877), eq. 1: r = S(q - Z).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Below it, dividing by the step overflows; torch's own observers stop at the same.
_SMALLEST_STEP = torch.finfo(torch.float32).eps


class Grid(nn.Module):
    """Rounds its input to a grid of at most 256 steps: one for the tensor, or one for each channel of a weight.

    Args:
        scale: The step, [] or [channels].
        zero_point: The number of the step that is 0, in the same shape.
        quant_min: Number of the first step: 0 for activations, -128 for weights.
        quant_max: Number of the last step.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())
        self.register_buffer("zero_point", zero_point.to(torch.int32))
        self.quant_min, self.quant_max = quant_min, quant_max

    @property
    def range(self) -> tuple[float, float, float]:
        """Smallest and largest value, and the step; for activations only, which have one grid."""
        step, zero_point = float(self.scale), int(self.zero_point)
        return (self.quant_min - zero_point) * step, (self.quant_max - zero_point) * step, step

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded: float32, in the same shape."""
        if self.scale.dim():
            return torch.fake_quantize_per_channel_affine(
                x, self.scale, self.zero_point, 0, self.quant_min, self.quant_max
            )
        low, high, step = self.range
        dtype = torch.qint8 if self.quant_min < 0 else torch.quint8
        # torch's fake quantization gives the same but takes six times as long: it also computes a gradient mask.
        return torch.quantize_per_tensor(x.clamp(low, high), step, int(self.zero_point), dtype).dequantize()

    def steps(self, x: Tensor) -> Tensor:
        """`x` as numbers of steps, int8 or uint8, in the same shape."""
        shape = (-1, *[1] * (x.dim() - 1)) if self.scale.dim() else ()
        # Multiplied, as rounding does: a weight half-way between two steps must not go to different sides.
        steps = (x * self.scale.reciprocal().view(shape)).round() + self.zero_point.view(shape)
        return steps.clamp(self.quant_min, self.quant_max).to(torch.int8 if self.quant_min < 0 else torch.uint8)


def activation_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    """The unsigned grid of activations between two values; 0 is always on it."""
    quant_max = 2**bits - 1
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / quant_max).clamp_min(_SMALLEST_STEP)
    return Grid(scale, (-(low / scale).round()).clamp(0, quant_max), 0, quant_max)


def weight_grid(weight: Tensor, *, per_channel: bool) -> Grid:
    """The symmetric int8 grid of a weight [out, ...], or one of each output channel."""
    return symmetric_grid(largest_of(weight, per_channel=per_channel))


def largest_of(weight: Tensor, *, per_channel: bool) -> Tensor:
    """The largest absolute value of a weight [out, ...]: [], or [out] of each output channel."""
    weight = weight.detach()
    low, high = weight.flatten(1).aminmax(dim=1) if per_channel else weight.aminmax()
    return torch.maximum(-low, high)


def symmetric_grid(largest: Tensor) -> Grid:
    """The grid from -128 to 127 steps for values up to `largest`, [] or [channels]."""
    # The largest is half a step beyond the last: it is one of many, and every other step gets finer.
    scale = (largest / 127.5).clamp_min(_SMALLEST_STEP)
    return Grid(scale, torch.zeros_like(scale), -128, 127)
