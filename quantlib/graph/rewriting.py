"""A traced graph in a form that a plan can work on: layers are modules, and nothing overwrites its input."""

from __future__ import annotations

import copy
import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.graph.nodes import module_of

# Functions and methods that become modules: each call then has a module of its own, which can be fused or replaced.
_MODULES: dict[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU,
    nn.functional.relu: nn.ReLU,
    "relu": nn.ReLU,
    nn.functional.relu6: nn.ReLU6,
    nn.functional.hardswish: nn.Hardswish,
    nn.functional.dropout: nn.Dropout,
}
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    nn.functional.relu_: nn.functional.relu,
}
_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")


def rewrite(traced: fx.GraphModule) -> None:
    """Rewrite a traced model in place."""
    for node in list(traced.graph.nodes):
        if node.target is torch._assert:
            traced.graph.erase_node(node)
        elif node.op == "call_module" and node.kwargs:
            _by_position(traced, node)
    _make_functional(traced)
    _make_modules(traced)
    traced.graph.eliminate_dead_code()
    _merge_padding(traced)
    _separate_calls(traced)
    traced.delete_all_unused_submodules()
    _delete_unread_parameters(traced)
    traced.graph.lint()
    traced.recompile()


def _delete_unread_parameters(traced: fx.GraphModule) -> None:
    """Delete what a module no longer reads, as its layers have it now: a parameter has one name in a file."""
    read = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in traced.graph.nodes if node.op == "call_module")
    for path, _ in list(traced.named_parameters(remove_duplicate=False)):
        if path not in read and not path.startswith(called):
            owner, _, name = path.rpartition(".")
            delattr(traced.get_submodule(owner), name)


def _by_position(traced: fx.GraphModule, node: fx.Node) -> None:
    """Give a module's arguments by position, where they have one."""
    signature = inspect.signature(traced.get_submodule(str(node.target)).forward)
    given = signature.bind(*node.args, **node.kwargs)
    node.args, node.kwargs = given.args, given.kwargs


def _make_functional(traced: fx.GraphModule) -> None:
    """Replace what overwrites its input, in place, by what does not: a tensor is then the same for all its readers."""
    nodes = list(traced.graph.nodes)
    for position, node in enumerate(nodes):
        if _stop_overwriting(traced, node):
            for later in nodes[position + 1 :]:
                later.replace_input_with(node.all_input_nodes[0], node)


def _stop_overwriting(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Change one operation; returns whether it did overwrite its input."""
    target: Any = node.target
    if node.op == "call_module":
        module: Any = traced.get_submodule(target)
        overwrites = bool(getattr(module, "inplace", False)) and not isinstance(module, nn.Dropout)
        if hasattr(module, "inplace"):
            module.inplace = False
        return overwrites
    if node.op == "call_method":
        name = str(target).rstrip("_")
        if name == target or str(target).startswith("__") or not hasattr(Tensor, name):
            return False
        node.target = name
        return True
    if target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[target]
        return True
    if node.op == "call_function" and getattr(target, "__module__", "") == "torch.nn.functional":
        given = inspect.signature(target).bind(*node.args, **node.kwargs)
        if given.arguments.get("inplace"):
            given.arguments["inplace"] = False
            node.args, node.kwargs = given.args, given.kwargs
            return True
    return False


def _make_modules(traced: fx.GraphModule) -> None:
    """Make modules of convolutions, linear layers and norms that are called as functions of their parameters."""
    made: dict[tuple[Any, ...], str] = {}
    for node in list(traced.graph.nodes):
        names, build = _FUNCTIONS.get(node.target, ((), None))
        if node.op != "call_function" or build is None:
            continue
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, fx.Node) and name != "input"}
        values = {name: _constant(traced, value) for name, value in tensors.items()}
        if any(value is None for value in values.values()):
            continue  # Its weight depends on the image.
        module = build({name: values.get(name, value) for name, value in given.items() if name != "input"}, node)
        if module is None:
            continue
        settings = {name: str(value) for name, value in given.items() if name not in tensors and name != "input"}
        key = (*(id(value) for value in values.values()), *sorted(settings.items()))
        if key not in made or not all(isinstance(value, nn.Parameter) for value in values.values()):
            made[key] = _put_at_owner(traced, node, tensors.get("weight"), module)
        node.op, node.target, node.args, node.kwargs = "call_module", made[key], (given["input"],), {}
        for constant in tensors.values():
            _erase_unused(traced, constant)


def _erase_unused(traced: fx.GraphModule, node: fx.Node) -> None:
    """Remove what nothing reads any more, and what only that has read."""
    if node.users or node.op == "placeholder" or node._erased:
        return
    before = node.all_input_nodes
    traced.graph.erase_node(node)
    for each in before:
        _erase_unused(traced, each)


def _constant(traced: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of what depends on parameters alone; None if it depends on the image."""
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(traced)
        return value if isinstance(value, Tensor) else None
    if node.op not in {"call_function", "call_method"} or not node.all_input_nodes:
        return None
    known = {each: _constant(traced, each) for each in node.all_input_nodes}
    if any(value is None for value in known.values()):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: known[each])
    target: Any = node.target
    with torch.no_grad():
        result = getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
    return result.clone() if isinstance(result, Tensor) else None


def _parameter(value: Tensor | None) -> nn.Parameter | None:
    return value if value is None or isinstance(value, nn.Parameter) else nn.Parameter(value)


def _build_linear(given: dict[str, Any], _: fx.Node) -> nn.Module | None:
    weight = _parameter(given["weight"])
    assert weight is not None
    if weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], given.get("bias") is not None, device="meta")
    layer.weight = weight
    if given.get("bias") is not None:
        layer.bias = _parameter(given["bias"])  # type: ignore[assignment]
    return layer


def _build_conv(given: dict[str, Any], _: fx.Node) -> nn.Module | None:
    weight = _parameter(given["weight"])
    assert weight is not None
    groups = given.get("groups", 1)
    settings = [given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    if not all(isinstance(value, int | str) or all(isinstance(n, int) for n in value) for value in [*settings, groups]):
        return None
    stride, padding, dilation = (tuple(value) if isinstance(value, list) else value for value in settings)
    out_channels, in_channels, *kernel = weight.shape
    layer = nn.Conv2d(
        in_channels * groups,
        out_channels,
        (kernel[0], kernel[1]),
        stride,
        padding,
        dilation,
        groups,
        given.get("bias") is not None,
        device="meta",
    )
    layer.weight = weight
    if given.get("bias") is not None:
        layer.bias = _parameter(given["bias"])
    return layer


def _build_batch_norm(given: dict[str, Any], node: fx.Node) -> nn.Module | None:
    tensors = [given.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    example = node.meta.get("examples", (None,))[0]
    if given.get("training") or any(value is None for value in tensors) or example is None or example.dim() != 4:
        return None
    norm = nn.BatchNorm2d(example.shape[1], given.get("eps", 1e-5), given.get("momentum") or 0.1, device="meta")
    norm.running_mean, norm.running_var = tensors[0], tensors[1]
    norm.weight, norm.bias = _parameter(tensors[2]), _parameter(tensors[3])  # type: ignore[assignment]
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return norm.eval()


def _build_layer_norm(given: dict[str, Any], _: fx.Node) -> nn.Module | None:
    weight, bias = (_parameter(given.get(name)) for name in ("weight", "bias"))
    if weight is None:
        return None
    norm = nn.LayerNorm(tuple(weight.shape), given.get("eps", 1e-5), bias=bias is not None, device="meta")
    norm.weight = weight
    if bias is not None:
        norm.bias = bias
    return norm


_FUNCTIONS: dict[Any, tuple[tuple[str, ...], Any]] = {
    nn.functional.linear: (_LINEAR, _build_linear),
    nn.functional.conv2d: (_CONV, _build_conv),
    nn.functional.batch_norm: (_BATCH_NORM, _build_batch_norm),
    nn.functional.layer_norm: (_LAYER_NORM, _build_layer_norm),
}


def _put_at_owner(traced: fx.GraphModule, node: fx.Node, weight: fx.Node | None, module: nn.Module) -> str:
    """Add a module under the path of what owned its weight, so that parameters keep their names; or under a new one."""
    while weight is not None and weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    owner, _, name = str(weight.target).rpartition(".") if weight is not None else ("", "", "")
    called = {str(each.target) for each in traced.graph.nodes if each.op == "call_module"}
    if owner and name.endswith("_weight"):  # As attention's in_proj_weight.
        path = f"{owner}.{name.removesuffix('_weight')}"
        if not hasattr(traced.get_submodule(owner), name.removesuffix("_weight")):
            traced.add_submodule(path, module.eval())
            return path
    if not owner or name != "weight" or owner in called:
        return add_module(traced, node.name, module)
    for child_name, child in traced.get_submodule(owner).named_children():
        module.add_module(child_name, child)
    traced.set_submodule(owner, module)
    return owner


def _merge_padding(traced: fx.GraphModule) -> None:
    """Let a convolution do the zero padding before it, where it is the same on both sides."""
    for node in list(traced.graph.nodes):
        if node.target is not nn.functional.pad or len(node.users) != 1:
            continue
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        pad, reader = given["pad"], next(iter(node.users))
        layer: Any = module_of(traced, reader)
        plain = given.get("mode", "constant") == "constant" and not given.get("value")
        if plain:
            # TorchScript takes no whole number for the value.
            node.args, node.kwargs = (given["input"], list(pad), "constant", 0.0), {}
        if not plain or len(pad) not in {2, 4} or not all(isinstance(n, int) and n >= 0 for n in pad):
            continue
        left, right, top, bottom = (*pad, 0, 0)[:4]
        if not any(pad):
            node.replace_all_uses_with(given["input"])
            traced.graph.erase_node(node)
        elif type(layer) is nn.Conv2d and (left, top) == (right, bottom) and _is_alone(traced, reader):
            if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                continue
            layer.padding = (layer.padding[0] + top, layer.padding[1] + left)
            node.replace_all_uses_with(given["input"])
            traced.graph.erase_node(node)


def _is_alone(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a module is called nowhere else."""
    return sum(each.op == "call_module" and each.target == node.target for each in traced.graph.nodes) == 1


def _separate_calls(traced: fx.GraphModule) -> None:
    """Give each call of an activation a module of its own: functions become modules, shared modules are copied."""
    seen: set[str] = set()
    for node in list(traced.graph.nodes):
        if node.op in {"call_function", "call_method"} and node.target in _MODULES:
            path = add_module(traced, node.name, _module_for(node))
            node.op, node.target, node.args, node.kwargs = "call_module", path, node.args[:1], {}
        elif node.op == "call_module":
            path = str(node.target)
            module = traced.get_submodule(path)
            if path in seen and not list(module.parameters()) and not list(module.buffers()):
                node.target = path = add_module(traced, node.name, copy.deepcopy(module))
            seen.add(path)


def _module_for(node: fx.Node) -> nn.Module:
    kind = _MODULES[node.target]
    if kind is not nn.Dropout:
        return kind()
    given = inspect.signature(nn.functional.dropout).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    return nn.Dropout(given.arguments["p"])


def add_module(traced: fx.GraphModule, name: str, module: nn.Module) -> str:
    """Add a submodule under a name that is still free, and return that name."""
    names, path, number = {name for name, _ in traced.named_modules()}, name, 1
    while path in names or hasattr(traced, path):
        path, number = f"{name}_{number}", number + 1
    traced.add_submodule(path, module.eval())
    return path
