"""A classifier's forward() as a graph of its modules and operations, its parameters under their own names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torchvision.ops import StochasticDepth

from quantlib.eager.modules import FusedModule
from quantlib.errors import ModelError


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a model.

    A submodule whose forward() branches on values, or does anything else that symbols cannot, is taken as a whole;
    `untraced` names them.

    Raises:
        ModelError: If the model's own forward() cannot be traced.
    """
    leaves: set[str] = set()
    while True:
        tracer = _Tracer(leaves)
        try:
            graph = tracer.trace(model)
        except Exception as error:
            if tracer.failed is None:
                raise ModelError(
                    f"The forward() of {type(model).__name__} cannot be traced: {str(error).partition(chr(10))[0]} "
                    "Move what branches on values into a submodule, which then stays float; or put QuantStub and "
                    "DeQuantStub around the part to quantize, and the model is taken as it is."
                ) from None
            leaves.add(tracer.failed)
        else:
            for node in graph.nodes:
                node.type = None  # A return annotation names a class for training, which scripting would insist on.
            traced = fx.GraphModule(model, graph, type(model).__name__)
            traced.meta["untraced"] = tuple(sorted(leaves))
            return traced


def untraced(model: nn.Module) -> tuple[str, ...]:
    """Paths of the submodules of a traced model, or of what was made of it, that were taken as a whole."""
    return model.meta.get("untraced", ()) if isinstance(model, fx.GraphModule) else ()


class _Tracer(fx.Tracer):
    """Traces into everything but torch's own modules, and what is named."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaves = leaves
        self.failed: str | None = None
        """The innermost module that could not be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is taken as a whole."""
        # Stochastic depth does something else in training, which a trace in eval mode would lose.
        known = isinstance(m, FusedModule | StochasticDepth) or module_qualified_name in self._leaves
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Trace a call of a module, and note the innermost that fails."""
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every floating-point tensor in it."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            n.meta["shape"] = result.shape
        return result


def note_shapes(traced: fx.GraphModule, x: Tensor) -> None:
    """Write the shape of each tensor for the input x [N, C, H, W] into its node's `meta["shape"]`."""
    _Shapes(traced).run(x)
