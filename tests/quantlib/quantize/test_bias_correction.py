import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.graph import fusion
from quantlib.graph.tracing import trace
from quantlib.models import checkpoint, mobilenet_v2
from quantlib.models.checkpoint import Header
from quantlib.quantize import bias_correction, calibration, conversion, preparation, simulation, stored
from quantlib.recipe.scheme import Scheme

SETTING = [[1, 8, 1, 1], [3, 8, 2, 2]]
SHAPE = (3, 16, 16)
SCHEME = Scheme(observer="minmax", weights="per_tensor", activation_bits=7)


def save_shard(path, seed, low=0, high=256):
    """24 images of noise between two brightnesses."""
    with path.open("wb") as file:
        pixels = np.random.default_rng(seed).integers(low, high, (24, 16, 16, 3), dtype=np.uint8)
        shards.save([pixels], np.zeros(24, dtype=np.int64), IMAGENET, file)
    return path


@pytest.fixture
def shard(tmp_path):
    return save_shard(tmp_path / "shard", 0)


def calibrate(net, shard, scheme=SCHEME):
    model = preparation.observe(fusion.fuse_model(trace(net.eval(), SHAPE), "eval"), scheme.float_layers)
    calibration.calibrate(model, shard, batch_size=24)
    calibration.choose_ranges(model, scheme)
    return model


@pytest.fixture
def calibrated(shard):
    torch.manual_seed(0)
    net = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.1, 4)  # So uneven that int8 weights per tensor shift the outputs.
            module.bias.data.normal_(0, 0.5)
    return calibrate(net, shard)


def in_float(calibrated):
    return simulation.simulate(calibrated, "weights")


def mean_logits(model, shard):
    with torch.inference_mode():
        return model(shards.open_shard(shard).inputs()).mean(0)


def means(model, path, shard, of=(0, 2, 3)):
    """A layer's mean output."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, output: seen.append(output.mean(of)))
    mean_logits(model, shard)
    handle.remove()
    return seen[0]


def errors(calibrated, path, shard, of=(0, 2, 3), scheme=SCHEME):
    """The largest error of a layer's mean outputs in int8, with its own biases and with corrected ones."""
    corrected = bias_correction.correct_bias(calibrated, scheme, [shard])
    wanted = means(in_float(calibrated), path, shard, of)
    before, after = (means(conversion.convert(model, scheme), path, shard, of) for model in (calibrated, corrected))
    return float((before - wanted).abs().max()), float((after - wanted).abs().max())


def test_corrected_biases_bring_the_mean_logits_back(calibrated, shard):
    wanted = mean_logits(in_float(calibrated), shard)
    before = mean_logits(conversion.convert(calibrated, SCHEME), shard)
    corrected = bias_correction.correct_bias(calibrated, SCHEME, [shard])
    after = mean_logits(conversion.convert(corrected, SCHEME), shard)
    # What is left is the rounding of the logits themselves.
    assert (after - wanted).abs().max() < 0.25 * (before - wanted).abs().max()


def test_a_corrected_model_handed_over_converts_to_the_bytes_of_one_read_back(calibrated, shard):
    arguments = {"num_classes": 4, "width_mult": 0.25, "inverted_residual_setting": SETTING}
    header = Header(architecture="mobilenet_v2", arguments=arguments, code="", input_shape=SHAPE)
    header = replace(header, fused="eval", scheme=SCHEME)
    content = stored.hand_over(bias_correction.correct_bias(calibrated, SCHEME, [shard]), header)
    handed_over, read_back = (conversion.convert(stored.open_model(content)[0], SCHEME, inplace=True) for _ in range(2))
    header = replace(header, quantized=True)
    assert checkpoint.save(handed_over, header) == checkpoint.save(read_back, header)


def test_the_mean_behind_relu_is_what_is_corrected(calibrated, shard):
    # Its inputs are the same in all models, apart from rounding.
    before, after = errors(calibrated, "features.0.2", shard)
    assert after < 0.05 * before
    # Values that ReLU cuts off do not count.
    before, after = errors(calibrated, "features.0.0", shard)
    assert after > 0.05 * before


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.GELU])
def test_the_mean_before_an_activation_that_passes_negative_values_is_what_is_corrected(shard, activation):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 3, padding=1), activation()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for layer in (net[0], net[2]):
        layer.weight.data[0] *= 30  # So uneven that int8 weights per tensor shift the outputs.
    calibrated = calibrate(net, shard)
    for path in ("0", "2"):
        before, after = errors(calibrated, path, shard)
        assert after < 0.02 * before
        assert after < 1e-3


def test_correct_bias_changes_biases_alone_and_only_in_its_copy(calibrated, shard):
    before = copy.deepcopy(calibrated.state_dict())
    corrected = bias_correction.correct_bias(calibrated, SCHEME, [shard]).state_dict()
    changed = {name for name, value in corrected.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.endswith("bias") for name in changed)
    assert all(torch.equal(value, before[name]) for name, value in calibrated.state_dict().items())


def test_a_corrected_model_is_a_calibrated_one_that_nothing_listens_to(calibrated, shard):
    corrected = bias_correction.correct_bias(calibrated, SCHEME, [shard])
    assert not any(module._forward_hooks for module in (*corrected.modules(), *calibrated.modules()))
    assert type(corrected.get_submodule("features.0.0")) is nn.Conv2d


def test_a_layer_kept_in_float_makes_up_for_the_int8_layers_before_it(calibrated, shard):
    kept = replace(SCHEME, float_layers=("classifier",))
    torch.manual_seed(0)
    net = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    before, after = errors(calibrate(net, shard, kept), "classifier.1", shard, of=0, scheme=kept)
    assert after < 0.01 * before


@pytest.mark.parametrize(
    ("layer", "values", "channel"),
    [
        pytest.param(nn.Conv2d(3, 1, 1), (4, 1, 1, 1), (1, 1, 1), id="Conv2d"),
        pytest.param(nn.Linear(3, 1), (4, 1), (1,), id="Linear"),
        pytest.param(nn.Linear(3, 1), (2, 2, 1), (1,), id="Linear over tokens"),
    ],
)
def test_behind_relu_only_active_values_count(layer, values, channel):
    output = torch.tensor([-50.0, 1.0, 2.0, 3.0]).view(values)
    wanted = torch.full(channel, 2.25)  # The mean after ReLU if each of the three active values were one larger.
    shift = bias_correction._shift(output, wanted, layer, relu=True)
    assert shift.shape == channel
    assert torch.allclose(shift, torch.ones(channel))


class Plain(nn.Module):
    """A layer without a bias, one that runs twice, and linear layers over the pixels, as an image or as tokens."""

    def __init__(self, tokens=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(8, 8, 1)
        self.each, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        self.tokens = tokens
        for layer in (self.first, self.twice, self.each, self.last):
            layer.weight.data[0] *= 30  # So uneven that int8 weights per tensor shift the outputs.

    def forward(self, x):
        x = self.twice(self.twice(self.first(x))).permute(0, 2, 3, 1)  # (N, H, W, channels)
        if self.tokens:
            return self.last(self.each(x.flatten(1, 2)).mean(1))
        return self.last(self.each(x).mean([1, 2]))


def test_a_layer_without_a_bias_or_that_runs_twice_stays_as_it_is(shard):
    calibrated = calibrate(Plain(), shard)
    corrected = bias_correction.correct_bias(calibrated, SCHEME, [shard])
    assert corrected.get_submodule("first").bias is None
    assert torch.equal(corrected.get_submodule("twice").bias, calibrated.get_submodule("twice").bias)
    assert not torch.equal(corrected.get_submodule("last").bias, calibrated.get_submodule("last").bias)


@pytest.mark.parametrize(("tokens", "of"), [(True, (0, 1)), (False, (0, 1, 2))])
def test_a_linear_layer_over_pixels_is_corrected_by_channel(shard, tokens, of):
    before, after = errors(calibrate(Plain(tokens), shard), "each", shard, of)
    assert after < 0.01 * before


class Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        for layer in (self.first, self.last):
            layer.weight.data[0] *= 30

    def forward(self, x):
        return self.last(self.first(x).relu().mean([2, 3])) if x.mean() < 100 else x.mean([2, 3])


def test_layers_of_what_cannot_be_traced_are_corrected_one_by_one(shard):
    calibrated = calibrate(Branching(), shard)
    path = next(path for path in preparation.int8_layers(calibrated) if "last" in path)
    before, after = errors(calibrated, path, shard, of=0)
    assert after < 0.01 * before


def test_the_first_images_are_used_as_many_as_fit(calibrated, shard, tmp_path, monkeypatch):
    second = save_shard(tmp_path / "second", 1, high=100)

    def biases(paths, num_images):
        monkeypatch.setattr(calibration, "_MAX_PIXELS", num_images * 16 * 16)
        return bias_correction.correct_bias(calibrated, SCHEME, paths).get_submodule("classifier.1").bias

    assert torch.equal(biases([shard, second], 24), biases([shard], 1000))
    assert not torch.equal(biases([shard, second], 48), biases([shard], 48))
    assert torch.equal(biases([shard, second], 48), biases([shard, second], 1000))
    assert not torch.equal(biases([shard, second], 30), biases([shard, second], 48))
