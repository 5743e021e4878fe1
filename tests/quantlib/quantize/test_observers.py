"""Observers: the ranges that each finds, from images or from statistics that were collected for all of them."""

import pytest
import torch

from quantlib.quantize import observers, preparation
from quantlib.quantize.observers import ActivationStatistics
from quantlib.recipe.scheme import ObserverName

OBSERVERS: tuple[ObserverName, ...] = ("minmax", "moving_average", "histogram", "percentile", "mse")


def test_percentile_cuts_off_one_value_in_ten_thousand():
    observer = observers.PercentileObserver()
    observer(torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([50.0])]))
    scale, _ = observer.calculate_qparams()
    assert 0.9 < float(scale) * 255 < 1.2


def test_mse_range_is_the_best_of_a_brute_force_search():
    torch.manual_seed(0)
    x = torch.randn(50_000) ** 3
    observer = observers.MSEObserver(reduce_range=True)
    observer(x)

    def error(scale, zero_point):
        return float((torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 127) - x).square().mean())

    scale, zero_point = observer.calculate_qparams()
    ends = torch.linspace(1, float(x.abs().max()), 60)
    best = min(error(float(2 * end / 127), 64) for end in ends)
    assert error(float(scale), int(zero_point)) < 1.03 * best


def test_mse_cuts_off_no_part_of_an_even_distribution():
    observer = observers.MSEObserver()
    observer(torch.linspace(0, 2, 10_000))
    scale, zero_point = observer.calculate_qparams()
    assert abs(float(scale) * 255 - 2) < 0.03
    assert int(zero_point) == 0


def _batches():
    """Ranges that grow and shrink."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 8, 8, generator=generator) * scale for scale in (1.0, 2.0, 0.5, 1.5)]


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_observer_is_where_it_would_be_had_it_seen_the_same(name, layout):
    statistics, handed, own = ActivationStatistics(), *(preparation.OBSERVERS[name]() for _ in range(2))
    for x in _batches():
        statistics(x.contiguous(memory_format=layout))
        own(x)
    statistics.hand_over(handed)
    for got, expected in zip(handed.calculate_qparams(), own.calculate_qparams(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_a_large_activation_is_counted_in_part_and_its_histogram_has_the_same_shape(
    monkeypatch,
):
    x = torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    x[:, 3] += 4  # A channel of its own kind must be counted as often as the others.
    whole, part = ActivationStatistics(), ActivationStatistics()
    whole(x)
    monkeypatch.setattr(observers, "_MAX_COUNTED", 2**15)
    part(x)
    assert (part.min_val, part.max_val) == (whole.min_val, whole.max_val)
    assert float(part.histogram.sum()) == pytest.approx(x.numel(), rel=1e-4)
    assert (part.histogram > 0).sum() < (whole.histogram > 0).sum()
    coarse = [observer.histogram.view(32, -1).sum(1) / x.numel() for observer in (part, whole)]
    assert (coarse[0] - coarse[1]).abs().max() < 0.005


def test_infinite_values_are_left_out():
    statistics = ActivationStatistics()
    statistics(torch.tensor([[0.0, 1.0, float("inf")]]))
    statistics(torch.tensor([[float("-inf")]]))
    assert (float(statistics.min_val), float(statistics.max_val)) == (0.0, 1.0)
    assert float(statistics.histogram.sum()) == 2
