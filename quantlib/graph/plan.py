"""Which tensors of a traced model are int8: regions around Conv and Linear, carried through cheap operations."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import StochasticDepth

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLICATIONS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
CONCATENATIONS = {torch.cat, torch.concat}

# Rounded as they come in and as they go out, each on its own grid.
_ROUNDED = (nn.Hardswish,)
# Values of their input, in another order or fewer: what is int8 stays int8, on the same grid.
_CARRYING_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Identity,
    nn.Dropout,
    nn.ChannelShuffle,
    StochasticDepth,
)
_CARRYING_FUNCTIONS = {
    torch.flatten,
    torch.transpose,
    torch.permute,
    torch.reshape,
    torch.chunk,
    torch.split,
    nn.functional.max_pool2d,
    torch.max_pool2d,
    nn.functional.avg_pool2d,
    nn.functional.adaptive_avg_pool2d,
    operator.getitem,
}
_CARRYING_METHODS = {"flatten", "transpose", "permute", "reshape", "view", "contiguous", "chunk", "split"}


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer that has weights."""

    path: str
    kind: str
    """Its class."""
    int8: bool
    reason: str
    """Why it stays float; "" for int8."""
    num_multiplications: int
    """Multiply-adds for one image; 0 where they are not known."""


@dataclass(frozen=True)
class Plan:
    """What of a traced model is int8."""

    int8: frozenset[fx.Node]
    """Operations that compute in int8: they read and give int8 tensors."""
    layers: tuple[LayerPlan, ...]


def draw_plan(traced: fx.GraphModule) -> Plan:
    """Decide what is int8.

    Args:
        traced: With the shape of each tensor noted, for any number of images.
    """
    modules = dict(traced.named_modules())
    int8: set[fx.Node] = set()
    layers: list[LayerPlan] = []
    for node in traced.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.MultiheadAttention):
            layers.append(_attention_plan(node, module))
        elif module is not None:
            layers += _layers_inside(node, module)
        if isinstance(module, nn.Conv2d | nn.Linear):
            reason = _why_float(node, module)
            layers.append(_layer_plan(node, module, reason))
            if not reason:
                int8.add(node)
        elif _carries(node, module, modules) and all(each in int8 for each in _tensors(node)):
            int8.add(node)
    return Plan(frozenset(int8), tuple(layers))


def _is_fused_away(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a BatchNorm's call becomes part of the convolution before it."""
    before = node.all_input_nodes[0]
    if before.op != "call_module" or len(before.users) > 1:
        return False
    calls = [n for n in node.graph.nodes if n.op == "call_module" and n.target in {before.target, node.target}]
    return isinstance(modules.get(str(before.target)), nn.Conv2d) and len(calls) == 2


def _why_float(node: fx.Node, module: nn.Conv2d | nn.Linear) -> str:
    shape = node.all_input_nodes[0].meta.get("shape") if node.all_input_nodes else None
    if shape is None:
        return "its input is not a tensor of floats"
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"its padding is {module.padding_mode}"
        if _gates_channels(node):
            # Next to no work, and rounding it would move whole channels.
            return "it computes a gate (squeeze-and-excite)"
    return ""


def _gates_channels(node: fx.Node) -> bool:
    """Whether what a node gives for one pixel is multiplied with an image of more, as squeeze-and-excite does."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in seen or not _is_one_pixel(each):
            continue
        seen.add(each)
        if any(user.target in _MULTIPLICATIONS and not _is_one_pixel(user) for user in each.users):
            return True
        waiting += each.users
    return False


def _is_one_pixel(node: fx.Node) -> bool:
    return tuple(node.meta.get("shape", ())[-2:]) == (1, 1)


def _layer_plan(node: fx.Node, module: nn.Conv2d | nn.Linear, reason: str) -> LayerPlan:
    shape = node.meta.get("shape")
    outputs = 0 if shape is None else shape[1:].numel()
    return LayerPlan(
        path=str(node.target),
        kind=type(module).__name__,
        int8=not reason,
        reason=reason,
        num_multiplications=outputs * module.weight[0].numel(),
    )


def _attention_plan(node: fx.Node, module: nn.MultiheadAttention) -> LayerPlan:
    shape = node.all_input_nodes[0].meta["shape"]
    tokens, width = shape[1 if module.batch_first else 0], module.embed_dim
    return LayerPlan(
        path=str(node.target),
        kind="MultiheadAttention",
        int8=False,
        reason="attention stays float",
        # Four projections of each token; then each with each, twice.
        num_multiplications=4 * tokens * width**2 + 2 * tokens**2 * width,
    )


def _layers_inside(node: fx.Node, whole: nn.Module) -> list[LayerPlan]:
    """The layers of a module that could not be traced; what they compute is not known."""
    return [
        LayerPlan(
            path=f"{node.target}.{path}",
            kind=type(module).__name__,
            int8=False,
            reason=f"{node.target} branches on values, and is taken as a whole",
            num_multiplications=0,
        )
        for path, module in whole.named_modules()
        if path and isinstance(module, nn.Conv2d | nn.Linear)
    ]


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation reads."""
    return [each for each in node.all_input_nodes if _is_tensor(each)]


def _is_tensor(node: fx.Node) -> bool:
    return "shape" in node.meta or node.target in {torch.chunk, torch.split, "chunk", "split"}


def _carries(node: fx.Node, module: nn.Module | None, modules: dict[str, nn.Module]) -> bool:
    if not node.args or not _tensors(node) or not _is_tensor(node):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return _is_fused_away(node, modules)
    if module is not None:
        return isinstance(module, _CARRYING_MODULES + _ROUNDED)
    if node.target in ADDITIONS:
        return is_sum(node)
    target: Any = node.target
    if node.op == "call_function":
        return target in CONCATENATIONS or target in _CARRYING_FUNCTIONS
    return node.op == "call_method" and target in _CARRYING_METHODS


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of one shape."""
    if node.target not in ADDITIONS or len(node.args) != 2 or node.kwargs:
        return False
    shapes = [each.meta.get("shape") if isinstance(each, fx.Node) else None for each in node.args]
    return shapes[0] is not None and shapes[0] == shapes[1]
