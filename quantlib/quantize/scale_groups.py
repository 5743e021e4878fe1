"""Which tensors of a float model can be rescaled together, channel by channel, while it computes the same function.

Each tensor is followed as the numbers of its channels: an operation that moves values moves these numbers, and one that
mixes values is followed only if all that it mixes have one number. So a tie is used only if the graph shows it exactly.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from quantlib.graph.nodes import call, is_layer, module_of
from quantlib.graph.plan import ADDITIONS

Layer = nn.Conv2d | nn.Linear
Norm = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm

# f(s x) = s f(x) for each s > 0, value by value.
_HOMOGENEOUS_MODULES = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout2d)
_HOMOGENEOUS_FUNCTIONS = {nn.functional.leaky_relu, "contiguous"}
_POOLING_MODULES = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOLING_FUNCTIONS = {
    nn.functional.avg_pool2d,
    nn.functional.max_pool2d,
    nn.functional.adaptive_avg_pool2d,
    nn.functional.adaptive_max_pool2d,
}
_MEANS = {torch.mean, "mean"}
_MOVING_MODULES = (nn.Flatten, nn.ChannelShuffle)
_MOVING_FUNCTIONS = {
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split, torch.unbind, torch.roll),
    *("flatten", "reshape", "view", "permute", "transpose", "chunk", "split", "unbind", "roll"),
    operator.getitem,
}
_PRODUCTS = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__"}


@dataclass(eq=False)
class Producer:
    """A layer or a norm whose output is rescaled, and the BatchNorm after it, unless that is folded."""

    layer: Layer | Norm
    batch_norm: nn.BatchNorm2d | None = None

    def range(self) -> Tensor:
        """The largest weight of each channel; [channels], float64."""
        largest = self.layer.weight.detach().flatten(1).abs().amax(1).double()
        norm = self.batch_norm
        if norm is None:
            return largest
        assert norm.running_var is not None
        factor = (norm.running_var.double() + norm.eps).rsqrt()
        return largest * (factor * norm.weight.detach().double() if norm.affine else factor).abs()

    def can_rescale(self) -> bool:
        """Whether its output can be rescaled per channel."""
        return self.batch_norm is None or (self.batch_norm.affine and self.batch_norm.running_var is not None)

    def divide(self, factors: Tensor) -> None:
        """Divide each output channel by its factor; factors [channels]."""
        scaled: nn.Module = self.layer if self.batch_norm is None else self.batch_norm
        for parameter in (scaled.weight, getattr(scaled, "bias", None)):
            if parameter is not None:
                assert isinstance(parameter, nn.Parameter)
                shape = (-1, *[1] * (parameter.dim() - 1))
                parameter.data = (parameter.detach().double() / factors.view(shape)).to(parameter.dtype)


@dataclass(eq=False)
class Consumer:
    """A layer that reads rescaled channels: its weights absorb the factors."""

    layer: Layer
    channels: Tensor
    """The group's channel that each of its inputs is, [in_channels]."""

    def range(self, num_channels: int, *, per_channel: bool = False) -> Tensor:
        """The largest weight of each of the group's channels, 0 for those that it does not read; float64.

        With `per_channel`, as a share of the largest for the same output, which such weights have a scale for.
        """
        weight = self._by_input().abs()
        if per_channel:
            weight = weight / weight.amax((2, 3), keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        by_input = weight.amax(1).amax(-1).flatten().double()
        return by_input.new_zeros(num_channels).scatter_reduce(0, self.channels, by_input, "amax")

    def multiply(self, factors: Tensor) -> None:
        """Multiply its weights by the factors [channels] of the inputs that they are for."""
        by_input = self._by_input()
        by_input *= factors[self.channels].to(by_input.dtype).view(by_input.shape[0], 1, by_input.shape[2], 1)

    def _by_input(self) -> Tensor:
        """A view of its weight as [groups, out_channels / groups, in_channels / groups, pixels]."""
        weight = self.layer.weight.data
        groups = self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1
        return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


@dataclass(eq=False)
class ScaleGroup:
    """Channels of tensors that can only be rescaled together, by the same factor per channel."""

    fixed: Tensor
    """[channels], bool: something else reads or produces the channel, such as the model's output."""
    producers: list[Producer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    tensors: dict[fx.Node, Tensor] = field(default_factory=dict)
    """The channel that each value of a tensor belongs to, in its own shape, by the operation that gives the tensor."""

    def can_rescale(self) -> bool:
        """Whether any factor can be chosen freely."""
        return bool(self.consumers) and not self.fixed.all() and all(each.can_rescale() for each in self.producers)

    @property
    def norms(self) -> list[Producer]:
        """Those of the producers that are norms."""
        return [each for each in self.producers if is_norm(each.layer)]


@dataclass
class _Tied:
    """A tensor whose channels belong to a group; or several tensors, as chunk() gives."""

    group: ScaleGroup
    channels: Any
    """The channel that each value belongs to: int64, in the tensor's own shape."""

    def fix(self) -> None:
        """Note that something reads these channels that cannot absorb a factor."""
        for channels in self.channels if isinstance(self.channels, Sequence) else [self.channels]:
            self.group.fixed[channels] = True


def is_norm(module: nn.Module | None) -> TypeGuard[Norm]:
    """Whether a module normalizes an image's own values, and then scales them per channel."""
    # A class derived from one of them may do something else.
    return type(module) in {nn.LayerNorm, nn.RMSNorm, nn.GroupNorm}


def find_scale_groups(model: fx.GraphModule) -> list[ScaleGroup]:
    """Group a model's channels by which must be rescaled together, from the graph of its operations."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    uses: Counter[int] = Counter()
    for path in paths:
        module = model.get_submodule(path)
        uses.update([id(module), *(id(parameter) for parameter in module.parameters(recurse=False))])
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
        self.model, self.graph = model, model.graph
        modules = dict(model.named_modules())
        targets = [node.target for node in self.graph.nodes if node.op == "call_module"]
        repeated = {id(modules[str(t)]) for t in targets if targets.count(t) > 1}
        # A layer that runs twice, or whose parameters are also read elsewhere, cannot be rescaled for one use alone.
        read = {str(node.target).rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        self.untouchable = shared | repeated | {id(modules[name]) for name in read if name in modules}
        self.tied: dict[fx.Node, _Tied] = {}

    def found(self) -> list[ScaleGroup]:
        """Every group of the graph, in the order of its nodes."""
        for node in self.graph.nodes:
            tied = self._visit(node)
            if tied is not None:
                self.tied[node] = tied
        for node, tied in self.tied.items():
            if isinstance(tied.channels, Tensor):
                tied.group.tensors[node] = tied.channels
        return list(dict.fromkeys(tied.group for tied in self.tied.values()))

    def _visit(self, node: fx.Node) -> _Tied | None:
        """The group of a node's output; None if it cannot be rescaled."""
        module = module_of(self.model, node)
        inputs = node.all_input_nodes
        if is_layer(module) and len(inputs) == 1 and id(module) not in self.untouchable:
            self._consume(module, inputs[0])
            return self._produce(node, module)
        if isinstance(module, nn.BatchNorm2d) and self._follows_layer(node):
            return self._batch_norm(node, module)
        if is_norm(module) and id(module) not in self.untouchable:
            self._fix(inputs)
            affine = isinstance(module.weight, nn.Parameter) and module.weight.dim() == 1
            return self._produce(node, module) if affine else None
        target = node.target if module is None else None  # A module's path may be the name of a method.
        if len(inputs) == 2 and target in ADDITIONS and not node.kwargs:
            return self._join(*inputs)
        if target in {"size", "dim"}:
            return None  # A number; it does not change with the factors.
        source = _source(node)
        carried = self._carried(node, module, self.tied[source]) if source in self.tied else None
        self._fix(each for each in inputs if carried is None or each is not source)
        return carried

    def _fix(self, nodes: Any) -> None:
        for node in nodes:
            if node in self.tied:
                self.tied[node].fix()

    def _consume(self, layer: Layer, node: fx.Node) -> None:
        tied = self.tied.get(node)
        if tied is None:
            return
        lines = tied.channels.movedim(1 if isinstance(layer, nn.Conv2d) else -1, -1).flatten(0, -2)
        if bool((lines == lines[0]).all()):
            tied.group.consumers.append(Consumer(layer, lines[0].clone()))
        else:
            tied.fix()

    def _produce(self, node: fx.Node, layer: Layer | Norm, batch_norm: nn.BatchNorm2d | None = None) -> _Tied | None:
        if "shape" not in node.meta:
            return None
        shape, num_channels = node.meta["shape"], len(layer.weight)
        after = len(shape) - 2 if isinstance(layer, nn.Conv2d | nn.GroupNorm) else 0
        numbers = torch.arange(num_channels).view(-1, *[1] * after).expand(shape)
        return _Tied(ScaleGroup(torch.zeros(num_channels, dtype=torch.bool), [Producer(layer, batch_norm)]), numbers)

    def _follows_layer(self, node: fx.Node) -> bool:
        before = node.all_input_nodes[0]
        return isinstance(module_of(self.model, before), nn.Conv2d) and len(before.users) == 1 and before in self.tied

    def _batch_norm(self, node: fx.Node, norm: nn.BatchNorm2d) -> _Tied | None:
        """The layer's output before BatchNorm keeps its range; BatchNorm's output is rescaled instead."""
        (before,) = node.all_input_nodes
        self.tied[before].fix()
        layer: Any = module_of(self.model, before)
        return None if id(norm) in self.untouchable else self._produce(node, layer, norm)

    def _join(self, first: fx.Node, second: fx.Node) -> _Tied | None:
        """Both terms of a sum are rescaled alike, as is the sum."""
        one, other = self.tied.get(first), self.tied.get(second)
        if one is None or other is None or not _same(one, other):
            self._fix([first, second])
            return None
        group, joined = one.group, other.group
        if group is not joined:
            group.producers += joined.producers
            group.consumers += joined.consumers
            group.fixed |= joined.fixed
            for tied in self.tied.values():
                if tied.group is joined:
                    tied.group = group
        return _Tied(group, one.channels)

    def _carried(self, node: fx.Node, module: nn.Module | None, before: _Tied) -> _Tied | None:
        """The tensor behind an operation that passes factors per channel through unchanged."""
        try:
            channels = self._follow(node, module, before.channels)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, LookupError):
            return None  # As it would be for other shapes, or with values that are not known.
        shape = getattr(channels, "shape", None)
        return None if channels is None or shape != node.meta.get("shape") else _Tied(before.group, channels)

    def _follow(self, node: fx.Node, module: nn.Module | None, channels: Any) -> Any:
        """The channels of the output's values; None if they are not those of single inputs."""
        target: Any = node.target if module is None else None
        if isinstance(module, _HOMOGENEOUS_MODULES) or target in _HOMOGENEOUS_FUNCTIONS:
            return channels
        if isinstance(module, _POOLING_MODULES) or target in _POOLING_FUNCTIONS:
            return _mixed(channels, (-2, -1)).expand(node.meta["shape"])
        if target in _PRODUCTS or target is nn.functional.scaled_dot_product_attention:
            # Each output is a weighted sum over the values, those of attention for instance, of one channel.
            return _mixed(channels, (-2,)).expand(node.meta["shape"])
        own: Any = module if isinstance(module, _MOVING_MODULES) else target if target in _MOVING_FUNCTIONS else None
        args, kwargs = fx.node.map_arg((node.args[1:], node.kwargs), _number)
        if target in _MEANS:
            dims: Any = args[0] if args else kwargs["dim"]
            _mixed(channels, (dims,) if isinstance(dims, int) else tuple(dims))
            own = torch.amax
        if isinstance(own, str):
            return getattr(channels, own)(*args, **kwargs)
        return None if own is None else own(channels, *args, **kwargs)


def _source(node: fx.Node) -> fx.Node | None:
    """The input that an operation's output would have the channels of."""
    position = 0
    if node.target in _PRODUCTS:
        position = 1
    elif node.target is nn.functional.scaled_dot_product_attention:
        position = 2
    read: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), read.append)
    source = node.args[position] if len(node.args) > position else None
    # What is read twice, as x @ x does, has another part in it, too.
    return source if isinstance(source, fx.Node) and read.count(source) == 1 else None


def _same(one: _Tied, other: _Tied) -> bool:
    return len(one.group.fixed) == len(other.group.fixed) and torch.equal(one.channels, other.channels)


def _mixed(channels: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Channel numbers that are the same all along some dimensions, which become 1.

    Raises:
        ValueError: If they differ.
    """
    first = channels.amax(dims, keepdim=True)
    if not bool((channels == first).all()):
        raise ValueError("values of several channels are mixed")
    return first


def _number(node: fx.Node) -> Any:
    """The value of what is computed from the shapes of tensors.

    Raises:
        LookupError: If it is computed from something else.
    """
    if "shape" in node.meta:
        return torch.empty(node.meta["shape"], device="meta")
    if node.op not in {"call_function", "call_method"}:
        raise LookupError(node.name)
    return call(node, *fx.node.map_arg((node.args, node.kwargs), _number))
