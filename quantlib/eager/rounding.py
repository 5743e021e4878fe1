"""Rounding to int8 grids in float, in place of observers and fake quantization."""

from typing import Any

import torch
from torch import nn

from quantlib.eager.modules import FakeQuantizeBase, ObserverBase


def fake_quantize_qat(prepared: nn.Module, *, weights: bool, activations: bool) -> None:
    """Make a quantization-aware trained model compute in float what int8 would, in place.

    Each fake quantization is replaced by rounding to the grid that `convert` takes, or by nothing. Its own would not
    do: for a symmetric range, torch's fused kernel has the step max/127, and torch's conversion 2 max/255.
    """
    for module in list(prepared.modules()):
        for name, wanted in (("weight_fake_quant", weights), ("activation_post_process", activations)):
            fake_quantize = getattr(module, name, None)
            if isinstance(fake_quantize, FakeQuantizeBase):
                setattr(module, name, FixedFakeQuantize(fake_quantize) if wanted else nn.Identity())


def fake_quantize_ptq(prepared: nn.Module, *, weights: bool, activations: bool) -> None:
    """Make a calibrated (PTQ) model compute in float what int8 would, in place.

    Weights are rounded to the int8 grid once; each observer is replaced by rounding to the grid it has found,
    or by nothing.
    """
    for module in list(prepared.modules()):
        observer = getattr(module, "activation_post_process", None)
        if isinstance(observer, ObserverBase):
            module.activation_post_process = FixedFakeQuantize(observer) if activations else nn.Identity()
        qconfig = getattr(module, "qconfig", None)
        if weights and qconfig is not None and isinstance(module, nn.Conv2d | nn.Linear):
            weight_observer = qconfig.weight()
            with torch.no_grad():
                weight_observer(module.weight)
                module.weight.copy_(FixedFakeQuantize(weight_observer)(module.weight))


class FixedFakeQuantize(nn.Module):
    """Rounds its input to the int8 grid that an observer has found.

    Affine map, Jacob et al. 2018 (arXiv:1712.05877), eq. 1: r = S(q - Z).
    """

    def __init__(self, observer: Any) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        self.scale: torch.Tensor = scale
        self.zero_point: torch.Tensor = zero_point.to(torch.int32)
        self.quant_min, self.quant_max = int(observer.quant_min), int(observer.quant_max)
        per_channel = observer.qscheme in {torch.per_channel_affine, torch.per_channel_symmetric}
        self.axis: int | None = int(observer.ch_axis) if per_channel else None

    @property
    def grid(self) -> tuple[float, float, float]:
        """Smallest and largest value, and the step; for activations only, which have one grid."""
        step, zero_point = float(self.scale), int(self.zero_point)
        return (self.quant_min - zero_point) * step, (self.quant_max - zero_point) * step, step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded: float32, in the same shape."""
        if self.axis is None:
            low, high, step = self.grid
            dtype = torch.qint8 if self.quant_min < 0 else torch.quint8
            # torch's fake quantization gives the same but takes six times as long: it also computes a gradient mask.
            return torch.quantize_per_tensor(x.clamp(low, high), step, int(self.zero_point), dtype).dequantize()
        return torch.fake_quantize_per_channel_affine(
            x, self.scale, self.zero_point, self.axis, self.quant_min, self.quant_max
        )
