"""Preparation: puts what observes or rounds activations into a fused model, as its plan says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from quantlib.errors import ModelError, suggest
from quantlib.graph.fusion import ConvBatchNorm2d
from quantlib.graph.nodes import calls_layer, clipped_by, is_layer, module_of
from quantlib.graph.plan import draw_plan
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize
from quantlib.quantize.grids import Grid, activation_grid
from quantlib.quantize.layers import EnclosedLayer, quantized
from quantlib.quantize.statistics import ActivationStatistics
from quantlib.recipe.scheme import Scheme

QUANTIZERS = "quantizers"
"""The submodule that holds what rounds activations, each under the name of the tensor's node."""
_INT8 = "int8"


def observe(fused: fx.GraphModule, float_layers: Iterable[str], *, inplace: bool = False) -> fx.GraphModule:
    """Put observers that serve every scheme with these `float_layers` into a model fused in mode "eval", or a copy.

    Raises:
        ModelError: If the model has none of the `float_layers`.
    """
    model = fused if inplace else copy.deepcopy(fused)
    _insert(model, float_layers, ActivationStatistics)
    for node in model.graph.nodes:
        before = clipped_by(model, node)
        if before is not None and calls_layer(model, before):
            # Nothing else reads its input, and writing the output there took a tenth off calibration time.
            clipping: Any = module_of(model, node)
            clipping.inplace = True
    return model.eval()


def round_activations(fused: fx.GraphModule, scheme: Scheme, *, inplace: bool = False) -> fx.GraphModule:
    """Put grids, which are still to be found, into a model fused in mode "eval", or a copy.

    Raises:
        ModelError: If the model has none of the scheme's `float_layers`.
    """
    model = fused if inplace else copy.deepcopy(fused)
    _insert(
        model, scheme.float_layers, lambda: activation_grid(torch.zeros(()), torch.zeros(()), scheme.activation_bits)
    )
    return model.eval()


def prepare_qat(fused: fx.GraphModule, scheme: Scheme, *, inplace: bool = False) -> fx.GraphModule:
    """Put fake quantization into a model fused in mode "qat", or a copy.

    Args:
        fused: Fused in mode "qat".
        scheme: Ranges are moving averages whatever its observer, because the model changes as well.
        inplace: Change the model itself, not a copy.

    Raises:
        ModelError: If the model has none of the scheme's `float_layers`.
    """
    model = fused if inplace else copy.deepcopy(fused)
    rounded = _insert(model, scheme.float_layers, lambda: ActivationFakeQuantize(scheme.activation_bits))
    for path in int8_layers(model):
        layer: Any = model.get_submodule(path)
        weight_quantizer = WeightFakeQuantize(len(layer.weight), per_channel=scheme.weights == "per_channel")
        if isinstance(layer, ConvBatchNorm2d):
            layer.weight_quantizer = weight_quantizer
        else:
            model.set_submodule(path, quantized(layer, weight_quantizer))
    for node in rounded:
        _fuse_relu(model, node)
    return model.train()


def _insert(model: fx.GraphModule, float_layers: Iterable[str], make: Callable[[], nn.Module]) -> list[fx.Node]:
    """Put a module behind each tensor that the plan rounds; returns these tensors."""
    plan = draw_plan(model, find_layers(model, float_layers))
    for node in plan.int8:
        node.meta[_INT8] = True
    for node in plan.rounded:
        path = f"{QUANTIZERS}.{node.name}"
        model.add_submodule(path, make())
        readers = plan.readers(node)
        with model.graph.inserting_after(node):
            rounded = model.graph.call_module(path, (node,))
        rounded.meta["shape"] = node.meta["shape"]
        for reader in readers:
            reader.replace_input_with(node, rounded)
    model.graph.lint()
    model.recompile()
    nodes = {str(node.target) for node in model.graph.nodes}
    for layer in plan.layers:
        if layer.int8 and layer.path not in nodes:
            own: Any = model.get_submodule(layer.path)
            model.set_submodule(layer.path, EnclosedLayer(own, make(), make()))
    return list(plan.rounded)


def is_int8(node: fx.Node) -> bool:
    """Whether an operation of a prepared or quantized model computes in int8."""
    return _INT8 in node.meta


def int8_layers(model: fx.GraphModule) -> list[str]:
    """Paths of the layers of a prepared or quantized model that compute in int8, in the order of their calls."""
    nodes = (node for node in model.graph.nodes if is_int8(node) and calls_layer(model, node))
    enclosed = (f"{path}.layer" for path, module in model.named_modules() if isinstance(module, EnclosedLayer))
    return list(dict.fromkeys([*(str(node.target) for node in nodes), *enclosed]))


def _fuse_relu(model: fx.GraphModule, node: fx.Node) -> None:
    """Let fake quantization do the ReLU before it, which saves a pass over the tensor."""
    before = clipped_by(model, node)
    if type(module_of(model, node)) is nn.ReLU and before is not None and calls_layer(model, before):
        quantizer: Any = model.get_submodule(f"{QUANTIZERS}.{node.name}")
        quantizer.fuses_relu = True
        model.set_submodule(str(node.target), nn.Identity())


def quantizers(model: nn.Module) -> dict[str, Any]:
    """What observes or rounds each activation, by its path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ActivationStatistics | ActivationFakeQuantize | Grid)
        and not path.endswith(".weight_quantizer")
    }


def find_layers(model: fx.GraphModule, wanted: Iterable[str]) -> list[str]:
    """Paths of the modules named by dotted path or class; of nested ones, only the outermost.

    Raises:
        ModelError: If the model has no module for one of the names.
    """
    wanted = tuple(wanted)
    if not wanted:
        return []
    classes = _classes_by_path(model)
    found: dict[str, None] = {}
    for name in wanted:
        paths = [path for path, own in classes.items() if path and name in (path, *own)]
        if not paths:
            known = [path for path, module in model.named_modules() if is_layer(module)]
            raise ModelError(
                f"float_layers names {name!r}, but the model has no module with that path or class"
                f"{suggest(name, known)} Its layers are {', '.join(known[:3])}, …"
            )
        found.update(dict.fromkeys(paths))
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _classes_by_path(model: fx.GraphModule) -> dict[str, set[str]]:
    """Names of the classes of each module, those that tracing went into included."""
    classes: dict[str, set[str]] = {}
    for node in model.graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            classes.setdefault(path, set()).add(kind if isinstance(kind, str) else kind.__name__)
    for path, module in model.named_modules():
        own = {base.__name__ for base in type(module).__mro__ if base in {nn.Conv2d, nn.Linear}}
        classes.setdefault(path, set()).update(own, {type(module).__name__})
    return classes
