"""Frees an exported graph from the number of images that it was exported for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError, reason_of

# The images that sizes are found for, as a multiple of those that the graph was exported for.
_TIMES = 3
_RESHAPING = {"view", "_unsafe_view", "reshape"}


class AnyBatch:
    """Replaces, while a graph is built, the sizes that stand for the number of images.

    Each node is computed for more images, without memory. A dimension that differs from the file's holds the images,
    perhaps merged with others: `outer` counts what comes before the images within that dimension.
    """

    def __init__(self, batch: int, root: nn.Module, image: Sequence[int]) -> None:
        self._batch, self._root, self._image = batch, root, image

    def prepare(self, name: str, given: dict[str, Any], sizes: Sequence[int]) -> int | None:
        """Change the arguments of an operation.

        Args:
            name: The operation's, without namespace and overload.
            given: Changed in place.
            sizes: Of its result, as exported.

        Returns:
            `outer` of its result, where the operation decides that.
        """
        if name in _RESHAPING and self._place(given["self"]) is not None:
            return self._reshape(given, sizes)
        if name == "expand" and (place := self._place(given["self"])) is not None:
            dim = place + len(given["size"]) - given["self"].meta["value"].dim()
            given["size"] = [-1 if n == dim else size for n, size in enumerate(given["size"])]
        if name in {"cat", "stack"}:
            given["tensors"] = self._repeat(given["tensors"])
        return None

    def note(self, node: fx.Node, sizes: Sequence[int], outer: int | None) -> None:
        """Note what the nodes up to a new one would be for more images, and how it was exported.

        Raises:
            ModelError: If it cannot be computed for more images.
        """
        for each in node.graph.nodes:
            if "value" not in each.meta:
                each.meta["value"] = self._run(each)
        if sizes:
            node.meta["exported"] = tuple(sizes)
        merged = [each.meta.get("outer", 1) for each in node.all_input_nodes if self._merged_as(each, node)]
        node.meta["outer"] = outer or max(merged, default=1)

    def check(self, logits: fx.Node) -> None:
        """Check that the result has an answer for each image.

        Raises:
            ModelError: If it has not.
        """
        if self._place(logits) != 0 or logits.meta["value"].shape[0] != _TIMES * self._batch:
            raise refusal(self._batch, "it does not give logits for each of more images")

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return torch.empty(_TIMES * self._batch, *self._image[1:], device="meta")
        if node.op == "get_attr":
            *parents, last = str(node.target).split(".")
            return getattr(self._root.get_submodule(".".join(parents)), last).to("meta")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: each.meta["value"])
        target: Any = node.target
        try:
            with torch.no_grad(), torch.device("meta"):
                return (
                    getattr(args[0], target)(*args[1:], **kwargs)
                    if node.op == "call_method"
                    else target(*args, **kwargs)
                )
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise refusal(self._batch, f"{node.name} cannot take more ({reason_of(error)})") from None

    def _place(self, node: fx.Node) -> int | None:
        """The dimension of a tensor that grows with the number of images."""
        value, exported = node.meta["value"], node.meta.get("exported")
        if not isinstance(value, Tensor) or exported is None or len(exported) != value.dim():
            return None
        return next((dim for dim, size in enumerate(value.shape) if size != exported[dim]), None)

    def _merged_as(self, before: fx.Node, node: fx.Node) -> bool:
        """Whether images are merged with others in a tensor as in one that it is made of."""
        place, own = self._place(before), self._place(node)
        if place is None or own is None:
            return False
        same: bool = before.meta["exported"][place] == node.meta["exported"][own]
        return same

    def _reshape(self, given: dict[str, Any], sizes: Sequence[int]) -> int:
        before: fx.Node = given["self"]
        place = self._place(before)
        # Elements before the images, in memory order.
        ahead = math.prod(before.meta["exported"][:place]) * before.meta.get("outer", 1)
        choices = []
        for dim, size in enumerate(sizes):
            outer, rest = divmod(ahead, math.prod(sizes[:dim]))
            if rest == 0 and outer > 0 and size % (outer * self._batch) == 0:
                alone, last = size == self._batch and outer == 1, dim == len(sizes) - 1
                # Features come last, and are not merged with images; heads are, and come after them.
                choices.append((not alone, last, outer, dim))
        if not choices:
            raise refusal(self._batch, f"{before.name} is reshaped to {list(sizes)}, which has no place for more")
        *_, outer, dim = min(choices)
        name = "size" if "size" in given else "shape"
        given[name] = [*sizes[:dim], -1, *sizes[dim + 1 :]]
        return outer

    def _repeat(self, tensors: Sequence[fx.Node]) -> list[fx.Node]:
        """Tensors that are to be joined: one that is the same for each image is repeated for all of them."""
        found = {each: self._place(each) for each in tensors}
        first = next((each for each, place in found.items() if place is not None), None)
        if first is None or None not in found.values() or self._batch != 1:
            return list(tensors)
        dim, graph = found[first], first.graph
        count = graph.call_method("size", (first, dim))
        expanded = []
        for each in tensors:
            node = each
            if found[each] is None:
                dims = len(each.meta["exported"])
                node = graph.call_method("expand", (each, [count if n == dim else -1 for n in range(dims)]))
            expanded.append(node)
        return expanded


def refusal(batch: int, why: str) -> ModelError:
    """The error for a model that can only take as many images as it was exported for."""
    return ModelError(
        f"The model was exported for a fixed batch of {batch}, and {why}. Export it for any number of images: "
        "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))."
    )
