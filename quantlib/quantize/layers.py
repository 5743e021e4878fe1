"""Layers whose weight is rounded."""

from __future__ import annotations

from torch import Tensor, nn

from quantlib.graph.fusion import recast


class QuantizedConv2d(nn.Conv2d):
    """A convolution that rounds its weight as it is used."""

    weight_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] to [N, out, H', W']."""
        return self._conv_forward(x, self.weight_quantizer(self.weight), self.bias)


class QuantizedLinear(nn.Linear):
    """A linear layer that rounds its weight as it is used."""

    weight_quantizer: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight_quantizer(self.weight), self.bias)


class EnclosedLayer(nn.Module):
    """A layer that is int8 by itself, inside a module that could not be traced."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, its input and output rounded."""
        y: Tensor = self.after(self.layer(self.before(x)))
        return y


def quantized(layer: nn.Conv2d | nn.Linear, weight_quantizer: nn.Module) -> QuantizedConv2d | QuantizedLinear:
    """A layer with the same parameters, whose weight is rounded."""
    if isinstance(layer, nn.Conv2d):
        return recast(layer, QuantizedConv2d, weight_quantizer=weight_quantizer)
    return recast(layer, QuantizedLinear, weight_quantizer=weight_quantizer)
