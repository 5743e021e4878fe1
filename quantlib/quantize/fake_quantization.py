"""Fake quantization for training: rounding to grids that follow the values, with gradients inside them.

Built from operations that use the CPU's vector units: torch's own fused kernel, which computes the same, handles one
value at a time and takes more than twice as long.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.quantize.grids import Grid, activation_grid, largest_of, symmetric_grid
from quantlib.quantize.statistics import AVERAGING_CONSTANT


class ActivationFakeQuantize(nn.Module):
    """Fake quantization of an activation on one unsigned grid; its range is a moving average.

    Args:
        bits: 7 or 8.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.observes = True
        """Whether values change the grid."""
        self.fuses_relu = False
        """Whether it gets a ReLU's input and does the ReLU as well: a grid from 0 has no negative value.

        Nothing else may use that input: the gradient overwrites it.
        """
        self.register_buffer("min_val", torch.tensor(float("inf")))
        self.register_buffer("max_val", torch.tensor(float("-inf")))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self._set_grid(activation_grid(torch.zeros(()), torch.zeros(()), bits))

    def _set_grid(self, grid: Grid) -> None:
        self.scale, self.zero_point = grid.scale, grid.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Round `x`, of any shape, to the grid; while observing, `x` updates the grid first."""
        if self.observes:
            low, high = torch.aminmax(_as_stored(x.detach()))
            if self.fuses_relu:
                low, high = low.clamp_min(0), high.clamp_min(0)
            if math.isfinite(self.min_val):
                self.min_val.lerp_(low, AVERAGING_CONSTANT)
                self.max_val.lerp_(high, AVERAGING_CONSTANT)
            else:
                self.min_val.copy_(low)
                self.max_val.copy_(high)
            self._set_grid(activation_grid(self.min_val, self.max_val, self.bits))
        return _RoundToGrid.apply(x, self.scale.item(), self.zero_point.item(), 2**self.bits - 1, self.fuses_relu)

    def start_from(self, grid: Grid) -> None:
        """Take over a grid, and start the moving average from its range."""
        low, high, _ = grid.range
        self.min_val.fill_(low)
        self.max_val.fill_(high)
        self._set_grid(Grid(grid.scale.clone(), grid.zero_point.clone(), grid.quant_min, grid.quant_max))

    def grid(self) -> Grid:
        """The grid as it is now."""
        return Grid(self.scale.clone(), self.zero_point.clone(), 0, 2**self.bits - 1)


class WeightFakeQuantize(nn.Module):
    """Fake quantization of a weight on a symmetric int8 grid for the tensor, or one for each output channel.

    Args:
        num_channels: Of the weight.
        per_channel: Whether each has a grid of its own.
    """

    largest: Tensor

    def __init__(self, num_channels: int, *, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.observes = True
        """Whether the weight changes its grid."""
        self.register_buffer("largest", torch.zeros((num_channels,) if per_channel else ()))
        """Moving average of the largest absolute value, (C,) or (); 0: none yet."""

    def forward(self, weight: Tensor) -> Tensor:
        """Round `weight`, [C, …], to its grids; while observing, `weight` updates them first."""
        if self.observes:
            seen = largest_of(weight, per_channel=self.per_channel)
            self.largest.copy_(torch.where(self.largest > 0, self.largest.lerp(seen, AVERAGING_CONSTANT), seen))
        scale = symmetric_grid(self.largest).scale
        return _RoundToChannelGrids.apply(weight, scale.view(-1, *[1] * (weight.dim() - 1)) if scale.dim() else scale)

    def grid(self) -> Grid:
        """The grid as it is now."""
        return symmetric_grid(self.largest.clone())


def freeze_observers(model: nn.Module) -> None:
    """Keep every grid as it is from now on."""
    for module in model.modules():
        if isinstance(module, ActivationFakeQuantize | WeightFakeQuantize):
            module.observes = False


class _RoundToGrid(torch.autograd.Function):
    """Rounds to a grid of at most 256 steps; the gradient passes only inside the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, zero_point: int, quant_max: int, fuses_relu: bool) -> Tensor:
        """Round `x`, or with `fuses_relu` relu(x), in the same shape."""
        if fuses_relu and zero_point != 0:
            x = x.relu()
        ctx.save_for_backward(x)
        ctx.fuses_relu = fuses_relu
        # Values that round to the grid's ends are inside; with a ReLU, only those above 0.
        ctx.low = 0.0 if fuses_relu else (-zero_point - 0.5) * scale
        ctx.high = (quant_max - zero_point + 0.5) * scale
        rounded = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
        if quant_max != 255:
            # Clamped as bytes: a pass over a quarter of the memory.
            rounded = rounded.clamp(-zero_point * scale, (quant_max - zero_point) * scale)
        return rounded.dequantize()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient with respect to `x`; the grid gets none."""
        (x,) = ctx.saved_tensors
        hardtanh_backward = torch.ops.aten.hardtanh_backward
        if ctx.fuses_relu and gradient.stride() == x.stride():
            # Nothing else uses `x` (see `fuses_relu`), and writing where one just read takes two thirds of the time.
            # Not into another layout: earlier layers would sum up the gradient in a different order.
            by_x = hardtanh_backward.grad_input(gradient, x, ctx.low, ctx.high, grad_input=x)
        else:
            by_x = hardtanh_backward(gradient, x, ctx.low, ctx.high)
        return by_x, None, None, None, None


class _RoundToChannelGrids(torch.autograd.Function):
    """Rounds a weight to symmetric grids; the gradient passes only inside the grid."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor) -> Tensor:
        """Round `weight` [C, …], in the same shape; `scale` is [C, 1, …] or []."""
        steps = weight * scale.reciprocal()
        ctx.save_for_backward(steps)
        return steps.round().clamp_(-128, 127).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient with respect to `weight`; the grid gets none."""
        (steps,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, steps, -128.5, 127.5), None


def _as_stored(x: Tensor) -> Tensor:
    """A view of `x` with its dimensions in memory order, if that is channels last."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x
