"""Conversion: a prepared model with its grids fixed, close to float, and what it costs on disk."""

import copy
import dataclasses
from typing import get_args

import pytest
import torch
from branching import BranchingClassifier
from schemes import scheme
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.export import scripting
from quantlib.graph import fusion
from quantlib.graph.model import trace_model
from quantlib.graph.tracing import trace
from quantlib.measure import evaluation
from quantlib.models import mobilenet_v2
from quantlib.models.weights import load_weights, read_weights
from quantlib.quantize import calibration, conversion, preparation
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize, freeze_observers
from quantlib.quantize.grids import Grid, weight_grid
from quantlib.recipe.scheme import QConfigName

SHAPE = (3, 32, 32)


def _signal_to_noise(expected, got):
    """Signal-to-noise ratio in decibels."""
    return float(20 * torch.log10(expected.norm() / (expected - got).norm()))


def _calibrate(fused, own_scheme, shard, batch_size):
    model = preparation.observe(fused, own_scheme.float_layers)
    calibration.calibrate(model, shard, batch_size)
    calibration.choose_ranges(model, own_scheme)
    return model


def _logits(model, x):
    with torch.inference_mode():
        return model(x)


@pytest.fixture
def trainable(trained_model, val_inputs):
    """Prepares the trained net for training, and shows it the images three times."""
    fused = fusion.fuse_model(trace(copy.deepcopy(trained_model), SHAPE), "qat")

    def prepare(own_scheme):
        model = preparation.prepare_qat(fused, own_scheme)
        with torch.no_grad():
            for _ in range(3):
                model(val_inputs)
        return model

    return prepare


@pytest.mark.parametrize("qconfig", get_args(QConfigName))
def test_quantized_logits_are_close_to_float(calibrated, fused_model, val_inputs, qconfig):
    quantized = conversion.convert(calibrated(qconfig), scheme(qconfig))

    expected, got = _logits(fused_model, val_inputs), _logits(quantized, val_inputs)

    # A rounded value has an error of 1/√12 of a step (29 dB below 8 of 128 steps); thirteen layers add theirs.
    assert _signal_to_noise(expected, got) > 15
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert not torch.equal(got, expected)


@pytest.mark.parametrize(("qconfig", "per_channel"), [("default", False), ("fbgemm", True)])
def test_each_layer_keeps_its_float_weight_next_to_the_grid_that_suits_it(
    calibrated, fused_model, qconfig, per_channel
):
    quantized = conversion.convert(calibrated(qconfig), scheme(qconfig))

    paths = preparation.int8_layers(quantized)
    assert len(paths) == 14
    for path in paths:
        layer, own = quantized.get_submodule(path), fused_model.get_submodule(path).weight
        expected = weight_grid(own, per_channel=per_channel)
        assert torch.equal(layer.weight, own)
        assert torch.equal(layer.weight_quantizer.scale, expected.scale)
        assert layer.weight_quantizer.scale.shape == ((len(own),) if per_channel else ())
        assert layer.weight_quantizer.steps(own).dtype == torch.int8


def test_a_layers_output_is_that_of_its_rounded_weight(calibrated):
    layer = conversion.convert(calibrated("fbgemm"), scheme("fbgemm")).get_submodule("features.0.0")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = nn.Conv2d(3, layer.out_channels, 3, stride=2, padding=1)
    plain.weight.data, plain.bias.data = layer.weight_quantizer(layer.weight).detach(), layer.bias.detach()

    assert torch.equal(_logits(layer, x), _logits(plain, x))
    assert not torch.equal(plain.weight, layer.weight)


def test_a_layer_kept_in_float_gets_no_grid(fused_model, train_shard):
    kept = dataclasses.replace(scheme("default"), float_layers=("classifier.1", "features.2"))

    quantized = conversion.convert(_calibrate(fused_model, kept, train_shard, 36), kept)

    assert type(quantized.get_submodule("classifier.1")) is nn.Linear
    assert type(quantized.get_submodule("features.2.conv.0.0")) is nn.Conv2d
    assert len(preparation.int8_layers(quantized)) == 10


def test_converting_leaves_the_prepared_model_as_it_was(fused_model, train_shard, val_inputs):
    prepared = _calibrate(fused_model, scheme("default"), train_shard, 36)
    before, kinds = _logits(prepared, val_inputs), [type(module) for module in prepared.modules()]

    conversion.convert(prepared, scheme("default"))

    assert torch.equal(_logits(prepared, val_inputs), before)
    assert [type(module) for module in prepared.modules()] == kinds


def test_converting_in_place_gives_the_same_and_copies_nothing(calibrated, val_inputs):
    prepared = copy.deepcopy(calibrated("default"))
    expected = _logits(conversion.convert(prepared, scheme("default")), val_inputs)

    converted = conversion.convert(prepared, scheme("default"), inplace=True)

    assert converted is prepared
    assert torch.equal(_logits(converted, val_inputs), expected)


# Trained models


@pytest.mark.parametrize("qconfig", ["default", "fbgemm", "onednn"])
def test_a_trained_model_computes_what_it_did_at_the_end_of_training(trainable, val_inputs, qconfig):
    trained = trainable(scheme(qconfig))
    converted = conversion.convert(trained, scheme(qconfig))

    trained.eval()
    freeze_observers(trained)
    expected, got = _logits(trained, val_inputs), _logits(converted, val_inputs)

    # The same values except for ties: of some thousand roundings, a few go the other way, by one step each.
    assert float((got - expected).norm() / expected.norm()) < 0.02
    assert torch.equal(got.argmax(1), expected.argmax(1))


def test_a_trained_model_keeps_the_grids_that_it_was_trained_with(trainable):
    trained = trainable(scheme("fbgemm"))
    layer = trained.get_submodule("features.0.0")
    layer.weight_quantizer.largest *= 1.25  # As after steps in which the weight has shrunk.

    converted = conversion.convert(trained, scheme("fbgemm"))

    expected = layer.weight_quantizer.grid().scale
    assert torch.equal(converted.get_submodule("features.0.0").weight_quantizer.scale, expected)
    before, after = preparation.quantizers(trained), preparation.quantizers(converted)
    assert len(after) == 18
    assert all(isinstance(grid, Grid) for grid in after.values())
    assert {path: grid.range for path, grid in after.items()} == {
        path: quantizer.grid().range for path, quantizer in before.items()
    }


def test_a_converted_model_has_neither_batch_norm_nor_anything_that_learns(trainable, val_inputs):
    kept = dataclasses.replace(scheme("default"), float_layers=("features.2",))
    converted = conversion.convert(trainable(kept), kept)

    forbidden = fusion.ConvBatchNorm2d | nn.BatchNorm2d | ActivationFakeQuantize | WeightFakeQuantize
    assert [name for name, module in converted.named_modules() if isinstance(module, forbidden)] == []
    assert type(converted.get_submodule("features.2.conv.0.0")) is nn.Conv2d  # Its BatchNorm is folded as well.
    assert not converted.training
    before = _logits(converted, val_inputs)
    _logits(converted, 100 * val_inputs)
    assert torch.equal(_logits(converted, val_inputs), before)


def test_a_trained_model_has_the_shape_of_a_calibrated_one(trainable, calibrated):
    # So every file is written from either alike: ReLUs that training left to the grids are back.
    trained = conversion.convert(trainable(scheme("fbgemm")), scheme("fbgemm"))
    calibrated_one = conversion.convert(calibrated("fbgemm"), scheme("fbgemm"))

    kinds = [
        {name: type(module) for name, module in model.named_modules() if name} for model in (trained, calibrated_one)
    ]
    assert kinds[0] == kinds[1]
    assert kinds[0]["features.0.2"] is nn.ReLU
    assert {name: value.shape for name, value in trained.state_dict().items()} == {
        name: value.shape for name, value in calibrated_one.state_dict().items()
    }


class _AnyKind(nn.Module):
    """A plain addition, a concatenation, a layer without a bias, ReLU6, and functions in place of modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.clip = nn.ReLU6()
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        x = self.first(x).relu()
        x = torch.cat([x + self.clip(self.second(x)), x], 1)
        return self.last(nn.functional.hardswish(x).mean([2, 3]))


@pytest.mark.parametrize("qconfig", ["accurate", "fbgemm"])
def test_an_architecture_written_without_int8_in_mind_is_quantized(train_shard, val_inputs, qconfig):
    fused = fusion.fuse_model(trace_model(_AnyKind().eval(), SHAPE), "eval")

    quantized = conversion.convert(_calibrate(fused, scheme(qconfig), train_shard, 36), scheme(qconfig))

    assert preparation.int8_layers(quantized) == ["first", "second", "last"]
    assert quantized.get_submodule("first").bias is None
    assert _signal_to_noise(_logits(fused, val_inputs), _logits(quantized, val_inputs)) > 20


@pytest.mark.parametrize("qconfig", ["default", "fbgemm"])
@pytest.mark.parametrize("own_head", [False, True])
def test_layers_of_what_cannot_be_traced_are_converted_one_by_one(train_shard, val_inputs, own_head, qconfig):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), BranchingClassifier()) if own_head else BranchingClassifier()
    fused = fusion.fuse_model(trace(net, SHAPE), "eval")

    quantized = conversion.convert(_calibrate(fused, scheme(qconfig), train_shard, 36), scheme(qconfig))

    expected, got = _logits(fused, val_inputs), _logits(quantized, val_inputs)
    assert len(preparation.int8_layers(quantized)) == (3 if own_head else 2)
    assert all(isinstance(grid, Grid) for grid in preparation.quantizers(quantized).values())
    assert _signal_to_noise(expected, got) > 20
    assert not torch.equal(got, expected)


# Sizes of MobileNetV2 with 1,000 classes, in MB, as the tutorial's own script writes it with torch 2.15.


@pytest.fixture(scope="module")
def full_size():
    torch.manual_seed(0)
    return fusion.fuse_model(trace(mobilenet_v2.mobilenet_v2().eval(), SHAPE), "eval", inplace=True)


def test_float_file_has_13_99_mb(full_size):
    assert len(scripting.script(full_size, None, SHAPE)) / 1e6 == pytest.approx(13.99, rel=0.02)


@pytest.mark.parametrize(("qconfig", "megabytes"), [("default", 3.62), ("fbgemm", 3.93)])
def test_int8_file_is_less_than_a_third_of_float(full_size, tmp_path, engine, qconfig, megabytes):
    with (tmp_path / "shard").open("wb") as file:
        pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
        shards.save([pixels.numpy()], torch.zeros(2, dtype=torch.int64).numpy(), IMAGENET, file)
    calibrated = _calibrate(full_size, scheme(qconfig), tmp_path / "shard", batch_size=2)

    size = len(scripting.script(conversion.convert(calibrated, scheme(qconfig)), engine, SHAPE))

    assert size / 1e6 == pytest.approx(megabytes, rel=0.02)


# Real weights and images, if they are kept next to the repository.


@pytest.fixture(scope="module")
def real_shards(shared, tmp_path_factory):
    """200 validation images and 100 training images of CIFAR-10."""
    from quantlib.data import datasets, loading
    from quantlib.data.transforms import EvalTransform

    root = shared("data/cifar10")
    paths = []
    for name, num_images in (("val", 200), ("train", 100)):
        split = datasets.open_split("imagefolder", str(root), name)
        chosen = loading.shuffled(len(split), 0)[:num_images]
        paths.append(tmp_path_factory.mktemp("real") / name)
        with paths[-1].open("wb") as file:
            shards.save(
                loading.decode(split, chosen, EvalTransform(resize=64, crop=(64, 64)), seed=0),
                split.labels[chosen],
                IMAGENET,
                file,
            )
    return paths[0], paths[1]


@pytest.mark.parametrize(
    ("weights", "qconfig", "least", "most"),
    [
        ("mobilenet_v2_cifar10_64px.pth", "default", -0.03, 0.03),
        # The same function with channels of uneven range: min/max per tensor loses 36 points on all 5,000 images,
        # per channel 2.7.
        ("mobilenet_v2_cifar10_64px_uneven.pth", "default", 0.2, 0.5),
        ("mobilenet_v2_cifar10_64px_uneven.pth", "fbgemm", -0.02, 0.08),
    ],
)
def test_real_weights_lose_what_the_tutorial_loses(shared, real_shards, weights, qconfig, least, most):
    model = mobilenet_v2.mobilenet_v2(num_classes=10).eval()
    path = str(shared(f"weights/{weights}"))
    load_weights(model, read_weights(path, "mobilenet_v2"), path)
    fused = fusion.fuse_model(trace(model, (3, 64, 64)), "eval", inplace=True)
    quantized = conversion.convert(_calibrate(fused, scheme(qconfig), real_shards[1], 50), scheme(qconfig))

    float_top1 = evaluation.evaluate(fused, real_shards[0], batch_size=50).top1
    int8_top1 = evaluation.evaluate(quantized, real_shards[0], batch_size=50).top1

    assert float_top1 == pytest.approx(0.8332, abs=0.08)  # of 200 images; three standard deviations are 0.079
    assert least <= float_top1 - int8_top1 <= most
