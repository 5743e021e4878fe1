"""Regions of int8, and those that may cost more time than they save.

Values are converted where they enter int8 and where they leave it, and int8 saves time in between. So a region with
many values at its borders for each multiply-add can be slower than float; from which ratio on depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from quantlib.graph.plan import Plan
from quantlib.graph.tracing import NUM_IMAGES

_NUM_PARTS = 4


@dataclass(frozen=True)
class Region:
    """Layers that pass int8 values on to each other, directly or through other int8 operations."""

    layers: tuple[str, ...]
    """Dotted paths."""
    num_multiplications: int
    """Multiply-adds of its layers for one image."""
    num_border_values: int
    """Values that enter or leave it for one image."""

    @property
    def cost(self) -> float:
        """Values at its borders per multiply-add."""
        return self.num_border_values / max(self.num_multiplications, 1)


def find_regions(traced: fx.GraphModule, plan: Plan) -> list[Region]:
    """The regions of a plan that have layers, in the graph's order.

    Args:
        traced: The model that the plan was drawn for.
        plan: What of it is int8.
    """
    region_of: dict[fx.Node, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node in plan.int8:
            joined = {id(region_of[each]): region_of[each] for each in node.all_input_nodes if each in region_of}
            nodes = [*(each for region in joined.values() for each in region), node]
            region_of.update(dict.fromkeys(nodes, nodes))
    regions = [_region(nodes, plan) for nodes in {id(nodes): nodes for nodes in region_of.values()}.values()]
    return [region for region in regions if region.layers]


def _region(nodes: Sequence[fx.Node], plan: Plan) -> Region:
    inside = set(nodes)
    entering = {each for node in nodes for each in node.all_input_nodes} - inside
    leaving = {node for node in nodes if any(user not in inside for user in node.users)}
    shapes = [node.meta["shape"] for node in entering | leaving if "shape" in node.meta]
    calls = {str(node.target) for node in nodes if node.op == "call_module"}
    layers = [layer for layer in plan.layers if layer.path in calls]
    return Region(
        layers=tuple(dict.fromkeys(layer.path for layer in layers)),
        num_multiplications=sum(layer.num_multiplications for layer in layers),
        num_border_values=sum(shape.numel() // NUM_IMAGES for shape in shapes),
    )


def costly_layers(regions: Sequence[Region]) -> list[list[str]]:
    """Layers that may be faster in float: up to three sets, each larger than the one before.

    Each holds the regions above some ratio of border values to multiply-adds, so that about a quarter, a half and three
    quarters of all border values are gone. A set that is nearer to no region or to all of them is left out.
    """
    total = sum(region.num_border_values for region in regions)
    nearest: dict[int, tuple[float, list[str]]] = {}
    for least in sorted({region.cost for region in regions}, reverse=True):
        chosen = [region for region in regions if region.cost >= least]
        share = _NUM_PARTS * sum(region.num_border_values for region in chosen) / total
        part, distance = round(share), abs(share - round(share))
        if 0 < part < _NUM_PARTS and (part not in nearest or distance < nearest[part][0]):
            nearest[part] = distance, list(dict.fromkeys(path for region in chosen for path in region.layers))
    return [layers for _, layers in nearest.values()]
