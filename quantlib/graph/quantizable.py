"""A model as it is, made quantizable: traced, planned, and with the borders of its int8 regions put in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.eager.modules import DeQuantStub, FloatFunctional, QuantStub
from quantlib.errors import ModelError
from quantlib.graph.plan import CONCATENATIONS, Plan, draw_plan, is_sum
from quantlib.graph.tracing import note_shapes, trace

_RELUS = {torch.relu, nn.functional.relu, "relu", "relu_"}
_HARDSWISHES = {nn.functional.hardswish}
# Largest change of the logits, as a share of the largest of them, that rounding explains.
_MAX_CHANGE = 1e-4


class Add(nn.Module):
    """A sum of two tensors, or the ReLU of it, rounded as one operation."""

    def __init__(self, *, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.operation = FloatFunctional()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add two tensors of one shape."""
        return self.operation.add_relu(x, y) if self.relu else self.operation.add(x, y)


class Concatenate(nn.Module):
    """Tensors side by side, rounded to one grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.operation = FloatFunctional()

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """torch.cat(tensors, dim)."""
        return self.operation.cat(tensors, self.dim)


def make_quantizable(model: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """A float model with the same parameters and answers, ready for fusion and preparation.

    A model that has stubs of its own is taken as it is: its author has drawn the plan.

    Args:
        model: In eval mode; its modules become those of the result.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it has nothing to quantize, cannot be traced, or computes something else then.
    """
    if any(isinstance(module, QuantStub) for module in model.modules()):
        return model
    if not any(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()):
        raise ModelError("The model has no Conv2d and no Linear: there is nothing to quantize.")
    quantizable = rewrite(model, input_shape)
    x = torch.rand(3, *input_shape, generator=torch.Generator().manual_seed(0)) * 4 - 2
    with torch.inference_mode():
        expected = model.eval()(x)
    if not _same(quantizable.eval(), x, expected):
        raise ModelError(
            f"{type(model).__name__} computes something else once it is traced: its forward() depends on something "
            "other than tensors, or on the number of images. Put QuantStub and DeQuantStub around the part to "
            "quantize, and the model is taken as it is."
        )
    return quantizable


def rewrite(model: nn.Module, input_shape: tuple[int, int, int]) -> nn.Module:
    """Do what `make_quantizable` does, for a model that has passed its checks: they take longer than all else."""
    if any(isinstance(module, QuantStub) for module in model.modules()):
        return model
    traced, plan = _trace_and_plan(model, input_shape)
    _put_in(traced, plan)
    return traced


def plan_of(model: nn.Module, input_shape: tuple[int, int, int]) -> Plan:
    """The plan that `make_quantizable` follows; of a model with stubs of its own, what it would be without them.

    Raises:
        ModelError: If the model cannot be traced.
    """
    return _trace_and_plan(copy.deepcopy(model), input_shape)[1]


def _trace_and_plan(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[fx.GraphModule, Plan]:
    traced = trace(model.eval())
    _separate_calls(traced)
    with torch.inference_mode():
        # Two images: of one, a tensor of the batch has the shape of one that is added to each image.
        note_shapes(traced, torch.zeros(2, *input_shape))
    return traced, draw_plan(traced)


def _same(traced: nn.Module, x: Tensor, expected: Tensor) -> bool:
    try:
        with torch.inference_mode():
            return all(
                float((traced(x[:n]) - expected[:n]).abs().max()) <= _MAX_CHANGE * max(1.0, float(expected.abs().max()))
                for n in (1, len(x))
            )
    except (RuntimeError, TypeError):
        return False


def _separate_calls(traced: fx.GraphModule) -> None:
    """Give each call of an activation a module of its own: functions become modules, shared modules are copied."""
    seen: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.target in _RELUS | _HARDSWISHES and node.op in {"call_function", "call_method"}:
            path = _new_path(traced, node.name)
            traced.add_submodule(path, nn.Hardswish() if node.target in _HARDSWISHES else nn.ReLU())
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}
        elif node.op == "call_module":
            path = str(node.target)
            module = traced.get_submodule(path)
            if path in seen and not list(module.parameters()) and not list(module.buffers()):
                path = _new_path(traced, node.name)
                traced.add_submodule(path, copy.deepcopy(module))
                node.target = path
            seen.add(path)
    traced.recompile()


def _put_in(traced: fx.GraphModule, plan: Plan) -> None:
    """Make sums modules, and put a stub wherever a tensor enters or leaves int8."""
    for node in traced.graph.nodes:  # In the graph's order: names of new modules are numbered.
        if node in plan.int8:
            _as_module(traced, node)
    for node in [node for node in traced.graph.nodes if node not in plan.int8 and node.op == "call_module"]:
        # Preparation hands a qconfig down to every module but those that have one already.
        module: Any = traced.get_submodule(str(node.target))
        module.qconfig = None
    for node in list(traced.graph.nodes):
        if node.op == "output" or "shape" not in node.meta:
            continue
        inside = node in plan.int8
        users = [
            user
            for user in node.users
            if (user in plan.int8) != inside and (user.op == "output" or _reads_values(user) or user in plan.int8)
        ]
        if users:
            _border(traced, node, users, DeQuantStub() if inside else QuantStub())
    traced.graph.lint()
    traced.recompile()


def _reads_values(node: fx.Node) -> bool:
    """Whether an operation reads a tensor's values, and not its shape alone."""
    return not (node.target is getattr or (node.op == "call_method" and node.target in {"size", "dim"}))


def _border(traced: fx.GraphModule, node: fx.Node, users: list[fx.Node], stub: nn.Module) -> None:
    path = _new_path(traced, f"{'dequant' if isinstance(stub, DeQuantStub) else 'quant'}_{node.name}")
    traced.add_submodule(path, stub)
    with traced.graph.inserting_after(node):
        border = traced.graph.call_module(path, (node,))
    for user in users:
        user.replace_input_with(node, border)


def _as_module(traced: fx.GraphModule, node: fx.Node) -> None:
    module: nn.Module
    arguments: tuple[Any, ...]
    if is_sum(node):
        relu = _only_relu(traced, node)
        module, arguments = Add(relu=relu is not None), node.args
        if relu is not None:
            traced.set_submodule(relu, nn.Identity())
    elif node.target in CONCATENATIONS:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        module, arguments = Concatenate(int(str(dim))), (node.args[0],)
    else:
        return
    path = _new_path(traced, node.name)
    traced.add_submodule(path, module)
    node.op, node.target, node.args, node.kwargs = "call_module", path, arguments, {}


def _only_relu(traced: fx.GraphModule, node: fx.Node) -> str | None:
    """Path of the ReLU that alone reads a node."""
    only = next(iter(node.users)) if len(node.users) == 1 else None
    if only is None or only.op != "call_module":
        return None
    path = str(only.target)
    return path if type(traced.get_submodule(path)) is nn.ReLU else None


def _new_path(traced: fx.GraphModule, name: str) -> str:
    names, path, number = {name for name, _ in traced.named_modules()}, name, 1
    while path in names or hasattr(traced, path):
        path, number = f"{name}_{number}", number + 1
    return path
