"""The float twin of an int8 model: the same weights and grids, in operations that every exporter knows."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

_CONVOLUTIONS = (nnq.Conv2d, nniq.ConvReLU2d)
_LINEARS = (nnq.Linear, nniq.LinearReLU)


class Round(nn.Module):
    """Rounds to one uint8 grid."""

    def __init__(self, scale: Any, zero_point: Any) -> None:
        super().__init__()
        self.scale, self.zero_point = float(scale), int(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded, float32."""
        return torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8).dequantize()


class _Sum(nn.Module):
    """FloatFunctional's operations, each rounded."""

    def __init__(self, scale: Any, zero_point: Any) -> None:
        super().__init__()
        self.round = Round(scale, zero_point)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add two tensors."""
        return self.round(x + y)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """relu(x + y)."""
        return self.round(torch.relu(x + y))

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """Multiply two tensors."""
        return self.round(x * y)

    def cat(self, tensors: list[Tensor], dim: int = 0) -> Tensor:
        """torch.cat(tensors, dim)."""
        return self.round(torch.cat(tensors, dim))


def float_twin(int8: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """A float model that computes what an int8 one does, and the int8 weights of its layers.

    Args:
        int8: As `converting.convert` makes it.

    Returns:
        The twin, whose layers hold dequantized weights; and the quantized weight of each layer, [out, ...] qint8.
    """
    twin, weights = copy.deepcopy(int8), []
    modules: list[tuple[str, Any]] = list(twin.named_modules())
    own: nn.Module
    for path, module in modules:
        if isinstance(module, _CONVOLUTIONS + _LINEARS):
            own = _layer(module)
            weights.append(module.weight())  # type: ignore[no-untyped-call]
        elif isinstance(module, nnq.QFunctional):
            own = _Sum(module.scale, module.zero_point)
        elif isinstance(module, nnq.Quantize):
            own = Round(module.scale, module.zero_point)
        elif isinstance(module, nnq.Hardswish):
            own = nn.Sequential(nn.Hardswish(), Round(module.scale, module.zero_point))
        elif isinstance(module, nnq.ReLU6):
            own = nn.ReLU6()
        elif isinstance(module, nnq.DeQuantize | nnq.Dropout):
            own = nn.Identity()
        else:
            continue
        twin.set_submodule(path, own)
    return twin.eval(), weights


def _layer(module: Any) -> nn.Sequential:
    """A layer, its ReLU where it has one, and the rounding of its output."""
    weight, bias = module.weight(), module.bias()
    layer: nn.Conv2d | nn.Linear
    if isinstance(module, _CONVOLUTIONS):
        layer = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            bias is not None,
        )
    else:
        layer = nn.Linear(module.in_features, module.out_features, bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight.dequantize())
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[union-attr]
    relu = [nn.ReLU()] if isinstance(module, nniq.ConvReLU2d | nniq.LinearReLU) else []
    return nn.Sequential(layer, *relu, Round(module.scale, module.zero_point))
