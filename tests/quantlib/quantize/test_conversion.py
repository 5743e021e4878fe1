"""Conversion to int8, and int8 models read back from their bytes."""

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.eager.modules import DeQuantStub, QuantStub
from quantlib.errors import MachineError, ModelError
from quantlib.export import scripting
from quantlib.graph import fusion
from quantlib.measure import evaluation
from quantlib.models import mobilenet_v2
from quantlib.models.weights import load_weights, read_weights
from quantlib.quantize import calibration, conversion, preparation
from quantlib.recipe.scheme import QConfigName
from quantlib.runtimes.engine import use_engine

Calibrated = Callable[[str], nn.Module]


def _signal_to_noise(expected, got):
    """Signal-to-noise ratio in decibels."""
    return float(20 * torch.log10(expected.norm() / (expected - got).norm()))


@pytest.mark.parametrize("qconfig", get_args(QConfigName))
def test_int8_logits_are_close_to_float(calibrated, fused_model, val_inputs, engine, qconfig):
    int8 = conversion.convert(calibrated(qconfig), engine)
    conversion.check_int8(int8, engine, input_shape=(3, 32, 32))

    with torch.inference_mode(), use_engine(engine):
        expected, got = fused_model(val_inputs), int8(val_inputs)

    # A rounded value has an error of 1/√12 of a step (29 dB below 8 of 128 steps); thirteen layers add theirs.
    assert _signal_to_noise(expected, got) > 15
    assert torch.equal(got.argmax(1), expected.argmax(1))
    assert not torch.equal(got, expected)


def test_converted_weights_are_bytes(calibrated, engine):
    int8 = conversion.convert(calibrated("fbgemm"), engine)

    assert int8.features[0][0].weight().dtype == torch.qint8
    assert int8.classifier[1].weight().qscheme() == torch.per_channel_affine
    assert "torch.float32" not in {str(value.dtype) for value in int8.parameters()}


def test_converting_leaves_the_prepared_model_in_float(calibrated, val_inputs, engine):
    prepared = calibrated("default")
    with torch.inference_mode():
        before = prepared(val_inputs)
        conversion.convert(prepared, engine)
        assert torch.equal(prepared(val_inputs), before)


def test_an_engine_that_this_machine_lacks_is_refused(calibrated):
    with pytest.raises(MachineError, match="'tensorrt'"):
        conversion.convert(calibrated("default"), "tensorrt")


class _PlainAddition(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(x + self.conv(x)).mean([2, 3])


class _NoStubs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x).mean([2, 3])


@pytest.mark.parametrize("architecture", [_PlainAddition, _NoStubs])
def test_an_architecture_that_cannot_run_in_int8_is_refused_with_what_it_needs(architecture, train_shard, engine):
    prepared = preparation.prepare(architecture(), scheme("default"), "eval")
    calibration.calibrate(prepared, train_shard, batch_size=12)
    int8 = conversion.convert(prepared, engine)

    with pytest.raises(ModelError, match=r"cannot run.*QuantStub.*FloatFunctional in place of"):
        conversion.check_int8(int8, engine, input_shape=(3, 32, 32))


# Sizes of MobileNetV2 with 1,000 classes, in MB, as the tutorial's own script writes it with torch 2.15.


@pytest.fixture(scope="module")
def full_size():
    torch.manual_seed(0)
    return fusion.fuse_model(mobilenet_v2.mobilenet_v2().eval(), "eval")


def test_float_file_has_13_99_mb(full_size):
    assert len(scripting.script(full_size)) / 1e6 == pytest.approx(13.99, rel=0.02)


@pytest.mark.parametrize(("qconfig", "megabytes"), [("default", 3.62), ("fbgemm", 3.93)])
def test_int8_file_is_less_than_a_third_of_float(full_size, tmp_path, engine, qconfig, megabytes):
    with (tmp_path / "shard").open("wb") as file:
        pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
        shards.save(pixels.numpy(), torch.zeros(2, dtype=torch.int64).numpy(), IMAGENET, file)
    prepared = preparation.prepare(full_size, scheme(qconfig), "eval")
    calibration.calibrate(prepared, tmp_path / "shard", batch_size=2)

    size = len(scripting.script(conversion.convert(prepared, engine), engine))

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
def test_real_weights_lose_what_the_tutorial_loses(
    shared,
    real_shards,
    engine,
    weights,
    qconfig,
    least,
    most,
):
    model = mobilenet_v2.mobilenet_v2(num_classes=10).eval()
    path = str(shared(f"weights/{weights}"))
    load_weights(model, read_weights(path, "mobilenet_v2"), path)
    fused = fusion.fuse_model(model, "eval")
    prepared = preparation.prepare(fused, scheme(qconfig), "eval")
    calibration.calibrate(prepared, real_shards[1], batch_size=50)
    int8 = conversion.convert(prepared, engine)

    float_top1 = evaluation.evaluate(fused, real_shards[0], batch_size=50).top1
    with use_engine(engine):
        int8_top1 = evaluation.evaluate(int8, real_shards[0], batch_size=50).top1

    assert float_top1 == pytest.approx(0.8332, abs=0.08)  # of 200 images; three standard deviations are 0.079
    assert least <= float_top1 - int8_top1 <= most
