"""Calibration: what observers see, and what they keep of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.data import shards
from quantlib.data.normalization import IMAGENET
from quantlib.eager.modules import ObserverBase
from quantlib.graph import fusion
from quantlib.models import checkpoint, mobilenet_v2
from quantlib.quantize import calibration, preparation, stored
from quantlib.recipe.scheme import ObserverName, QConfigName, Scheme

Calibrated = Callable[[str], nn.Module]
QCONFIGS = get_args(QConfigName)


@pytest.fixture
def fused(tiny_model):
    return fusion.fuse_model(tiny_model, "eval")


def _shard(path, pixels):
    with path.open("wb") as file:
        shards.save(pixels, np.zeros(len(pixels), dtype=np.int64), IMAGENET, file)
    return path


def test_calibration_finds_the_least_and_the_greatest_value(fused, tmp_path):
    pixels = np.full((5, 32, 32, 3), 100, dtype=np.uint8)
    pixels[1, 0, 0, 2], pixels[4, 31, 31, 1] = 0, 255
    prepared = preparation.prepare(fused, scheme("default"), "eval")

    calibration.calibrate(prepared, _shard(tmp_path / "shard", pixels), batch_size=2)

    observer = prepared.quant.activation_post_process
    # Black in the third channel, white in the second, as ImageNet's means and deviations make them.
    assert float(observer.min_val) == pytest.approx((0 - 0.406) / 0.225)
    assert float(observer.max_val) == pytest.approx((1 - 0.456) / 0.224)


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_every_observer_has_seen_something(calibrated, qconfig):
    observers = [module for module in calibrated(qconfig).modules() if isinstance(module, ObserverBase)]

    assert len(observers) > 10
    assert all(torch.isfinite(observer.min_val).all() for observer in observers)


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_shard_after_shard_through_the_store_is_one_calibration(fused, tiny_header, train_shard, tmp_path, qconfig):
    whole = preparation.prepare(fused, scheme(qconfig), "eval")
    header = replace(tiny_header, fused="eval", scheme=scheme(qconfig))
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


def test_calibration_changes_no_weight(fused, train_shard):
    prepared = preparation.prepare(fused, scheme("fbgemm"), "eval")

    calibration.calibrate(prepared, train_shard, batch_size=12)

    parameters = dict(prepared.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in fused.named_parameters())


def test_an_observer_lets_its_input_through(calibrated, fused_model, val_inputs):
    with torch.inference_mode():
        assert torch.equal(calibrated("default")(val_inputs), fused_model(val_inputs))


def test_progress_counts_the_images(fused, val_shard):
    calls: list[tuple[int, int]] = []
    prepared = preparation.prepare(fused, scheme("default"), "eval")

    calibration.calibrate(prepared, val_shard, 8, lambda done, total: calls.append((done, total)))

    assert calls == [(8, 18), (16, 18), (18, 18)]


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("float_layers", [(), ("features.0",)])
def test_one_pass_feeds_every_scheme(fused_model, train_shard, float_layers):
    observed = preparation.observe(fused_model, float_layers)
    calibration.calibrate(observed, train_shard, batch_size=12)
    for name in get_args(ObserverName):
        wanted = Scheme(observer=name, weights="per_channel", activation_bits=8, float_layers=float_layers)
        prepared, alone = (preparation.prepare(fused_model, wanted, "eval") for _ in range(2))
        calibration.choose_ranges(observed, prepared)
        calibration.calibrate(alone, train_shard, batch_size=12)
        for path, module in alone.named_modules():
            if isinstance(module, ObserverBase):
                expected, got = module.calculate_qparams(), prepared.get_submodule(path).calculate_qparams()
                torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=0)
        assert torch.equal(alone.classifier[1].weight, prepared.classifier[1].weight)


def test_chosen_ranges_and_the_weights_are_the_observed_models_own(tiny_model, tiny_arguments, train_shard, val_inputs):
    fused = fusion.fuse_model(tiny_model, "eval")
    observed = preparation.observe(fused, ())
    calibration.calibrate(observed, train_shard, batch_size=12)
    other = fusion.fuse_model(mobilenet_v2.mobilenet_v2(**tiny_arguments).eval(), "eval")
    prepared = preparation.prepare(other, scheme("default"), "eval")

    calibration.choose_ranges(observed, prepared)

    with torch.inference_mode():
        torch.testing.assert_close(prepared(val_inputs), fused(val_inputs))


def test_statistics_go_on_after_they_were_stored(fused_model, tiny_header, train_shard):
    observed = preparation.observe(fused_model, ())
    calibration.calibrate(observed, train_shard, batch_size=12)
    again, _ = stored.open_model(checkpoint.save(observed, replace(tiny_header, fused="eval", observed=())))
    for model in (observed, again):
        calibration.calibrate(model, train_shard, batch_size=12)
    torch.testing.assert_close(again.state_dict(), observed.state_dict(), rtol=0, atol=0)
