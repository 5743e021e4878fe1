"""What the nodes of a traced graph call, and what they clip."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import fx, nn

# Their output is rounded in place of their input's.
CLIPPING = (nn.ReLU, nn.ReLU6)


def module_of(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that a node calls; None if it calls a function or a method."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def is_layer(module: nn.Module | None) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether a module has a weight that becomes int8."""
    return isinstance(module, nn.Conv2d | nn.Linear)


def calls_layer(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node calls a module that has a weight that becomes int8."""
    return is_layer(module_of(model, node))


def clipped_by(model: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What a ReLU or ReLU6 alone reads; None if the node is something else, or not the only one that reads it."""
    if not isinstance(module_of(model, node), CLIPPING):
        return None
    (before,) = node.all_input_nodes
    return before if len(before.users) == 1 else None


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What the function or the method that a node calls gives for some arguments."""
    target: Any = node.target
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)
