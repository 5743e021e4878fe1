"""Cross-layer equalization: channels rescaled from layer to layer, so that one int8 scale suits all of them.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1. ReLU, pooling and addition pass a positive factor per channel
through unchanged: if a layer's output is divided by the factors and the next layer's weights are multiplied by them,
the model computes the same function.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError
from quantlib.graph.plan import ADDITIONS

Layer = nn.Conv2d | nn.Linear

# Rounds continue until no factor in a round is further from 1 than this: MobileNetV2 takes 5.
_CONVERGED = 1e-3
_MAX_ROUNDS = 100
# Float32 rounding of MobileNetV2's logits, rescaled by factors of up to 1000, stays ten times below this.
_MAX_CHANGE = 1e-4

# f(s x) = s f(x) for each s > 0, channel by channel.
_HOMOGENEOUS_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Flatten,
)
_HOMOGENEOUS_FUNCTIONS = {
    torch.flatten,
    nn.functional.leaky_relu,
    nn.functional.avg_pool2d,
    nn.functional.max_pool2d,
    nn.functional.adaptive_avg_pool2d,
    nn.functional.adaptive_max_pool2d,
}
_HOMOGENEOUS_METHODS = {"flatten", "contiguous"}


@dataclass
class Producer:
    """A layer whose output is rescaled, and the BatchNorm after it, unless that is folded."""

    layer: Layer
    batch_norm: nn.BatchNorm2d | None = None

    def weight(self) -> Tensor:
        """The weight with BatchNorm folded in: [out_channels, ...], float64."""
        weight = self.layer.weight.detach().double()
        norm = self.batch_norm
        if norm is None:
            return weight
        assert norm.running_var is not None
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.affine:
            factor = factor * norm.weight.detach().double()
        return weight * factor.view(-1, *[1] * (weight.dim() - 1))

    def can_rescale(self) -> bool:
        """Whether its output can be rescaled per channel."""
        return self.batch_norm is None or (self.batch_norm.affine and self.batch_norm.running_var is not None)

    def divide(self, factors: Tensor) -> None:
        """Divide each output channel by its factor; factors [out_channels]."""
        scaled: nn.Module = self.layer if self.batch_norm is None else self.batch_norm
        for parameter in (scaled.weight, scaled.bias):
            if parameter is not None:
                assert isinstance(parameter, nn.Parameter)
                shape = (-1, *[1] * (parameter.dim() - 1))
                parameter.data = (parameter.detach().double() / factors.view(shape)).to(parameter.dtype)


@dataclass(eq=False)
class ScaleGroup:
    """Tensors that can only be rescaled together, channel by channel, by the same factors."""

    producers: list[Producer] = field(default_factory=list)
    consumers: list[Layer] = field(default_factory=list)
    fixed: bool = False
    """Something else reads or produces one of the tensors: the model's input, its output, an unknown operation."""

    def can_rescale(self) -> bool:
        """Whether the factors can be chosen freely, and it is certain which weights absorb them."""
        channels = {producer.layer.weight.shape[0] for producer in self.producers}
        channels |= {_in_channels(layer) for layer in self.consumers}
        return (
            not self.fixed
            and bool(self.producers)
            and bool(self.consumers)
            and len(channels) == 1
            and all(producer.can_rescale() for producer in self.producers)
        )


def equalize(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """Copy a float model with the channel ranges of consecutive layers made equal; it computes the same function.

    Args:
        model: Float, fused in mode "eval" or not fused; BatchNorm that is not folded absorbs the factors, so
            the model can still be fused for training.
        input_shape: Channels, height and width of the model's input.

    Raises:
        ModelError: If the copy computes something else, because the model uses its layers differently from what its
            structure shows.
    """
    equal = copy.deepcopy(model).eval()
    groups = [group for group in find_scale_groups(equal) if group.can_rescale()]
    with torch.no_grad():
        for _ in range(_MAX_ROUNDS):
            if not groups or max(_equalize(group) for group in groups) < _CONVERGED:
                break
    _check_same(model, equal, input_shape)
    return equal.train(model.training)


def find_scale_groups(model: fx.GraphModule) -> list[ScaleGroup]:
    """Group a model's tensors by which must be rescaled together, from the graph of its operations."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    uses: dict[int, int] = {}
    for path in paths:
        module = model.get_submodule(path)
        uses[id(module)] = uses.get(id(module), 0) + 1
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    shared = {key for key, count in uses.items() if count > 1}
    # What owns tied weights is shared as well.
    shared |= {
        id(module)
        for _, module in model.named_modules()
        if any(id(parameter) in shared for parameter in module.parameters(recurse=False))
    }
    return _ScaleGroups(model, shared).found()


class _ScaleGroups:
    """Follows a graph's tensors from layer to layer."""

    def __init__(self, model: fx.GraphModule, shared: set[int]) -> None:
        self.modules = dict(model.named_modules())
        self.graph = model.graph
        targets = [node.target for node in self.graph.nodes if node.op == "call_module"]
        repeated = {id(self.modules[str(t)]) for t in targets if targets.count(t) > 1}
        # A layer that runs twice, or whose parameters are also read elsewhere, cannot be rescaled for one use alone.
        read = {str(node.target).rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        self.untouchable = shared | repeated | {id(self.modules[name]) for name in read if name in self.modules}
        self.group_of: dict[fx.Node, ScaleGroup] = {}

    def found(self) -> list[ScaleGroup]:
        """Every group of the graph, in the order of its nodes."""
        for node in self.graph.nodes:
            self.group_of[node] = self._visit(node)
        return list(dict.fromkeys(self.group_of.values()))

    def _visit(self, node: fx.Node) -> ScaleGroup:
        """The group of a node's output."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        inputs = list(node.all_input_nodes)
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._layer(module, inputs)
        if isinstance(module, nn.BatchNorm2d) and self._follows_layer(node):
            return self._batch_norm(module, inputs[0])
        if len(inputs) == 1 and self._is_homogeneous(node, module):
            return self.group_of[inputs[0]]
        if len(inputs) == 2 and self._is_addition(node):
            return self._join(*inputs)
        if node.op == "call_method" and node.target == "size":
            return ScaleGroup(fixed=True)  # A number; it does not change with the factors.
        for tensor in inputs:
            self.group_of[tensor].fixed = True
        return ScaleGroup(fixed=True)

    def _layer(self, layer: Layer, inputs: list[fx.Node]) -> ScaleGroup:
        before, after = self.group_of[inputs[0]], ScaleGroup()
        if id(layer) in self.untouchable or len(inputs) != 1:
            before.fixed = after.fixed = True
        before.consumers.append(layer)
        after.producers.append(Producer(layer))
        return after

    def _follows_layer(self, node: fx.Node) -> bool:
        before = node.all_input_nodes[0]
        layer = self.modules.get(str(before.target)) if before.op == "call_module" else None
        return isinstance(layer, nn.Conv2d) and len(before.users) == 1 and len(node.all_input_nodes) == 1

    def _batch_norm(self, norm: nn.BatchNorm2d, before: fx.Node) -> ScaleGroup:
        """The layer's output before BatchNorm keeps its range; BatchNorm's output is rescaled instead."""
        (producer,) = self.group_of[before].producers
        fixed = self.group_of[before].fixed or id(norm) in self.untouchable
        self.group_of[before].fixed = True
        return ScaleGroup([Producer(producer.layer, norm)], fixed=fixed)

    def _is_homogeneous(self, node: fx.Node, module: nn.Module | None) -> bool:
        if node.op == "call_module":
            return isinstance(module, _HOMOGENEOUS_MODULES)
        if node.op == "call_function":
            return node.target in _HOMOGENEOUS_FUNCTIONS or (node.target is torch.mean and _over_pixels(node))
        return node.op == "call_method" and (
            node.target in _HOMOGENEOUS_METHODS or (node.target == "mean" and _over_pixels(node))
        )

    def _is_addition(self, node: fx.Node) -> bool:
        return node.target in ADDITIONS and not node.kwargs

    def _join(self, first: fx.Node, second: fx.Node) -> ScaleGroup:
        """Both terms of a sum are rescaled alike, as is the sum."""
        one, other = self.group_of[first], self.group_of[second]
        if one is other:
            return one
        one.producers += other.producers
        one.consumers += other.consumers
        one.fixed = one.fixed or other.fixed
        for node, group in self.group_of.items():
            if group is other:
                self.group_of[node] = one
        return one


def _over_pixels(node: fx.Node) -> bool:
    """Whether a mean is taken over height and width alone."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, list | tuple) and set(dims) in ({2, 3}, {-1, -2})


def _in_channels(layer: Layer) -> int:
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features


def _by_input(layer: Layer, weight: Tensor) -> Tensor:
    """A layer's weight as [groups, out_channels / groups, in_channels / groups, pixels]."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _equalize(group: ScaleGroup) -> float:
    """Rescale a group's channels; returns how far from 1 the furthest factor was, as a natural logarithm.

    Eq. 11 of the paper, s_i = sqrt(r1_i r2_i) / r2_i, with the largest range if there are several layers.
    """
    out_range = torch.stack([p.weight().flatten(1).abs().amax(1) for p in group.producers]).amax(0)  # (channels,)
    in_range = torch.stack(
        [_by_input(layer, layer.weight.detach().double()).abs().amax((1, 3)).flatten() for layer in group.consumers]
    ).amax(0)  # (channels,)
    # A channel with only zero weights on one side has nothing to equalize.
    dead = (out_range == 0) | (in_range == 0)
    factors = torch.where(dead, 1.0, (out_range / in_range.clamp_min(1e-300)).sqrt())
    for producer in group.producers:
        producer.divide(factors)
    for layer in group.consumers:
        weight = layer.weight.detach().double()
        by_input = _by_input(layer, weight)
        groups, channels = by_input.shape[0], by_input.shape[2]
        scaled = by_input * factors.view(groups, 1, channels, 1)
        layer.weight.data = scaled.reshape(weight.shape).to(layer.weight.dtype)
    return float(factors.clamp_min(1e-300).log().abs().max())


def _check_same(model: nn.Module, equal: nn.Module, input_shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *input_shape, generator=generator)
    original = copy.deepcopy(model).eval()
    with torch.inference_mode():
        logits = original(x)
        change = float((equal(x) - logits).abs().max() / logits.abs().max().clamp_min(1.0))
    if not change <= _MAX_CHANGE:
        raise ModelError(
            f"Equalization changed the model's logits by {change:.1e} (rounding explains at most {_MAX_CHANGE:.0e}): "
            "its forward() uses layers in a way that their order does not show. Set equalize = false in the recipe."
        )
