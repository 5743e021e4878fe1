"""A classifier's forward() as a graph of its modules and operations, its parameters under their own names."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from quantlib.graph import rewriting, surgery
from quantlib.graph.nodes import call
from quantlib.graph.symbols import EXAMPLES, Symbol, common, len_of_symbols

WHOLE = "model"
"""Path of a model whose own forward() cannot be traced."""
_USING_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# What a tensor's shape has in common for both is a constant of the graph; the rest depends on the number of images.
_BATCHES = (2, 3)
NUM_IMAGES = _BATCHES[0]
"""Images that the shapes in a graph are for."""


def trace(model: nn.Module, input_shape: tuple[int, int, int], *, whole: bool = False) -> fx.GraphModule:
    """Trace a model in eval mode, for images of one size, any number of them.

    A submodule whose forward() branches on values, or does anything else that symbols cannot, is taken as a whole;
    `untraced` names them; it may be the model itself.

    Args:
        model: Its modules become those of the result.
        input_shape: Channels, height and width of its input.
        whole: Take the model itself as a whole, without trying.
    """
    model.eval()
    if whole:
        return _finished(*_as_a_whole(model), input_shape)
    originals = surgery.replace_attention(model)
    leaves: set[str] = set()
    while True:
        tracer = _Tracer(model, leaves, input_shape)
        try:
            with _look_into_wrapped_functions(), len_of_symbols(model):
                graph = tracer.trace(model)
        except Exception:
            failed = tracer.failed
            is_torchs = failed in originals
            # What is taken as a whole may call attention in ways that only the original knows.
            for path in [path for path in originals if failed is None or f"{path}.".startswith(f"{failed}.")]:
                model.set_submodule(path, originals.pop(path))
            if failed is None:
                return _finished(*_as_a_whole(model), input_shape)
            if not is_torchs:  # torch's own modules are never traced into.
                leaves.add(failed)
        else:
            return _finished(model, graph, leaves, input_shape)


def _as_a_whole(model: nn.Module) -> tuple[nn.Module, fx.Graph, set[str]]:
    """The graph that calls a model, which then is its only module."""
    root, graph = nn.Module(), fx.Graph()
    root.add_module(WHOLE, model)
    graph.output(graph.call_module(WHOLE, (graph.placeholder("x"),)))
    return root, graph, {WHOLE}


def _finished(model: nn.Module, graph: fx.Graph, leaves: set[str], input_shape: tuple[int, int, int]) -> fx.GraphModule:
    for node in graph.nodes:
        node.type = None  # A return annotation names a class for training, which scripting would insist on.
    traced = fx.GraphModule(model, graph, type(model).__name__)
    traced.meta["untraced"] = tuple(sorted(leaves))
    rewriting.rewrite(traced)
    _note_shapes(traced, input_shape)
    return traced


def drops_paths(module: nn.Module | None) -> bool:
    """Whether a module is stochastic depth: it does something in training that a trace in eval mode would lose."""
    # By name: importing torchvision, for its class, takes a second.
    return type(module).__name__ in {"StochasticDepth", "DropPath"}


def is_whole(traced: fx.GraphModule) -> bool:
    """Whether a model was taken as a whole."""
    return untraced(traced) == (WHOLE,)


def untraced(model: nn.Module) -> tuple[str, ...]:
    """Paths of the submodules of a traced model, or of what was made of it, that were taken as a whole."""
    return model.meta.get("untraced", ()) if isinstance(model, fx.GraphModule) else ()


@contextmanager
def _look_into_wrapped_functions() -> Iterator[None]:
    """Lets tracing go into functions that their library has asked torch.fx to leave alone: they may hold layers."""
    wrapped = dict(_symbolic_trace._wrapped_fns_to_patch)
    _symbolic_trace._wrapped_fns_to_patch.clear()
    try:
        yield
    finally:
        _symbolic_trace._wrapped_fns_to_patch.update(wrapped)


@contextmanager
def _real_modules() -> Iterator[None]:
    """Lets modules compute while torch.fx has replaced how they are called."""
    replaced = nn.Module.__call__, nn.Module.__getattr__
    own: Any = nn.Module
    own.__call__, own.__getattr__ = _symbolic_trace._orig_module_call, _symbolic_trace._orig_module_getattr
    try:
        yield
    finally:
        own.__call__, own.__getattr__ = replaced


class _Tracer(fx.Tracer):
    """Traces into everything but torch's own modules, and what is named; it knows the shape of every tensor.

    Each symbol carries what it would be for two numbers of images, as tensors without memory.
    """

    def __init__(self, model: nn.Module, leaves: set[str], input_shape: tuple[int, int, int]) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaves = leaves
        self._input_shape = input_shape
        tensors = [*model.parameters(), *model.buffers()]
        self._shadow = copy.deepcopy(model, {id(tensor): tensor.to("meta") for tensor in tensors})
        self.failed: str | None = None
        """The innermost module that could not be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is taken as a whole."""
        known = drops_paths(m) or module_qualified_name in self._leaves
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, and note the innermost that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            path = self.path_of_module(m)
            # If it was to be taken as a whole, it is called with something that has no symbol: by the module around it.
            if self.failed is None and path not in self._leaves:
                self.failed = path
            raise

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:  # noqa: ARG002
        """The arguments of the model's forward(): its images; whatever else it takes has its default."""
        name = next(iter(inspect.signature(root_fn.__get__(self.root)).parameters))
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The symbol for a node."""
        return Symbol(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, and find what it would be."""
        node = super().create_node(*args, **kwargs)
        try:
            with torch.no_grad(), _real_modules():
                node.meta[EXAMPLES] = tuple(self._run(node, place) for place in range(len(_BATCHES)))
        except Exception:
            node.meta.pop(EXAMPLES, None)
        return node

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Unpack a symbol."""
        length = common(obj, len)
        symbol: Any = obj
        return iter([symbol[place] for place in range(length)]) if isinstance(length, int) else super().iter(obj)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A symbol as a condition: a number of images other than those tried may decide otherwise."""
        found = common(obj, lambda value: value if isinstance(value, bool | int) else None)
        return super().to_bool(obj) if found is None else bool(found)

    def _run(self, node: fx.Node, place: int) -> Any:
        if node.op == "placeholder":
            return torch.empty(_BATCHES[place], *self._input_shape, device="meta")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta[EXAMPLES][place])
        target: Any = node.target
        if node.op == "get_attr":
            value = operator.attrgetter(target)(self.root)
            return value.to("meta") if isinstance(value, Tensor) else value
        if node.op == "call_module":
            return self._shadow.get_submodule(target)(*args, **kwargs)
        return call(node, args, kwargs)


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every floating-point tensor in it."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            n.meta["shape"] = result.shape
        return result


@contextmanager
def _count_inside(traced: fx.GraphModule) -> Iterator[None]:
    """Note how many values the layers of what was taken as a whole give for an image, in `meta["num_outputs"]`."""
    counts: dict[str, int] = {}
    traced.meta["num_outputs"] = counts

    def count(path: str, output: Any) -> None:
        counts[path] = counts.get(path, 0) + (output.numel() // NUM_IMAGES if isinstance(output, Tensor) else 0)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, path=path: count(path, output))
        for path, module in layers_inside(traced)
    ]
    yield
    for handle in handles:
        handle.remove()


def layers_inside(traced: fx.GraphModule) -> list[tuple[str, nn.Conv2d | nn.Linear]]:
    """The layers, by path, of the submodules that were taken as a whole."""
    found = []
    for whole in untraced(traced):
        modules = dict(traced.get_submodule(whole).named_modules())
        # torch's transformers use the weights of their layers themselves.
        using = [path for path, module in modules.items() if isinstance(module, _USING_WEIGHTS)]
        found += [
            (f"{whole}.{path}", module)
            for path, module in modules.items()
            if isinstance(module, nn.Conv2d | nn.Linear) and not any(path.startswith(f"{other}.") for other in using)
        ]
    return found


def _note_shapes(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> None:
    """Write the shape of each floating-point tensor, for two images, into its node's `meta["shape"]`."""
    nodes = [node for node in traced.graph.nodes if node.op != "output"]
    for node in nodes:
        example = node.meta.get(EXAMPLES, (None,))[0]
        if isinstance(example, Tensor) and example.is_floating_point():
            node.meta["shape"] = example.shape
    if not all(EXAMPLES in node.meta for node in nodes):
        # What was taken as a whole has to be run: it may look at values.
        with torch.inference_mode(), _count_inside(traced):
            _Shapes(traced).run(torch.zeros(_BATCHES[0], *input_shape))
    for node in nodes:
        node.meta.pop(EXAMPLES, None)
