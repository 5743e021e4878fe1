"""Fake quantization for training: what torch's fused kernel computes, in less than half the time.

torch's kernel handles one value at a time, copies a channels-last tensor to find its range, and loops over the
channels of a weight. Here the same grids and gradients are built from operations that use the CPU's vector units.
"""

from typing import Any

import torch
from torch import Tensor

from quantlib.eager.modules import FusedMovingAvgObsFakeQuantize

# SMALL_SCALE_THRESHOLD of aten/src/ATen/native/quantized/cpu/QuantUtils.h.
_SMALLEST_SCALE = 6.1e-5


class ActivationFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """Fake quantization of an activation on one unsigned grid; its range is a moving average."""

    fuses_relu = False
    """Whether it gets a ReLU's input and does the ReLU as well: a grid from 0 has no negative value.

    Nothing else may use that input: the gradient overwrites it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Round `x`, of any shape, to the grid; while observing, `x` updates the grid first."""
        observer: Any = self.activation_post_process
        if self.observer_enabled.item():
            ends = torch.stack(torch.aminmax(_as_stored(x.detach())))
            # The range of a tensor is the range of its two ends, which torch's own kernel then folds into the average.
            torch.fused_moving_avg_obs_fake_quant(
                ends.clamp_min(0) if self.fuses_relu else ends,
                self.observer_enabled,
                self.fake_quant_enabled,
                observer.min_val,
                observer.max_val,
                self.scale,
                self.zero_point,
                observer.averaging_constant,
                observer.quant_min,
                observer.quant_max,
                self.ch_axis,
                self.is_per_channel,
                self.is_symmetric_quant,
            )
        grid = (self.scale.item(), self.zero_point.item(), observer.quant_min, observer.quant_max)
        return _RoundToGrid.apply(x, *grid, self.fuses_relu)


class WeightFakeQuantize(FusedMovingAvgObsFakeQuantize):
    """Fake quantization of a weight on one symmetric int8 grid per output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        """Round `weight`, [C, …], to its grids; while observing, `weight` updates them first."""
        observer: Any = self.activation_post_process
        if self.observer_enabled.item():
            low, high = weight.detach().flatten(1).aminmax(dim=1)  # (C,)
            if observer.min_val.numel() == 0:
                observer.min_val.resize_(low.shape).copy_(low)
                observer.max_val.resize_(high.shape).copy_(high)
            else:
                observer.min_val.add_(observer.averaging_constant * (low - observer.min_val))
                observer.max_val.add_(observer.averaging_constant * (high - observer.max_val))
            # A symmetric grid as torch's kernel chooses it: each end is reached by its own outermost step.
            scale = torch.maximum(observer.min_val / observer.quant_min, observer.max_val / observer.quant_max)
            self.scale.resize_(scale.shape).copy_(scale.clamp_min(_SMALLEST_SCALE))
            self.zero_point.resize_(scale.shape).zero_()
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        return _RoundToChannelGrids.apply(weight, scale, observer.quant_min, observer.quant_max)


class _RoundToGrid(torch.autograd.Function):
    """Rounds to a grid of at most 256 steps; the gradient passes only inside the grid."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, fuses_relu: bool
    ) -> Tensor:
        """Round `x`, or with `fuses_relu` relu(x), in the same shape."""
        if fuses_relu and zero_point != quant_min:
            x = x.relu()
        ctx.save_for_backward(x)
        ctx.fuses_relu = fuses_relu
        # Values that round to the grid's ends are inside; with a ReLU, only those above 0.
        ctx.low = 0.0 if fuses_relu else (quant_min - zero_point - 0.5) * scale
        ctx.high = (quant_max - zero_point + 0.5) * scale
        rounded = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
        if (quant_min, quant_max) != (0, 255):
            # Clamped as bytes: a pass over a quarter of the memory.
            rounded = rounded.clamp((quant_min - zero_point) * scale, (quant_max - zero_point) * scale)
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
        return by_x, None, None, None, None, None


class _RoundToChannelGrids(torch.autograd.Function):
    """Rounds each channel to its symmetric grid; the gradient passes only inside the grid."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
        """Round `weight` [C, …], in the same shape; `scale` is [C, 1, …]."""
        steps = weight * scale.reciprocal()
        ctx.save_for_backward(steps)
        ctx.low, ctx.high = quant_min - 0.5, quant_max + 0.5
        return steps.round().clamp_(quant_min, quant_max).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradient with respect to `weight`; the grid gets none."""
        (steps,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, steps, ctx.low, ctx.high), None, None, None


def _as_stored(x: Tensor) -> Tensor:
    """A view of `x` with its dimensions in memory order, if that is channels last."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 and not x.is_contiguous() else x
