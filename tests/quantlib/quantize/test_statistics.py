"""Statistics: what calibration collects of each activation, batch after batch."""

import pytest
import torch

from quantlib.quantize import statistics
from quantlib.quantize.statistics import AVERAGING_CONSTANT, NUM_BINS, ActivationStatistics

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _batches():
    """Ranges that grow and shrink."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 8, 8, generator=generator) * scale for scale in (1.0, 2.0, 0.5, 1.5)]


def _seen(*batches):
    seen = ActivationStatistics()
    for x in batches:
        seen(x)
    return seen


def _below(seen, value):
    """How many of the values seen lie below one, as the histogram has it; to the bin."""
    edges = torch.linspace(float(seen.min_val), float(seen.max_val), NUM_BINS + 1)[1:]
    return float(seen.histogram[edges <= value].sum())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_pass_through_unchanged(layout):
    x = _batches()[0].contiguous(memory_format=layout)
    before = x.clone()

    assert ActivationStatistics()(x) is x
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_extremes_are_those_of_all_batches(layout):
    seen = _seen(*(x.contiguous(memory_format=layout) for x in _batches()))

    values = torch.cat(_batches())
    assert (float(seen.min_val), float(seen.max_val)) == (float(values.min()), float(values.max()))


def test_the_averages_start_from_the_first_batch_and_move_a_hundredth_of_the_way_to_each_next():
    low, high = (float(x) for x in _batches()[0].aminmax())
    for x in _batches()[1:]:
        low = 0.99 * low + 0.01 * float(x.min())
        high = 0.99 * high + 0.01 * float(x.max())

    seen = _seen(*_batches())

    assert AVERAGING_CONSTANT == 0.01
    assert (float(seen.average_min), float(seen.average_max)) == (pytest.approx(low), pytest.approx(high))


def test_the_histogram_of_one_batch_is_its_own():
    x = _batches()[0]

    assert torch.equal(_seen(x).histogram, torch.histc(x, NUM_BINS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_histogram_counts_every_value_whatever_the_order_of_the_ranges(layout):
    values = torch.cat(_batches()).flatten()
    for batches in (_batches(), _batches()[::-1]):
        seen = _seen(*(x.contiguous(memory_format=layout) for x in batches))
        assert float(seen.histogram.sum()) == pytest.approx(len(values))
        assert (seen.histogram >= 0).all()
        for value in torch.linspace(-4, 4, 33):
            # Values of a bin may end up in the next one when the range grows.
            assert _below(seen, value) == pytest.approx(int((values < value).sum()), abs=len(values) / 200)


def test_a_batch_within_the_range_adds_to_the_same_bins():
    wide, narrow = torch.linspace(-2, 2, 5000), torch.linspace(-1, 1, 5000)

    seen = _seen(wide, narrow)

    assert torch.equal(seen.histogram, torch.histc(wide, NUM_BINS) + torch.histc(narrow, NUM_BINS, min=-2, max=2))


@pytest.mark.parametrize("constant", [-2.0, 0.0, 0.3, 2.0])
def test_a_first_batch_of_one_value_is_counted_where_that_value_lies(constant):
    seen = _seen(torch.full((1000,), constant), torch.tensor([-2.0, 2.0]))

    assert float(seen.histogram.sum()) == 1002
    width = 4 / NUM_BINS
    assert _below(seen, constant - width) <= 1
    assert _below(seen, constant + width) >= 1000


def test_a_large_activation_is_counted_in_part_and_its_histogram_has_the_same_shape(monkeypatch):
    x = torch.randn(4, 16, 64, 64, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    x[:, 3] += 4  # A channel of its own kind must be counted as often as the others.
    monkeypatch.setattr(statistics, "_MAX_COUNTED", 2**15)

    seen = _seen(x)

    assert (float(seen.min_val), float(seen.max_val)) == (float(x.min()), float(x.max()))
    assert float(seen.histogram.sum()) == pytest.approx(x.numel(), rel=1e-4)
    whole = torch.histc(x, NUM_BINS)
    assert (seen.histogram > 0).sum() < (whole > 0).sum()
    coarse = [histogram.view(32, -1).sum(1) / x.numel() for histogram in (seen.histogram, whole)]
    assert (coarse[0] - coarse[1]).abs().max() < 0.004


def test_infinite_values_are_left_out():
    seen = _seen(torch.tensor([[0.0, 1.0, float("inf")]]), torch.tensor([[float("-inf")]]))

    assert (float(seen.min_val), float(seen.max_val)) == (0.0, 1.0)
    assert (float(seen.average_min), float(seen.average_max)) == (0.0, 1.0)
    assert float(seen.histogram.sum()) == 2


def test_values_that_are_no_numbers_are_left_out():
    seen = _seen(torch.tensor([[float("nan"), -1.0, 1.0]]), torch.tensor([[float("nan")]]))

    assert (float(seen.min_val), float(seen.max_val)) == (-1.0, 1.0)
    assert float(seen.histogram.sum()) == 2


def test_statistics_take_no_part_in_training():
    x = torch.randn(4, 3, requires_grad=True)

    seen = _seen(x)

    assert list(seen.parameters()) == []
    assert not any(value.requires_grad for value in seen.state_dict().values())
