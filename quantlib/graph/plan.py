"""Which tensors of a fused model are int8: regions around Conv and Linear, carried through cheap operations."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from quantlib.graph.nodes import calls_layer, clipped_by, is_layer, module_of
from quantlib.graph.tracing import NUM_IMAGES, drops_paths, layers_inside, untraced

# Tracing leaves none that overwrites its input.
ADDITIONS = {operator.add, torch.add, "add"}
_MULTIPLICATIONS = {operator.mul, torch.mul, "mul"}
_PRODUCTS = {
    operator.matmul,
    torch.matmul,
    torch.bmm,
    torch.einsum,
    "matmul",
    "bmm",
    "__matmul__",
    nn.functional.scaled_dot_product_attention,
}
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
    """Operations that compute in int8: they read int8 tensors, and what they give is rounded."""
    rounded: tuple[fx.Node, ...]
    """The tensors that are rounded, in the graph's order: each once, for all that read it in int8."""
    layers: tuple[LayerPlan, ...]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The operations that read a rounded tensor as it is once rounded."""
        # What comes out of int8 arithmetic exists in no other form; a float tensor stays as it is for other readers.
        return [user for user in node.users if node in self.int8 or user in self.int8]


def share_of_int8(layers: Sequence[LayerPlan]) -> float:
    """The fraction of the multiply-adds that int8 layers do."""
    total = sum(layer.num_multiplications for layer in layers)
    return sum(layer.num_multiplications for layer in layers if layer.int8) / total if total else 0.0


def draw_plan(traced: fx.GraphModule, float_layers: Collection[str] = ()) -> Plan:
    """Decide what is int8.

    Args:
        traced: Fused, with the shape of each tensor noted, for any number of images.
        float_layers: Dotted paths of modules that stay float.
    """
    int8: dict[fx.Node, None] = {}
    layers: list[LayerPlan] = []
    for node in traced.graph.nodes:
        module = module_of(traced, node)
        if isinstance(module, nn.MultiheadAttention):
            layers.append(_attention_plan(node, module))
        elif module is not None and str(node.target) not in untraced(traced):
            layers += _plan_of_own(node, module)
        if (count := _num_in_product(node)) is not None:
            of_images = all(_depends_on_image(each) for each in _tensors(node))
            reason = "both of its factors depend on the image" if of_images else "its weight is not that of a layer"
            layers.append(
                LayerPlan(path_of(node) or node.name, "product", int8=False, reason=reason, num_multiplications=count)
            )
        kept = _is_inside(node, float_layers)
        if is_layer(module):
            reason = "the recipe keeps it float" if kept else _why_float(node, module)
            layers.append(_layer_plan(node, module, reason))
            if not reason:
                int8[node] = None
        elif not kept and _carries(node, module, traced) and all(each in int8 for each in _tensors(node)):
            int8[node] = None
    layers += _plan_inside(traced, float_layers)
    _leave_where_nothing_computes(int8, traced)
    rounded = tuple(node for node in traced.graph.nodes if _is_rounded(node, int8, traced))
    return Plan(frozenset(int8), rounded, tuple(layers))


def path_of(node: fx.Node) -> str:
    """The dotted path of what a node calls, or of the innermost module that does; "" for the model itself."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(next(reversed(stack.values()))[0])


def _is_inside(node: fx.Node, paths: Collection[str]) -> bool:
    own = f"{path_of(node)}."
    return any(own.startswith(f"{path}.") for path in paths)


def _leave_where_nothing_computes(int8: dict[fx.Node, None], traced: fx.GraphModule) -> None:
    """Remove what carries int8 values that no layer reads in the end: rounding them would gain nothing."""
    useful: set[fx.Node] = set()
    removed: list[fx.Node] = []
    for node in reversed(list(int8)):
        if calls_layer(traced, node):
            useful.update([node, *_tensors(node)])
        elif node in useful:
            useful.update(_tensors(node))
        elif not calls_layer(traced, _clipped(node, traced)):
            del int8[node]
            removed.append(node)
    for node in removed:
        if node.target is operator.getitem and any(
            each in int8 and "shape" not in each.meta for each in _tensors(node)
        ):
            int8[node] = None  # One of several parts, of which others are read by layers.


def _is_rounded(node: fx.Node, int8: Collection[fx.Node], traced: fx.GraphModule) -> bool:
    if node not in int8:
        return "shape" in node.meta and any(user in int8 for user in node.users)
    own = _clipped(node, traced)
    if not (calls_layer(traced, own) or gives_new_values(own, traced)):
        return False
    return own is not node or not any(user in int8 and _clipped(user, traced) is node for user in node.users)


def _clipped(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """The layer or sum that a node alone clips, as ReLU does: the two are rounded as one. Else the node itself."""
    before = clipped_by(traced, node)
    return before if before is not None and (calls_layer(traced, before) or is_sum(before)) else node


def gives_new_values(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether an operation without weights gives values that its inputs do not have."""
    return is_sum(node) or node.target in CONCATENATIONS or isinstance(module_of(traced, node), _ROUNDED)


def _why_float(node: fx.Node, module: nn.Conv2d | nn.Linear) -> str:
    shape = node.all_input_nodes[0].meta.get("shape") if node.all_input_nodes else None
    if shape is None:
        return "its input is not a tensor of floats"
    if isinstance(module, nn.Conv2d) and _gates_channels(node):
        # Next to no work, and rounding it would move whole channels.
        return "it computes a gate (squeeze-and-excite)"
    return _why_not_int8(module)


def _why_not_int8(layer: nn.Conv2d | nn.Linear) -> str:
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"its padding is {layer.padding_mode}"
    if isinstance(layer, nn.Conv2d) and layer.padding == "same" and any(size % 2 == 0 for size in layer.kernel_size):
        return "its padding is not the same on both sides"
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
    outputs = 0 if shape is None else shape.numel() // NUM_IMAGES
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


def _num_in_product(node: fx.Node) -> int | None:
    """Multiply-adds for one image of a product of two activations; None: it is something else."""
    target: Any = node.target
    if node.op == "output" or target not in _PRODUCTS or "shape" not in node.meta:
        return None
    shapes = [each.meta["shape"] for each in node.all_input_nodes if "shape" in each.meta]
    if len(shapes) < 2:
        return None
    if target is torch.einsum:
        # Each index goes through its whole range.
        labels = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
        if "..." in str(node.args[0]) or list(map(len, labels)) != list(map(len, shapes)):
            return 0
        sizes = {
            label: size
            for each, shape in zip(labels, shapes, strict=True)
            for label, size in zip(each, shape, strict=True)
        }
        return math.prod(sizes.values()) // NUM_IMAGES
    outputs: int = node.meta["shape"].numel() // NUM_IMAGES
    if target is nn.functional.scaled_dot_product_attention:
        # Each query with each key, then the weights with the values: as many again.
        return 2 * outputs * int(shapes[1][-2])
    return outputs * int(shapes[0][-1])


def _depends_on_image(node: fx.Node) -> bool:
    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if each.op == "placeholder":
            return True
        if each not in seen:
            seen.add(each)
            waiting += each.all_input_nodes
    return False


def _plan_of_own(node: fx.Node, whole: nn.Module) -> list[LayerPlan]:
    """The layers of a module of torch's own that uses their weights itself; what they compute is not known."""
    reason = f"{type(whole).__name__} uses its weight itself"
    return [
        LayerPlan(f"{node.target}.{path}", type(module).__name__, int8=False, reason=reason, num_multiplications=0)
        for path, module in whole.named_modules()
        if path and is_layer(module)
    ]


def _plan_inside(traced: fx.GraphModule, float_layers: Collection[str]) -> list[LayerPlan]:
    """The layers of what was taken as a whole: each is int8 by itself."""
    counts = traced.meta.get("num_outputs", {})
    found = []
    for path, layer in layers_inside(traced):
        kept = any(f"{path}.".startswith(f"{other}.") for other in float_layers)
        reason = "the recipe keeps it float" if kept else _why_not_int8(layer)
        count = counts.get(path, 0) * layer.weight[0].numel()
        found.append(LayerPlan(path, type(layer).__name__, not reason, reason, num_multiplications=count))
    return found


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation reads."""
    return [each for each in node.all_input_nodes if _is_tensor(each)]


def _is_tensor(node: fx.Node) -> bool:
    return "shape" in node.meta or node.target in {torch.chunk, torch.split, "chunk", "split"}


def _carries(node: fx.Node, module: nn.Module | None, traced: fx.GraphModule) -> bool:
    reads_tensors = bool(node.args) and bool(_tensors(node)) and _is_tensor(node)
    # torch has no sound int8 ReLU6 of its own.
    if not reads_tensors or (isinstance(module, nn.ReLU6) and _clipped(node, traced) is node):
        return False
    if isinstance(module, nn.AdaptiveAvgPool2d) or node.target is nn.functional.adaptive_avg_pool2d:
        # A mean over the whole image has a range of its own, much smaller than its input's, and costs little in float.
        return not _is_one_pixel(node)
    if module is not None:
        return isinstance(module, _CARRYING_MODULES + _ROUNDED) or drops_paths(module)
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
