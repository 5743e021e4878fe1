"""The ONNX graph of an architecture, marked wherever something may be rounded; `onnx` fills in the values.

torch's exporter takes seconds, and every variant of a model has the same graph: it runs once.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError, reason_of
from quantlib.graph.nodes import is_layer
from quantlib.graph.plan import Plan, draw_plan
from quantlib.graph.tracing import untraced
from quantlib.quantize.layers import quantized

# The newest that every supported release of the runtimes reads.
_OPSET = 18
DOMAIN = "quantflow"
ACTIVATION, WEIGHT, PARAMETER = f"{DOMAIN}::Activation", f"{DOMAIN}::Weight", f"{DOMAIN}::Parameter"
NAME = "name"
"""Attribute of a mark: the tensor's node in the traced graph, or the layer's path.

A parameter's mark keeps the exporter from computing with its value, which is still to be filled in.
"""


class _Mark(nn.Module):
    """Stands for a rounding that is not decided yet."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__()
        self.kind, self.name = kind, name

    def forward(self, x: Tensor) -> Tensor:
        """`x`."""
        return torch.onnx.ops.symbolic(self.kind, (x,), {NAME: self.name}, dtype=x.dtype, shape=x.shape, version=1)


class _Marked(nn.Module):
    """A module that reads its parameters through marks."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        self._module = [module]  # In a list, it keeps the path that it has.
        self._marks = {name: _Mark(PARAMETER, f"{path}.{name}") for name, _ in module.named_parameters()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        (module,) = self._module
        values = {name: self._marks[name](value) for name, value in module.named_parameters()}
        return torch.func.functional_call(module, values, args, kwargs)


def draft(fused: fx.GraphModule, input_shape: tuple[int, int, int]) -> bytes:
    """Write the ONNX graph of a fused float model, for any number of images, with marks and without its weights.

    The same architecture gives the same bytes.

    Raises:
        ModelError: If it has an operation that ONNX cannot express.
    """
    if whole := untraced(fused):
        raise ModelError(
            f"The model cannot be written as ONNX: {whole[0]} branches on values, and the file would hold one branch."
        )
    constants = _constants(fused)
    weights = {
        name: value
        for name, value in fused.state_dict(keep_vars=True).items()
        if value.is_floating_point() and name not in constants
    }
    generator = torch.Generator().manual_seed(0)
    marked = copy.deepcopy(fused, {id(value): _blank(value, generator) for value in weights.values()}).eval()
    _put_marks(marked, draw_plan(marked), constants)
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        # ONNX has no operation for attention that is fused for inference.
        torch.backends.mha.set_fastpath_enabled(False)
        program: Any = torch.onnx.export(
            marked,
            (torch.zeros(2, *input_shape),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            opset_version=_OPSET,
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )
    except Exception as error:
        raise ModelError(f"The model cannot be written as ONNX: {reason_of(error)}") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    written = program.model_proto
    initializers = {each.name: each for each in written.graph.initializer}
    if lost := [name for name in weights if name not in initializers]:
        raise ModelError(f"The model cannot be written as ONNX: the exporter computes with the value of {lost[0]}.")
    for name in weights:
        initializers[name].ClearField("raw_data")
    # The exporter's notes hold stack traces: this machine's paths, and other bytes on another machine.
    for each in (
        written.graph,
        *written.graph.node,
        *written.graph.value_info,
        *written.graph.input,
        *written.graph.output,
    ):
        each.ClearField("metadata_props")
    content: bytes = written.SerializeToString(deterministic=True)
    return content


def _blank(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor like a weight, without memory; no two are equal, as the exporter would make one constant of both."""
    blank = torch.rand((), generator=generator).expand(weight.shape)
    return nn.Parameter(blank, weight.requires_grad) if isinstance(weight, nn.Parameter) else blank


def _put_marks(model: fx.GraphModule, plan: Plan, constants: Collection[str]) -> None:
    """Mark the weight of each layer, and each tensor that this plan rounds, or one with more layers in float would."""
    for node in list(model.graph.nodes):
        if "shape" in node.meta and (node in plan.int8 or node in plan.rounded):
            _mark(model, node, ACTIVATION, plan.readers(node))
        elif node.op == "get_attr" and node.target not in constants:
            _mark(model, node, PARAMETER, list(node.users))
        if node.op == "call_module" and _stays_float(model.get_submodule(str(node.target))):
            model.add_submodule(f"marked.{node.name}", _Marked(model.get_submodule(str(node.target)), str(node.target)))
            node.target = f"marked.{node.name}"
    for path, module in list(model.named_modules()):
        if is_layer(module):
            model.set_submodule(path, quantized(module, _Mark(WEIGHT, path)))
    model.recompile()


def _stays_float(module: nn.Module) -> bool:
    """Whether a module has parameters that are never rounded, such as a norm's."""
    return not is_layer(module) and any(True for _ in module.parameters())


def _constants(model: fx.GraphModule) -> set[str]:
    """What operations read and is no parameter, such as positions: it is the same for every variant."""
    parameters = dict(model.named_parameters())
    return {str(node.target) for node in model.graph.nodes if node.op == "get_attr"} - parameters.keys()


def _mark(model: fx.GraphModule, node: fx.Node, kind: str, readers: list[fx.Node]) -> None:
    path = f"marks.{node.name}"
    model.add_submodule(path, _Mark(kind, node.name))
    with model.graph.inserting_after(node):
        mark = model.graph.call_module(path, (node,))
    for reader in readers:
        reader.replace_input_with(node, mark)
