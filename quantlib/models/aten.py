"""The operations of an exported graph as the functions of torch that a model's own code would call."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError
from quantlib.models import quantized_decomposed

_Given = Mapping[str, Any]
_Operation = Callable[[fx.Graph, _Given], Any]
# What they say depends on the machine, or on how memory is laid out.
_IGNORED = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
_OF_NUMBERS = {"add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge"}
_CHECKS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}
# What they give depends on how their input lies in memory.
_OF_MEMORY = {"as_strided", "as_strided_"}
# The same under torch.nn.functional, which fusing and planning know; the others have one name everywhere.
_ACTIVATIONS = {"hardswish", "hardsigmoid", "silu", "mish", "leaky_relu", "relu6"}
_ROUNDING = {"quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"}
_END = 2**63 - 1
_HINT = 'Export it in eval mode and without run_decompositions(), or give it as "package.module:function".'


def add_operation(graph: fx.Graph, target: str, given: _Given) -> Any:
    """Add an operation to a graph.

    Args:
        graph: Extended in place.
        target: As the file names it, such as "torch.ops.aten.relu.default".
        given: Its arguments by name: nodes of the graph, or constants.

    Returns:
        What stands for its result, or for the first of its results; None for a check, which gives nothing.

    Raises:
        ModelError: If it is not an operation that a model in eval mode can consist of.
    """
    if target.startswith("_operator.") and target.removeprefix("_operator.") in _OF_NUMBERS:
        return graph.call_function(getattr(operator, target.removeprefix("_operator.")), tuple(given.values()))
    found = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    if found is None or packet is None or found[2] not in packet.overloads():
        raise _refusal(target, "which is not torch's own")
    name, overload = found[1], getattr(packet, found[2])
    if name in _CHECKS:
        return None
    schema = overload._schema
    values = {each.name: each.default_value if each.has_default_value() else None for each in schema.arguments}
    if name in _OPERATIONS:
        return _OPERATIONS[name](graph, {**values, **given})
    if torch.Tag.nondeterministic_seeded in overload.tags:
        raise _refusal(target, "which is random")
    args = [given.get(each.name, values[each.name]) for each in schema.arguments if not each.kwarg_only]
    # What is left out is the default; planning wants a sum of two without a third argument.
    kept = max(
        (n + 1 for n, each in enumerate(schema.arguments[: len(args)]) if given.get(each.name) is not None), default=0
    )
    named = {
        each.name: given[each.name]
        for each in schema.arguments
        if each.kwarg_only
        and each.name not in _IGNORED
        and given.get(each.name, values[each.name]) != values[each.name]
    }
    return _add_by_name(graph, name, schema, tuple(args[:kept]), named, target)


def add_rounding(graph: fx.Graph, target: str, given: _Given) -> fx.Node | None:
    """Add an operation of `quantized_decomposed` to a graph; None if it is another one.

    Args:
        graph: Extended in place.
        target: As the file names it, such as "torch.ops.quantized_decomposed.quantize_per_tensor.default".
        given: Its arguments by name: nodes of the graph, or constants.

    Raises:
        ModelError: If this torch has no such operations.
    """
    found = re.fullmatch(rf"torch\.ops\.{quantized_decomposed.NAMESPACE}\.(\w+)\.default", target)
    if found is None or found[1] not in _ROUNDING:
        return None
    return graph.call_function(getattr(quantized_decomposed.operations(), found[1]).default, (), dict(given))


def _add_by_name(
    graph: fx.Graph, name: str, schema: Any, args: tuple[Any, ...], named: dict[str, Any], target: str
) -> fx.Node:
    plain = name.removesuffix("_")
    if plain in _ACTIVATIONS:
        return graph.call_function(
            getattr(nn.functional, plain), args, named | ({"inplace": True} if plain != name else {})
        )
    # Nothing but a function of tensors: `from_file`, for example, would read any file.
    of_tensors = bool(schema.arguments) and str(schema.arguments[0].type) in {"Tensor", "List[Tensor]"}
    if of_tensors and not name.startswith("_") and name not in _OF_MEMORY:
        if plain != name and hasattr(Tensor, name):
            return graph.call_method(name, args, named)
        if not schema.is_mutable:
            for namespace in (torch, torch._C._nn):
                if callable(getattr(namespace, name, None)):
                    return graph.call_function(getattr(namespace, name), args, named)
            if hasattr(Tensor, name):
                return graph.call_method(name, args, named)
    raise _refusal(target, "which is not supported")


def _refusal(target: str, why: str) -> ModelError:
    return ModelError(f"The exported model holds the operation {target!r}, {why}. {_HINT}")


def _function(function: Any, *names: str) -> _Operation:
    """Add a function of some of the arguments, by position."""
    return lambda graph, given: graph.call_function(function, tuple(given[name] for name in names))


def _method(name: str) -> _Operation:
    return lambda graph, given: graph.call_method(name, (given["self"],))


def _same(graph: fx.Graph, given: _Given) -> Any:  # noqa: ARG001
    return given.get("self", given.get("input"))


def _norm(graph: fx.Graph, given: _Given) -> fx.Node:
    names = ("input", "running_mean", "running_var", "weight", "bias")
    args = (*(given[name] for name in names), False, given["momentum"], given["eps"])
    return graph.call_function(nn.functional.batch_norm, args)


def _convolution(graph: fx.Graph, given: _Given) -> fx.Node:
    names = ("input", "weight", "bias", "stride", "padding")
    args = tuple(given[name] for name in names)
    kind = ("transpose" if given["transposed"] else "") + f"{len(given['stride'])}d"
    if given["transposed"]:
        function = getattr(nn.functional, f"conv_{kind}")
        return graph.call_function(function, (*args, given["output_padding"], given["groups"], given["dilation"]))
    return graph.call_function(getattr(nn.functional, f"conv{kind}"), (*args, given["dilation"], given["groups"]))


def _matrix_product(graph: fx.Graph, given: _Given) -> fx.Node:
    """A linear layer, where the second matrix is its transposed weight."""
    bias, x = (given["self"], given["mat1"]) if "mat1" in given else (None, given["self"])
    weight = given["mat2"]
    scaled = given.get("alpha", 1) != 1 or given.get("beta", 1) != 1
    turned = weight.target in {torch.permute, torch.transpose, torch.t} and sorted(weight.args[-1]) == [0, 1]
    if turned and not scaled:
        return graph.call_function(nn.functional.linear, (x, weight.args[0], bias))
    if bias is None:
        return graph.call_function(torch.mm, (x, weight))
    return graph.call_function(
        torch.addmm, (bias, x, weight), {"beta": given.get("beta", 1), "alpha": given.get("alpha", 1)}
    )


def _dropout(graph: fx.Graph, given: _Given) -> fx.Node:
    return graph.call_function(nn.functional.dropout, (_same(graph, given), given["p"]), {"training": False})


def _attention(graph: fx.Graph, given: _Given) -> fx.Node:
    args = tuple(given[name] for name in ("query", "key", "value", "attn_mask"))
    named = {"is_causal": given["is_causal"], "scale": given["scale"], "enable_gqa": given["enable_gqa"]}
    function = nn.functional.scaled_dot_product_attention
    return graph.call_function(function, args, {name: value for name, value in named.items() if value})


def _hardtanh(graph: fx.Graph, given: _Given) -> fx.Node:
    low, high = given["min_val"], given["max_val"]
    if (low, high) == (0, 6):
        return graph.call_function(nn.functional.relu6, (given["self"],))
    return graph.call_function(nn.functional.hardtanh, (given["self"], low, high))


def _part(graph: fx.Graph, given: _Given) -> fx.Node:
    if "index" in given:
        part = given["index"]
    else:
        end = given["end"]
        part = slice(
            given["start"] or None, None if end == _END else end, None if given["step"] == 1 else given["step"]
        )
    dim = given["dim"]
    place = (*[slice(None)] * dim, part) if dim >= 0 else (Ellipsis, part, *[slice(None)] * (-dim - 1))
    return graph.call_function(operator.getitem, (given["self"], place))


def _index(graph: fx.Graph, given: _Given) -> fx.Node:
    place = tuple(slice(None) if each is None else each for each in given["indices"])
    return graph.call_function(operator.getitem, (given["self"], place))


def _pad(graph: fx.Graph, given: _Given) -> fx.Node:
    args = (given["self"], given["pad"], given.get("mode", "constant"), given["value"])
    return graph.call_function(nn.functional.pad, args)


def _clone(graph: fx.Graph, given: _Given) -> fx.Node:
    wanted = given["memory_format"] is torch.contiguous_format
    return graph.call_method("contiguous" if wanted else "clone", (given["self"],))


def _convert(graph: fx.Graph, given: _Given) -> Any:
    dtype = given.get("dtype")
    return given["self"] if dtype is None else graph.call_method("to", (given["self"], dtype))


def _new(name: str, *names: str) -> _Operation:
    """Add a function that makes a tensor of numbers."""

    def add(graph: fx.Graph, given: _Given) -> fx.Node:
        args = tuple(given[each] for each in names if given.get(each) is not None)
        return graph.call_function(getattr(torch, name), args, {"dtype": given["dtype"]} if given["dtype"] else {})

    return add


_OPERATIONS: dict[str, _Operation] = {
    **dict.fromkeys(
        (
            "batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "_native_batch_norm_legit_functional",
        ),
        _norm,
    ),
    **dict.fromkeys(("dropout", "dropout_", "native_dropout"), _dropout),
    **dict.fromkeys(("feature_dropout", "feature_dropout_", "detach", "detach_", "alias", "lift_fresh_copy"), _same),
    **dict.fromkeys(("to", "_to_copy"), _convert),
    **dict.fromkeys(("select", "slice"), _part),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("mm", "addmm"), _matrix_product),
    # What can be viewed can be reshaped, in any memory layout.
    **dict.fromkeys(("view", "_unsafe_view"), _function(torch.reshape, "self", "size")),
    **dict.fromkeys(
        ("adaptive_avg_pool2d", "_adaptive_avg_pool2d"),
        _function(nn.functional.adaptive_avg_pool2d, "self", "output_size"),
    ),
    **dict.fromkeys(
        ("max_pool2d", "max_pool2d_with_indices"),
        lambda graph, given: graph.call_function(
            nn.functional.max_pool2d,
            (given["self"], given["kernel_size"]),
            # An empty stride is the kernel's size.
            {name: given[name] for name in ("stride", "padding", "dilation", "ceil_mode") if given[name]},
        ),
    ),
    **dict.fromkeys(("hardtanh", "hardtanh_"), _hardtanh),
    "_softmax": _function(torch.softmax, "self", "dim"),
    "_log_softmax": _function(torch.log_softmax, "self", "dim"),
    "arange": _new("arange", "start", "end", "step"),
    "clone": _clone,
    "contiguous": _method("contiguous"),
    "convolution": _convolution,
    "einsum": lambda graph, given: graph.call_function(torch.einsum, (given["equation"], *given["tensors"])),
    "full": _new("full", "size", "fill_value"),
    "index": _index,
    "layer_norm": _function(nn.functional.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "native_group_norm": _function(nn.functional.group_norm, "input", "group", "weight", "bias", "eps"),
    "native_layer_norm": _function(nn.functional.layer_norm, "input", "normalized_shape", "weight", "bias", "eps"),
    "ones": _new("ones", "size"),
    "scalar_tensor": _new("scalar_tensor", "s"),
    "scaled_dot_product_attention": _attention,
    "split_with_sizes": _function(torch.split, "self", "split_sizes", "dim"),
    "sym_size": lambda graph, given: graph.call_method("size", (given["self"], given["dim"])),
    "zeros": _new("zeros", "size"),
}
