"""Calibration: what observers see, and the grids that are chosen from it."""

import copy
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.graph.fusion import fuse_model
from quantlib.graph.model import trace_model
from quantlib.models import checkpoint, mobilenet_v2
from quantlib.quantize import calibration, stored
from quantlib.quantize.grids import Grid
from quantlib.quantize.preparation import int8_layers, observe, quantizers
from quantlib.quantize.ranges import find_grid
from quantlib.quantize.statistics import ActivationStatistics
from quantlib.recipe.scheme import ObserverName, Scheme

OBSERVERS = get_args(ObserverName)


def scheme(**options):
    return Scheme(**{"observer": "minmax", "weights": "per_channel", "activation_bits": 8, **options})


def _shard(path, pixels):
    with path.open("wb") as file:
        shards.save(pixels, np.zeros(len(pixels), dtype=np.int64), IMAGENET, file)
    return path


@pytest.fixture(scope="module")
def _built_once(tiny_arguments, stir_batch_norm, train_shard):
    """A net, fused, and one like it that has seen the training images, with every layer to become int8."""
    torch.manual_seed(0)
    net = stir_batch_norm(mobilenet_v2.mobilenet_v2(**tiny_arguments)).eval()
    model = fuse_model(trace_model(net, (3, 32, 32)), "eval")
    seeing = observe(model, ())
    calibration.calibrate(seeing, train_shard, batch_size=12)
    return model, seeing


@pytest.fixture
def fused(_built_once):
    return copy.deepcopy(_built_once[0])


@pytest.fixture
def observed(_built_once):
    return copy.deepcopy(_built_once[1])


# calibrate


def test_calibration_finds_the_least_and_the_greatest_value(fused, tmp_path):
    pixels = np.full((5, 32, 32, 3), 100, dtype=np.uint8)
    pixels[1, 0, 0, 2], pixels[4, 31, 31, 1] = 0, 255
    model = observe(fused, ())

    calibration.calibrate(model, _shard(tmp_path / "shard", pixels), batch_size=2)

    seen = quantizers(model)["quantizers.x"]
    # Black in the third channel, white in the second, as ImageNet's means and deviations make them.
    assert float(seen.min_val) == pytest.approx((0 - 0.406) / 0.225)
    assert float(seen.max_val) == pytest.approx((1 - 0.456) / 0.224)
    assert float(seen.histogram.sum()) == pixels.size


def test_every_observer_has_seen_something(observed):
    seen = quantizers(observed)

    assert len(seen) > 10
    assert {type(each) for each in seen.values()} == {ActivationStatistics}
    for name, each in seen.items():
        assert all(torch.isfinite(value).all() for value in each.state_dict().values()), name
        assert float(each.min_val) < float(each.max_val), name
        assert float(each.histogram.sum()) > 0, name


@pytest.mark.parametrize("float_layers", [(), ("features.0",)])
def test_shard_after_shard_through_the_store_is_one_calibration(
    fused, tiny_header, train_shard, tmp_path, float_layers
):
    whole = observe(fused, float_layers)
    header = replace(tiny_header, fused="eval", observed=float_layers)
    content = checkpoint.save(whole, header)
    calibration.calibrate(whole, train_shard, batch_size=12)

    pixels = shards.open_shard(train_shard).pixels.numpy()
    for number, part in enumerate((pixels[:24], pixels[24:])):
        parts, _ = stored.open_model(content)
        calibration.calibrate(parts, _shard(tmp_path / f"{number}", part), batch_size=12)
        content = checkpoint.save(parts, header)

    expected, got = whole.state_dict(), stored.open_model(content)[0].state_dict()
    assert got.keys() == expected.keys()
    assert [name for name, value in got.items() if not torch.equal(value, expected[name])] == []


def test_calibration_changes_no_weight(fused, observed):
    parameters = dict(observed.named_parameters())

    assert len(parameters) > 10
    assert all(torch.equal(value, parameters[name]) for name, value in fused.named_parameters())


def test_an_observer_lets_its_input_through(observed, fused, val_inputs):
    with torch.inference_mode():
        assert torch.equal(observed(val_inputs), fused(val_inputs))


def test_progress_counts_the_images(fused, val_shard):
    calls = []

    calibration.calibrate(observe(fused, ()), val_shard, 8, lambda done, total: calls.append((done, total)))

    assert calls == [(8, 18), (16, 18), (18, 18)]


# choose_ranges


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_one_pass_feeds_every_scheme(observed, observer, bits):
    own, seen = scheme(observer=observer, activation_bits=bits), quantizers(observed)
    calibrated = copy.deepcopy(observed)

    calibration.choose_ranges(calibrated, own)

    found = quantizers(calibrated)
    assert list(found) == list(seen)
    for name, grid in found.items():
        expected = find_grid(seen[name], observer, bits)
        assert type(grid) is Grid
        assert torch.equal(grid.scale, expected.scale), name
        assert torch.equal(grid.zero_point, expected.zero_point), name
        assert (grid.quant_min, grid.quant_max) == (0, 2**bits - 1)
        assert float(grid.scale) > 1e-5, name


def test_observers_differ_in_what_they_choose(observed):
    scales = set()
    for observer in OBSERVERS:
        calibrated = copy.deepcopy(observed)
        calibration.choose_ranges(calibrated, scheme(observer=observer))
        scales.add(tuple(float(grid.scale) for grid in quantizers(calibrated).values()))

    assert len(scales) == len(OBSERVERS)


def test_choosing_ranges_replaces_the_observers_in_place_and_nothing_else(observed, fused):
    code = observed.code
    layers = int8_layers(observed)

    calibration.choose_ranges(observed, scheme())

    assert observed.code == code
    assert int8_layers(observed) == layers
    assert not any(isinstance(module, ActivationStatistics) for module in observed.modules())
    parameters = dict(observed.named_parameters())
    assert parameters.keys() == dict(fused.named_parameters()).keys()
    assert all(torch.equal(value, parameters[name]) for name, value in fused.named_parameters())


@pytest.mark.parametrize(("bits", "least"), [(7, 15), (8, 21)])
def test_a_calibrated_model_rounds_and_stays_close_to_float(observed, fused, val_inputs, bits, least):
    calibration.choose_ranges(observed, scheme(activation_bits=bits))

    with torch.inference_mode():
        expected, got = fused(val_inputs), observed(val_inputs)
    decibels = float(20 * torch.log10(expected.norm() / (expected - got).norm()))
    assert least < decibels < 60


def test_a_calibrated_model_opens_again_as_it_was_stored(fused, tiny_header, train_shard, val_inputs):
    own = scheme(observer="mse", activation_bits=7, float_layers=("features.0",))
    model = observe(fused, own.float_layers)
    calibration.calibrate(model, train_shard, batch_size=12)
    calibration.choose_ranges(model, own)

    again, _ = stored.open_model(checkpoint.save(model, replace(tiny_header, fused="eval", scheme=own)))

    with torch.inference_mode():
        assert torch.equal(again(val_inputs), model(val_inputs))
    assert {grid.quant_max for grid in quantizers(again).values()} == {127}
