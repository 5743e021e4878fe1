"""Statistics collected once, for every observer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.eager.modules import ObserverBase
from quantlib.graph import fusion
from quantlib.models import checkpoint, mobilenet_v2
from quantlib.models.checkpoint import Header
from quantlib.quantize import calibration, observers, preparation, stored
from quantlib.quantize.observers import ActivationStatistics
from quantlib.recipe.scheme import ObserverName, Scheme

OBSERVERS: tuple[ObserverName, ...] = ("minmax", "moving_average", "histogram", "percentile", "mse")


def _batches() -> list[torch.Tensor]:
    """Batches whose ranges grow and shrink."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 8, 8, generator=generator) * scale for scale in (1.0, 2.0, 0.5, 1.5)]


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_observer_ends_up_as_if_it_had_seen_the_same(name: ObserverName, layout: Any) -> None:
    statistics, handed, own = ActivationStatistics(), *(preparation.OBSERVERS[name]() for _ in range(2))
    for x in _batches():
        statistics(x.contiguous(memory_format=layout))
        own(x)
    statistics.hand_over(handed)
    for got, expected in zip(handed.calculate_qparams(), own.calculate_qparams(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_a_large_activation_is_counted_in_part_and_its_histogram_has_the_same_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    x[:, 3] += 4  # An unusual channel must be counted as often as the others.
    whole, part = ActivationStatistics(), ActivationStatistics()
    whole(x)
    monkeypatch.setattr(observers, "_MAX_COUNTED", 2**15)
    part(x)
    assert (part.min_val, part.max_val) == (whole.min_val, whole.max_val)
    assert float(part.histogram.sum()) == pytest.approx(x.numel(), rel=1e-4)
    assert (part.histogram > 0).sum() < (whole.histogram > 0).sum()
    coarse = [observer.histogram.view(32, -1).sum(1) / x.numel() for observer in (part, whole)]
    assert (coarse[0] - coarse[1]).abs().max() < 0.005


def test_infinite_values_are_left_out() -> None:
    statistics = ActivationStatistics()
    statistics(torch.tensor([[0.0, 1.0, float("inf")]]))
    statistics(torch.tensor([[float("-inf")]]))
    assert (float(statistics.min_val), float(statistics.max_val)) == (0.0, 1.0)
    assert float(statistics.histogram.sum()) == 2


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("float_layers", [(), ("features.0",)])
def test_one_pass_feeds_every_scheme(fused_model: nn.Module, train_shard: Path, float_layers: tuple[str, ...]) -> None:
    observed = preparation.observe(fused_model, float_layers)
    calibration.calibrate(observed, train_shard, batch_size=12)
    for name in OBSERVERS:
        wanted = Scheme(observer=name, weights="per_channel", activation_bits=8, float_layers=float_layers)
        prepared, alone = (preparation.prepare(fused_model, wanted, "eval") for _ in range(2))
        calibration.choose_ranges(observed, prepared)
        calibration.calibrate(alone, train_shard, batch_size=12)
        for path, module in alone.named_modules():
            if isinstance(module, ObserverBase):
                expected, got = module.calculate_qparams(), prepared.get_submodule(path).calculate_qparams()
                torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=0)
        assert torch.equal(alone.classifier[1].weight, prepared.classifier[1].weight)


def test_chosen_ranges_and_the_weights_are_the_observed_models_own(
    tiny_model: nn.Module, tiny_arguments: dict[str, Any], train_shard: Path, val_inputs: torch.Tensor
) -> None:
    fused = fusion.fuse_model(tiny_model, "eval")
    observed = preparation.observe(fused, ())
    calibration.calibrate(observed, train_shard, batch_size=12)
    other = fusion.fuse_model(mobilenet_v2.mobilenet_v2(**tiny_arguments).eval(), "eval")
    prepared = preparation.prepare(other, scheme("default"), "eval")

    calibration.choose_ranges(observed, prepared)

    with torch.inference_mode():
        torch.testing.assert_close(prepared(val_inputs), fused(val_inputs))


def test_statistics_continue_after_being_stored(fused_model: nn.Module, tiny_header: Header, train_shard: Path) -> None:
    observed = preparation.observe(fused_model, ())
    calibration.calibrate(observed, train_shard, batch_size=12)
    again, _ = stored.open_model(checkpoint.save(observed, replace(tiny_header, fused="eval", observed=())))
    for model in (observed, again):
        calibration.calibrate(model, train_shard, batch_size=12)
    torch.testing.assert_close(again.state_dict(), observed.state_dict(), rtol=0, atol=0)
