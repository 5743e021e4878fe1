"""Calibration: what observers see, and what is kept of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from schemes import header_of, scheme
from torch import nn

from quantlib.data import shards
from quantlib.eager.modules import ObserverBase
from quantlib.graph import fusion
from quantlib.models import checkpoint
from quantlib.quantize import calibration
from quantlib.recipe.scheme import QConfigName

Calibrated = Callable[[str], nn.Module]
QCONFIGS = get_args(QConfigName)


@pytest.fixture
def fused_content(tiny_model: nn.Module, tiny_header: dict[str, Any]) -> bytes:
    return checkpoint.save(fusion.fuse_model(tiny_model, "eval"), tiny_header | {"fused": "eval"})


def _shard(path: Path, pixels: np.ndarray) -> Path:
    with path.open("wb") as file:
        shards.save(pixels, np.zeros(len(pixels), dtype=np.int64), file)
    return path


def test_calibration_finds_the_least_and_the_greatest_value(fused_content: bytes, tmp_path: Path) -> None:
    pixels = np.full((5, 32, 32, 3), 100, dtype=np.uint8)
    pixels[1, 0, 0, 2], pixels[4, 31, 31, 1] = 0, 255
    prepared, _ = calibration.load_or_prepare(fused_content, scheme("default"))

    calibration.calibrate(prepared, _shard(tmp_path / "shard", pixels), batch_size=2)

    observer = prepared.quant.activation_post_process
    # Black in the third channel, white in the second, as ImageNet's means and deviations make them.
    assert float(observer.min_val) == pytest.approx((0 - 0.406) / 0.225)
    assert float(observer.max_val) == pytest.approx((1 - 0.456) / 0.224)


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_every_observer_has_seen_something(calibrated: Calibrated, qconfig: str) -> None:
    observers = [module for module in calibrated(qconfig).modules() if isinstance(module, ObserverBase)]

    assert len(observers) > 10
    assert all(torch.isfinite(observer.min_val).all() for observer in observers)


@pytest.mark.parametrize("qconfig", QCONFIGS)
def test_shard_after_shard_through_the_store_is_one_calibration(
    fused_content: bytes, train_shard: Path, tmp_path: Path, qconfig: str
) -> None:
    whole, _ = calibration.load_or_prepare(fused_content, scheme(qconfig))
    calibration.calibrate(whole, train_shard, batch_size=12)

    content = fused_content
    pixels = shards.open_shard(train_shard)[0].numpy()
    for number, part in enumerate((pixels[:24], pixels[24:])):
        prepared, header = calibration.load_or_prepare(content, scheme(qconfig))
        calibration.calibrate(prepared, _shard(tmp_path / f"{number}", part), batch_size=12)
        content = checkpoint.save(prepared, header)

    parts, header = calibration.load_prepared(content)
    assert header["scheme"] == header_of(qconfig)["scheme"]
    expected = whole.state_dict()
    assert parts.state_dict().keys() == expected.keys()
    for name, value in parts.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_calibration_changes_no_weight(fused_content: bytes, train_shard: Path) -> None:
    fused, _ = fusion.load(fused_content)
    prepared, _ = calibration.load_or_prepare(fused_content, scheme("fbgemm"))

    calibration.calibrate(prepared, train_shard, batch_size=12)

    parameters = dict(prepared.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in fused.named_parameters())


def test_an_observer_lets_its_input_through(
    calibrated: Calibrated, fused_model: nn.Module, val_inputs: torch.Tensor
) -> None:
    with torch.inference_mode():
        assert torch.equal(calibrated("default")(val_inputs), fused_model(val_inputs))


def test_progress_counts_the_images(fused_content: bytes, val_shard: Path) -> None:
    calls: list[tuple[int, int]] = []
    prepared, _ = calibration.load_or_prepare(fused_content, scheme("default"))

    calibration.calibrate(prepared, val_shard, 8, lambda done, total: calls.append((done, total)))

    assert calls == [(8, 18), (16, 18), (18, 18)]
