"""The quantized model in torch's own int8 modules and kernels, which torch will remove: nothing else touches them."""

from __future__ import annotations

import copy
import operator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq

from quantlib.graph.nodes import CLIPPING, calls_layer, module_of
from quantlib.graph.plan import gives_new_values, is_sum
from quantlib.graph.tracing import untraced
from quantlib.quantize.grids import Grid
from quantlib.quantize.layers import EnclosedLayer, QuantizedConv2d, QuantizedLinear
from quantlib.quantize.preparation import is_int8


def to_native(quantized: fx.GraphModule) -> fx.GraphModule:
    """A model that computes in int8 what a quantized model computes in float.

    Its weights are packed for the engine in use (see `use_engine`), which must be in use when it runs, too.

    Args:
        quantized: As `quantize.conversion.convert` makes it.
    """
    return _Lowering(quantized).result()


class _Lowering:
    """Rewrites a graph, each tensor in int8, in float, or in both where both are read."""

    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.root: dict[str, Any] = {}
        """What the rewritten graph calls and reads, by path."""
        self.graph = fx.Graph()
        self.in_float: dict[fx.Node, fx.Node] = {}
        self.in_int8: dict[fx.Node, fx.Node] = {}

    def result(self) -> fx.GraphModule:
        """The rewritten model."""
        for node in self.model.graph.nodes:
            module = module_of(self.model, node)
            if isinstance(module, Grid):
                self.in_int8[node] = self._rounded(node, module)
            elif not is_int8(node):
                self.in_float[node] = self.graph.node_copy(node, self._float)
            elif not self._waits_for_grid(node):
                self.in_int8[node] = self.graph.node_copy(node, self._int8)
        # What stays as it is comes along: parameters that operations read, and modules that stay float.
        for node in self.graph.nodes:
            if node.op in {"call_module", "get_attr"} and node.target not in self.root:
                self.root[str(node.target)] = _with_native_layers(operator.attrgetter(str(node.target))(self.model))
        lowered = fx.GraphModule(self.root, self.graph, type(self.model).__name__)
        lowered.meta["untraced"] = untraced(self.model)
        return lowered.eval()

    def _waits_for_grid(self, node: fx.Node) -> bool:
        """Whether an int8 operation is written together with the grid of its output."""
        if calls_layer(self.model, node) or gives_new_values(node, self.model):
            return True
        return isinstance(module_of(self.model, node), CLIPPING) and all(
            isinstance(module_of(self.model, user), Grid) for user in node.users
        )

    def _rounded(self, node: fx.Node, grid: Grid) -> fx.Node:
        """A tensor in int8: the operation that gives it, or, of a float one, its rounding."""
        before = node.all_input_nodes[0]
        clip = module_of(self.model, before)
        if not is_int8(before):
            return self._call(node, nnq.Quantize(grid.scale, grid.zero_point, torch.quint8), self._float(before))
        if not isinstance(clip, CLIPPING):
            return self._operation(node, before, grid, relu=False)
        # uint8 itself cuts off what ReLU6 does, unless the last of its steps lies further out.
        if isinstance(clip, nn.ReLU) or (255 - int(grid.zero_point) - 0.5) * float(grid.scale) <= 6:
            return self._operation(node, before.all_input_nodes[0], grid, relu=True)
        unclipped = self._operation(node, before.all_input_nodes[0], grid, relu=False)
        # Not by torch's int8 ReLU6: on qnnpack it mixes up the channels of a tensor in channels-last order.
        clipped = self._call(node, nn.ReLU6(), self._call(node, nnq.DeQuantize(), unclipped, suffix="float"))
        return self._call(node, nnq.Quantize(grid.scale, grid.zero_point, torch.quint8), clipped)

    def _operation(self, place: fx.Node, node: fx.Node, grid: Grid, *, relu: bool) -> fx.Node:
        scale, zero_point = float(grid.scale), int(grid.zero_point)
        module = module_of(self.model, node)
        if isinstance(module, QuantizedConv2d | QuantizedLinear):
            return self._call(place, _packed(module, scale, zero_point, relu=relu), self._int8(node.all_input_nodes[0]))
        if isinstance(module, nn.Hardswish):
            return self._call(place, nnq.Hardswish(scale, zero_point), self._int8(node.all_input_nodes[0]))
        combined = nnq.QFunctional()
        combined.scale, combined.zero_point = scale, zero_point
        read = fx.node.map_arg(node.args, self._int8)
        if is_sum(node):
            return self._call(place, _Sum(combined, relu=relu), *read)
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return self._call(place, _Concatenation(combined, int(str(dim))), read[0])

    def _float(self, node: fx.Node) -> fx.Node:
        if node not in self.in_float:
            self.in_float[node] = self._call(node, nnq.DeQuantize(), self.in_int8[node], suffix="float")
        return self.in_float[node]

    def _int8(self, node: fx.Node) -> fx.Node:
        return self.in_int8[node] if node in self.in_int8 else self.in_float[node]

    def _call(self, place: fx.Node, module: nn.Module, *arguments: Any, suffix: str = "int8") -> fx.Node:
        path = f"{place.name.removeprefix('quantizers_')}_{suffix}"
        while path in self.root or hasattr(self.model, path):
            path += "_"
        self.root[path] = module
        return self.graph.call_module(path, arguments)


def _with_native_layers(kept: Any) -> Any:
    """What stays float, or a copy of it whose layers are int8, each by itself."""
    if not isinstance(kept, nn.Module) or not any(isinstance(each, EnclosedLayer) for each in kept.modules()):
        return kept
    copied = copy.deepcopy(kept)
    for path, module in list(copied.named_modules()):
        if isinstance(module, EnclosedLayer):
            before, layer, after = cast("tuple[Any, Any, Any]", (module.before, module.layer, module.after))
            quantize = nnq.Quantize(before.scale, before.zero_point, torch.quint8)
            packed = _packed(layer, float(after.scale), int(after.zero_point), relu=False)
            copied.set_submodule(path, nn.Sequential(quantize, packed, nnq.DeQuantize()))
    return copied


class _Sum(nn.Module):
    def __init__(self, functional: nnq.QFunctional, *, relu: bool) -> None:
        super().__init__()
        self.functional, self.relu = functional, relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of two int8 tensors."""
        return self.functional.add_relu(x, y) if self.relu else self.functional.add(x, y)


class _Concatenation(nn.Module):
    def __init__(self, functional: nnq.QFunctional, dim: int) -> None:
        super().__init__()
        self.functional, self.dim = functional, dim

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """int8 tensors side by side."""
        return self.functional.cat(tensors, self.dim)


def _packed(layer: QuantizedConv2d | QuantizedLinear, scale: float, zero_point: int, *, relu: bool) -> nn.Module:
    """Torch's int8 module for a layer whose output has a grid."""
    grid: Any = layer.weight_quantizer
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if grid.scale.dim():
        stored = torch.quantize_per_channel(weight, grid.scale, grid.zero_point, 0, torch.qint8)
    else:
        stored = torch.quantize_per_tensor(weight, float(grid.scale), int(grid.zero_point), torch.qint8)
    packed: Any
    if isinstance(layer, QuantizedConv2d):
        kind: Any = nniq.ConvReLU2d if relu else nnq.Conv2d
        packed = kind(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            _padding(layer),
            layer.dilation,
            layer.groups,
            bias is not None,
        )
    else:
        kind = nniq.LinearReLU if relu else nnq.Linear
        packed = kind(layer.in_features, layer.out_features, bias is not None)
    packed.set_weight_bias(stored, bias)
    packed.scale, packed.zero_point = scale, zero_point
    return packed


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    """Height and width, in numbers."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple(
            dilation * (size - 1) // 2 for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)
        )
    assert not isinstance(layer.padding, str)
    return layer.padding
