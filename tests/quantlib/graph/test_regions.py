"""Regions of int8, and which of their layers may be faster in float."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torchvision import models

from quantlib.graph import fusion, plan
from quantlib.graph.model import trace_model
from quantlib.graph.regions import Region, costly_layers, find_regions


def regions_of(model, shape):
    fused = fusion.fuse_model(trace_model(copy.deepcopy(model).eval(), shape), "eval", inplace=True)
    return find_regions(fused, plan.draw_plan(fused))


class Joined(nn.Module):
    """Two convolutions of one input, added for a third; then, behind SiLU, a fourth."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.third, self.fourth = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 5, 1)

    def forward(self, x):
        return self.fourth(nn.functional.silu(self.third(self.first(x) + self.second(x))))


def test_layers_that_pass_int8_on_are_one_region_whose_borders_are_what_enters_and_leaves():
    # Of 16 pixels, three channels enter and two leave; then two enter and five leave.
    assert regions_of(Joined(), (3, 4, 4)) == [
        Region(("first", "second", "third"), 16 * (3 * 4 + 3 * 4 + 4 * 2), 16 * (3 + 2)),
        Region(("fourth",), 16 * 2 * 5, 16 * (2 + 5)),
    ]


def test_a_depthwise_convolution_between_float_operations_is_the_costliest():
    found = regions_of(models.efficientnet_b0(num_classes=10), (3, 32, 32))
    worst = max(found, key=lambda region: region.cost)
    assert worst.layers[0].endswith("block.1.0")
    assert worst.cost > 0.5
    sets = costly_layers(found)
    assert len(sets) == 3
    for smaller, larger in itertools.pairwise(sets):
        assert set(smaller) < set(larger)
    assert set(sets[-1]) < {layer for region in found for layer in region.layers}


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_model_that_is_one_region_up_to_its_classifier_has_none_to_leave(name):
    torch.manual_seed(0)
    assert costly_layers(regions_of(models.get_model(name, num_classes=10), (3, 64, 64))) == []


def region(name, borders, work):
    return Region((name,), work, borders)


def test_sets_take_about_a_quarter_a_half_and_three_quarters_of_the_border_values():
    assert costly_layers([]) == []
    assert costly_layers([region("only", 10, 100)]) == []
    four = [region("d", 10, 400), region("a", 10, 100), region("c", 10, 300), region("b", 10, 200)]
    assert costly_layers(four) == [["a"], ["a", "b"], ["a", "c", "b"]]
    # Alike, so together.
    assert costly_layers([region("a", 10, 100), region("b", 10, 100), region("c", 20, 400)]) == [["a", "b"]]
    # Too small to be timed, and all but a little.
    assert costly_layers([region("a", 1, 1), region("b", 98, 100), region("c", 1, 10)]) == []
