"""Symbols that know the shape of what they stand for, while a model is traced."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

EXAMPLES = "examples"
"""In a node's `meta`: what it would be for each of a few numbers of images, as tensors without memory."""


@contextmanager
def len_of_symbols(model: nn.Module) -> Iterator[None]:
    """Lets `len(x)` in a model give a symbol for the number of images: Python takes only a number from `__len__`."""
    # Where its classes stand, and not in Python itself, whose own len others look for.
    found = [getattr(type(each).forward, "__globals__", {}) for each in model.modules()]
    places = [names for names in found if "len" not in names]
    for names in places:
        names["len"] = lambda x: x.size(0) if isinstance(x, Symbol) and common(x, len) is None else len(x)
    try:
        yield
    finally:
        for names in places:
            names.pop("len", None)


class Symbol(fx.Proxy):
    """Stands for a value while tracing; its shape is known, except for the number of images."""

    def _overwrite(self, operation: Any, other: Any) -> Any:
        if common(self, lambda value: value.dim()) is None:
            return NotImplemented  # A number: the name gets another value.
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._overwrite(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._overwrite(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._overwrite(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._overwrite(operator.itruediv, other)

    @property
    def shape(self) -> Any:
        """Numbers, and a symbol for each dimension that depends on the number of images."""
        dims = common(self, lambda value: value.dim())
        return super().__getattr__("shape") if dims is None else tuple(map(self.size, range(dims)))

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one dimension."""
        if dim is None:
            return self.shape
        found = common(self, lambda value: value.shape[dim])
        return super().__getattr__("size")(dim) if found is None else found

    def dim(self) -> Any:
        """Number of dimensions."""
        found = common(self, lambda value: value.dim())
        return super().__getattr__("dim")() if found is None else found

    @property
    def ndim(self) -> Any:
        """Number of dimensions."""
        return self.dim()

    @property
    def dtype(self) -> Any:
        """Its type, as it is in the end."""
        found = common(self, lambda value: value.dtype)
        return super().__getattr__("dtype") if found is None else found

    @property
    def device(self) -> Any:
        """Where everything is."""
        return (
            torch.device("cpu")
            if common(self, lambda value: value.dim()) is not None
            else super().__getattr__("device")
        )

    def new_zeros(self, *size: Any, **settings: Any) -> Any:
        """Zeros, which are a constant if their number is."""
        dims = size[0] if len(size) == 1 and isinstance(size[0], tuple | list) else size
        if all(isinstance(dim, int) for dim in dims) and isinstance(self.dtype, torch.dtype):
            return torch.zeros(*dims, dtype=settings.get("dtype", self.dtype))
        return super().__getattr__("new_zeros")(*size, **settings)

    def __len__(self) -> int:
        found = common(self, len)
        return super().__len__() if found is None else found

    def __index__(self) -> int:
        found = common(self, lambda value: value if isinstance(value, int) else None)
        if found is None:
            raise fx.proxy.TraceError("a number that depends on the number of images is used as an index")
        return int(found)


def common(symbol: fx.Proxy, of: Any) -> Any:
    """What a function gives for a symbol whatever the number of images; None if it differs or is not known."""
    examples = symbol.node.meta.get(EXAMPLES, ())
    try:
        found = [of(example) for example in examples]
    except (TypeError, AttributeError, IndexError):
        return None
    return found[0] if found and all(each == found[0] for each in found) else None
