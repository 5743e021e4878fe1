"""What of a model becomes int8: wherever it pays, with as few roundings as possible."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from branching import Branching
from schemes import SCHEDULE
from torch import nn
from torchvision import models
from torchvision.ops import StochasticDepth

from quantlib.data.transforms import TrainTransform
from quantlib.errors import ModelError
from quantlib.graph import fusion, plan
from quantlib.graph.inspection import inspect_model
from quantlib.graph.model import plan_of, trace_model
from quantlib.graph.plan import share_of_int8
from quantlib.models.source import ModelInput
from quantlib.quantize import calibration, conversion, preparation, qat
from quantlib.recipe.scheme import Scheme

SCHEME = Scheme(observer="minmax", weights="per_channel", activation_bits=8)
SHAPE = (3, 8, 8)


def settled(model, shape):
    """With statistics in BatchNorm, so that activations keep their size."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(8, *shape))
    return model.eval()


def quantized(model, shape=SHAPE):
    """The quantized model, calibrated on noise, and the noise."""
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    fused = fusion.fuse_model(trace_model(copy.deepcopy(model), shape), "eval", inplace=True)
    observed = preparation.observe(fused, (), inplace=True)
    with torch.inference_mode():
        observed(x)
    calibration.choose_ranges(observed, SCHEME)
    return conversion.convert(observed, SCHEME, inplace=True), x


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


def drawn(model, float_layers=()):
    """The plan of a model for images of 8 pixels."""
    fused = fusion.fuse_model(trace_model(copy.deepcopy(model).eval(), SHAPE), "eval", inplace=True)
    return plan.draw_plan(fused, float_layers)


def names(nodes):
    return [node.name for node in nodes]


def rounded(model, float_layers=()):
    """Names of the tensors that are rounded, in order."""
    return names(drawn(model, float_layers).rounded)


# Architectures


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("resnet18", 1.0),
        ("mobilenet_v2", 1.0),
        ("mobilenet_v3_small", 0.95),
        ("efficientnet_b0", 0.95),
        ("regnet_y_400mf", 0.95),
        ("shufflenet_v2_x0_5", 1.0),
        ("densenet121", 1.0),
        ("squeezenet1_1", 1.0),
        ("googlenet", 1.0),
    ],
)
def test_a_classifier_of_torchvision_is_quantized_as_it_is(name, least):
    torch.manual_seed(0)
    extra = {"init_weights": True} if name == "googlenet" else {}
    shape = (3, 32, 32)
    model = settled(models.get_model(name, num_classes=10, **extra), shape)
    assert share_of_int8(plan_of(model, shape).layers) >= least
    int8, x = quantized(model, shape)
    with torch.inference_mode():
        assert 0 < noise(model(x), int8(x)) < 0.3


def test_the_gates_of_squeeze_and_excite_stay_float_and_a_head_on_one_pixel_does_not():
    gated = plan_of(models.mobilenet_v3_small(num_classes=10).eval(), (3, 32, 32)).layers
    assert {layer.path.split(".")[-1] for layer in gated if not layer.int8} == {"fc1", "fc2"}
    assert all("squeeze-and-excite" in layer.reason for layer in gated if not layer.int8)
    # At 32 pixels, the last stage of ResNet-18 sees one pixel.
    assert all(layer.int8 for layer in plan_of(models.resnet18(num_classes=10).eval(), (3, 32, 32)).layers)


def test_of_attention_the_projections_are_int8_and_the_products_float():
    torch.manual_seed(0)
    vit = models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    layers = plan_of(vit, (3, 32, 32)).layers
    blocks = [f"encoder.layers.encoder_layer_{n}" for n in (0, 1)]
    own = ("self_attention.in_proj", "self_attention.out_proj", "mlp.0", "mlp.3")
    assert {layer.path for layer in layers if layer.int8} == {
        "conv_proj",
        "heads.head",
        *(f"{block}.{path}" for block in blocks for path in own),
    }
    products = [layer for layer in layers if not layer.int8]
    assert [(layer.path, layer.reason) for layer in products] == [
        (f"{block}.self_attention", "both of its factors depend on the image") for block in blocks
    ]
    # 16 pieces of the image and a token for its class, each with each, 32 channels, twice.
    assert [layer.num_multiplications for layer in products] == [2 * 17 * 17 * 32] * 2


# Where int8 begins and ends


class Residual(nn.Module):
    """A shared ReLU, a sum, functions in place of modules, and a sum in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = torch.nn.functional.relu(self.second(x))
        y = self.relu(y + x)
        y += self.third(y)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(y, 1), 1))


def test_each_tensor_is_rounded_once_and_with_its_relu():
    torch.manual_seed(0)
    model = Residual().eval()
    # The image; two layers and a sum, each with its ReLU; a layer without one; the mean; and the logits.
    assert rounded(model) == ["x", "relu", "relu_1", "relu_2", "third", "flatten", "fc"]
    int8, x = quantized(model)
    with torch.inference_mode():
        assert 0 < noise(model(x), int8(x)) < 0.01


class Between(nn.Module):
    """An operation between two layers and a third; or at the end."""

    def __init__(self, operation, channels=4):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.operation = operation
        self.last = nn.Conv2d(channels, 2, 1) if channels else None

    def forward(self, x):
        y = self.operation(self.first(x), self.second(x))
        return y if self.last is None else self.last(y)


class OfFirst(nn.Module):
    """A module that reads the first layer alone."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, _):
        return self.module(x)


def swapped_halves(x):
    first, second = torch.chunk(x, 2, 1)
    return torch.cat([second, first], 1)


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(lambda x, _: nn.functional.max_pool2d(x, 2), id="maximum"),
        pytest.param(lambda x, _: nn.functional.avg_pool2d(x, 2), id="mean of some pixels"),
        pytest.param(lambda x, _: nn.functional.adaptive_avg_pool2d(x, 2), id="mean to 2 pixels"),
        pytest.param(lambda x, _: x.reshape(-1, 4, 4, 16).transpose(2, 3).contiguous(), id="another shape"),
        pytest.param(lambda x, _: torch.relu(nn.functional.max_pool2d(x, 2)), id="ReLU of a maximum"),
        pytest.param(OfFirst(nn.ChannelShuffle(2)), id="channels in another order"),
        pytest.param(OfFirst(nn.Dropout()), id="dropout"),
        pytest.param(OfFirst(StochasticDepth(0.5, "row")), id="depth"),
    ],
)
def test_what_gives_values_of_its_input_stays_int8_on_the_same_grid(operation):
    found = drawn(Between(operation))
    assert names(found.rounded) == ["x", "first", "last"]
    operations = {node.name for node in found.rounded[0].graph.nodes if node.op not in {"placeholder", "output"}}
    assert set(names(found.int8)) == operations


@pytest.mark.parametrize(
    ("operation", "channels", "name"),
    [
        (lambda x, y: x + y, 4, "add"),
        (torch.add, 4, "add"),
        (lambda x, y: x.add(y), 4, "add"),
        (lambda x, y: torch.cat([x, y], 1), 8, "cat"),
        (lambda x, y: nn.functional.hardswish(x) + y, 4, "hardswish"),
        (lambda x, y: torch.cat([swapped_halves(x), y], 1), 8, "cat"),
    ],
)
def test_what_gives_new_values_computes_in_int8_and_has_a_grid_of_its_own(operation, channels, name):
    found = drawn(Between(operation, channels))
    assert {"x", "first", "second", name, "last"} <= set(names(found.rounded))
    assert {"first", "second", name, "last"} <= set(names(found.int8))
    assert {node.name for node in found.rounded} - set(names(found.int8)) == {"x"}


@pytest.mark.parametrize(
    ("operation", "channels", "name"),
    [
        (lambda x, _: nn.functional.silu(x), 4, "silu"),
        (lambda x, y: x * y, 4, "mul"),
        (lambda x, _: x + 1, 4, "add"),
        (lambda x, y: torch.add(x, y, alpha=2), 4, "add"),
        (lambda x, y: x + y.mean((2, 3), keepdim=True), 4, "add"),
        (lambda x, y: torch.cat([x, torch.sigmoid(y)], 1), 8, "cat"),
        (lambda x, _: nn.functional.interpolate(x, scale_factor=2), 4, "interpolate"),
        # A range of its own, much smaller than its input's.
        (lambda x, _: nn.functional.adaptive_avg_pool2d(x, 1), 4, "adaptive_avg_pool2d"),
    ],
)
def test_anything_else_stays_float_between_what_is_rounded_before_and_after_it(operation, channels, name):
    found = drawn(Between(operation, channels))
    assert name not in names(found.int8)
    order = [each for each in names(found.rounded) if each != "second"]
    assert order == ["x", "first", name, "last"]


@pytest.mark.parametrize("operation", [torch.add, lambda x, y: torch.relu(x + y), lambda x, y: torch.cat([x, y], 1)])
def test_what_no_layer_reads_in_the_end_stays_float(operation):
    found = drawn(Between(operation, None))
    assert names(found.rounded) == ["x", "first", "second"]
    assert sorted(names(found.int8)) == ["first", "second"]


@pytest.mark.parametrize("clip", [nn.functional.relu, nn.functional.relu6])
def test_a_layer_or_sum_that_is_clipped_is_rounded_after_that_alone(clip):
    name = clip.__name__
    assert rounded(Between(lambda x, _: clip(x))) == ["x", name, "last"]
    assert rounded(Between(lambda x, y: clip(x + y))) == ["x", "first", "second", name, "last"]
    # What something else reads as well is rounded before, and clipping gives values of the same grid.
    assert rounded(Between(lambda x, _: clip(x) + x)) == ["x", "first", "add", "last"]


def test_of_a_float_tensor_only_int8_arithmetic_reads_the_rounded_form():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = nn.functional.silu(self.first(x))
            y = self.second(x)
            return torch.sigmoid(x) * x * y * torch.tanh(y)

    found = drawn(Shared())
    readers = {node.name: names(found.readers(node)) for node in found.rounded}
    assert readers == {"x": ["first"], "first": ["silu"], "silu": ["second"], "second": ["mul_1", "tanh"]}


# What stays float


def test_the_layers_of_a_module_that_cannot_be_traced_are_int8_each_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Branching(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)
    ).eval()
    found = drawn(model)
    assert sorted(layer.path for layer in found.layers if layer.int8) == ["0", "2.conv", "3", "5"]
    assert names(found.rounded) == ["input_1", "_1", "_2", "_3", "_5"]
    assert [layer.path for layer in drawn(model, ("2",)).layers if not layer.int8] == ["2.conv"]
    int8, x = quantized(model)
    with torch.inference_mode():
        assert 0 < noise(model(x), int8(x)) < 0.01
        y = model[:2](x)
        assert 0 < noise(model[2](y), int8.get_submodule("2")(y)) < 0.01


def test_a_layer_with_other_padding_than_zeros_stays_float():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 1))
    assert [(layer.int8, layer.reason) for layer in drawn(model).layers] == [
        (False, "its padding is reflect"),
        (True, ""),
    ]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_layer_with_padding_on_one_side_stays_float():
    model = nn.Sequential(nn.Conv2d(3, 4, 2, padding="same"), nn.Conv2d(4, 4, 3, padding="same"))
    assert [layer.reason for layer in drawn(model).layers] == ["its padding is not the same on both sides", ""]


def test_what_the_recipe_keeps_float_is_float_with_all_that_is_inside():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), nn.ReLU()
    )
    model.add_module("10", nn.Conv2d(4, 4, 1))
    found = drawn(model, ("1",))
    assert [(layer.path, layer.reason) for layer in found.layers] == [
        ("0", ""),
        ("1.0", "the recipe keeps it float"),
        ("1.2", "the recipe keeps it float"),
        ("10", ""),  # Its path begins alike.
    ]
    assert {node.target for node in found.int8} == {"0", "10"}
    assert [layer.int8 for layer in drawn(model, ("1.2",)).layers] == [True, True, False, True]


def test_a_sum_that_the_recipe_keeps_float_is_float():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return x + self.conv(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(4, 4, 1))
    assert "add" in names(drawn(model).int8)
    assert "add" not in names(drawn(model, ("1",)).int8)


def test_a_layer_that_runs_twice_has_a_grid_for_each_of_its_outputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(192, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.conv(torch.relu(self.conv(x)))).flatten(1))

    torch.manual_seed(0)
    model = Twice().eval()
    assert rounded(model) == ["x", "relu", "relu_1", "fc"]
    int8, x = quantized(model)
    with torch.inference_mode():
        assert 0 < noise(model(x), int8(x)) < 0.01


def test_batch_norm_that_stands_alone_is_frozen_as_the_fused_are(train_split):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(8),  # As in DenseNet: before a convolution, not behind one.
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    fused = fusion.fuse_model(trace_model(settled(model, (3, 32, 32)), (3, 32, 32)), "qat")
    prepared = preparation.prepare_qat(fused, SCHEME)
    before = {name: value.clone() for name, value in prepared.state_dict().items() if "running" in name}
    schedule = replace(SCHEDULE, freeze_batch_norm_after_epoch=-2, freeze_observer_after_epoch=0)
    transform = TrainTransform(crop=(32, 32), scale=(0.5, 1.0), flip=0.5)
    qat.train_epoch(prepared, 0, schedule, train_split, np.arange(len(train_split)), transform)
    after = prepared.state_dict()
    assert len(before) == 4
    assert all(torch.equal(after[name], value) for name, value in before.items())


# The plan of each layer


def test_each_layer_has_its_class_and_its_number_of_multiplications():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(2),
        nn.Linear(4, 5),
        nn.Flatten(),
        nn.Linear(20, 2),
    )
    assert [(layer.path, layer.kind, layer.num_multiplications) for layer in drawn(model).layers] == [
        ("0", "Conv2d", 4 * 4 * 4 * 27),
        ("2", "Conv2d", 2 * 2 * 4 * 9),
        ("4", "Linear", 4 * 5 * 4),
        ("6", "Linear", 20 * 2),
    ]


def test_the_share_of_int8_counts_multiplications():
    layers = [plan.LayerPlan(str(n), "Conv2d", int8, "", n) for n, int8 in ((10, True), (25, True), (65, False))]

    assert share_of_int8(tuple(layers)) == pytest.approx(0.35)
    assert share_of_int8(tuple(layers[:2])) == 1
    assert share_of_int8(()) == 0


def test_a_recipes_model_is_inspected_without_its_weights(tiny_arguments, tmp_path):
    arguments = {name: value for name, value in tiny_arguments.items() if name != "num_classes"}
    source = ModelInput("mobilenet_v2", json.dumps(arguments), str(tmp_path / "nowhere.pth"), fingerprint="", code="")

    layers = inspect_model(source, 3, (3, 32, 32))

    assert len(layers) == 14
    assert all(layer.int8 for layer in layers)
    assert layers[-1].path == "classifier.1"
    assert layers[-1].num_multiplications == 1280 * 3
    with pytest.raises(ModelError, match="the data has 4 classes"):
        inspect_model(replace(source, arguments=json.dumps(tiny_arguments)), 4, (3, 32, 32))
