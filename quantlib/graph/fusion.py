"""Fusion: Conv, BatchNorm and ReLU become one module, which int8 needs and float benefits from."""

import copy
from collections import Counter
from collections.abc import Sequence

from torch import fx, nn

from quantlib.eager.fusing import fuse_modules
from quantlib.recipe.scheme import FuseMode

# What eager-mode quantization can fuse, longest first.
_PATTERNS: tuple[tuple[type[nn.Module], ...], ...] = (
    (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    (nn.Conv2d, nn.BatchNorm2d),
    (nn.Conv2d, nn.ReLU),
    (nn.Linear, nn.ReLU),
)


def fuse_model(model: nn.Module, mode: FuseMode, *, inplace: bool = False) -> nn.Module:
    """Fuse a float model, or a copy of it.

    Args:
        model: Its fusible chains are consecutive modules in nn.Sequential. A model with other chains lists all of them
            in a method `modules_to_fuse() -> list[list[str]]`, which then decides alone.
        mode: "eval" folds BatchNorm into the convolution, for inference and PTQ; "qat" keeps it live, so that
            it can be trained, then frozen.
        inplace: Fuse the model itself, not a copy.
    """
    fused = model if inplace else copy.deepcopy(model)
    fuse_modules(fused, find_groups(fused), mode)
    return fused.train(mode == "qat")


def find_groups(model: nn.Module) -> list[list[str]]:
    """The chains of submodules to fuse, by dotted path."""
    if isinstance(model, fx.GraphModule):
        return _groups_of_graph(model)
    own = getattr(model, "modules_to_fuse", None)
    if own is not None:
        return [list(group) for group in own()]
    return [
        group
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential)
        for group in _groups_of(module, prefix=f"{name}." if name else "")
    ]


def _groups_of_graph(model: fx.GraphModule) -> list[list[str]]:
    modules, groups = dict(model.named_modules()), []
    calls = Counter(node.target for node in model.graph.nodes)
    for node in model.graph.nodes:
        chain, paths = [node], []
        while len(chain[-1].users) == 1 and len(chain) < len(_PATTERNS[0]):
            chain.append(next(iter(chain[-1].users)))
        for each in chain:
            module = modules.get(str(each.target)) if each.op == "call_module" else None
            # Not what stays float, nor a module that has more to do than this.
            if module is None or getattr(module, "qconfig", module) is None or calls[each.target] > 1:
                break
            paths.append(str(each.target))
        length = _num_fusible([type(modules[path]) for path in paths])
        if length > 1:
            groups.append(paths[:length])
    return groups


def _groups_of(chain: nn.Sequential, prefix: str) -> list[list[str]]:
    names, kinds = list(chain._modules), [type(module) for module in chain]
    groups = []
    position = 0
    while position < len(names):
        length = _num_fusible(kinds[position:])
        if length > 1:
            groups.append([prefix + name for name in names[position : position + length]])
        position += length
    return groups


def _num_fusible(kinds: Sequence[type[nn.Module]]) -> int:
    """How many modules from the first on become one; 1: the first stays alone."""
    return next((len(pattern) for pattern in _PATTERNS if tuple(kinds[: len(pattern)]) == pattern), 1)
