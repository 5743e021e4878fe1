"""Ranges: the grid that each observer chooses from the same statistics."""

from typing import get_args

import pytest
import torch

from quantlib.quantize.ranges import find_grid
from quantlib.quantize.statistics import NUM_BINS, ActivationStatistics
from quantlib.recipe.scheme import ObserverName

OBSERVERS = get_args(ObserverName)
# Even, or denser around 0; sums and products only, so that every CPU counts the same.
EVEN = torch.linspace(-1, 1, 20_001)
DENSE = EVEN.repeat(6)


def _seen(*batches):
    seen = ActivationStatistics()
    for x in batches:
        seen(x)
    return seen


def _ends(observer, *batches, bits=8):
    return find_grid(_seen(*batches), observer, bits).range[:2]


def _error(x, low, high, bits):
    """Mean squared error of values on the grid from one end to the other."""
    largest = 2**bits - 1
    scale = (high - low) / largest
    rounded = torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, largest)
    return float((rounded - x).square().mean())


def _batches():
    """Ranges that grow and shrink."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 6, 8, 8, generator=generator) * scale for scale in (1.0, 2.0, 0.5, 1.5)]


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_keeps_to_the_activation_bits(observer, bits):
    grid = find_grid(_seen(*_batches()), observer, bits)

    assert (grid.quant_min, grid.quant_max) == (0, 2**bits - 1)
    assert 0 < int(grid.zero_point) < grid.quant_max
    assert len(grid(torch.linspace(-20, 20, 4001)).unique()) == 2**bits


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_has_seen_nothing_gets_a_grid_around_zero(observer):
    for seen in (_seen(), _seen(torch.tensor([float("nan"), float("inf")]))):
        grid = find_grid(seen, observer, 8)
        assert float(grid.scale) > 0
        assert float(grid(torch.tensor(1.0))) < 1e-4


@pytest.mark.parametrize("value", [-3.0, 2.0])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_value_that_never_changes_is_on_the_grid(observer, value):
    grid = find_grid(_seen(torch.full((5, 4), value), torch.full((5, 4), value)), observer, 8)

    assert float(grid(torch.tensor(value))) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_what_is_always_zero_stays_zero(observer):
    grid = find_grid(_seen(torch.zeros(3, 4)), observer, 8)

    assert float(grid.scale) > 0
    assert not grid(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_layout_of_an_activation_does_not_change_its_grid(observer):
    contiguous, channels_last = (
        find_grid(_seen(*(x.contiguous(memory_format=layout) for x in _batches())), observer, 8)
        for layout in (torch.contiguous_format, torch.channels_last)
    )

    assert torch.equal(contiguous.scale, channels_last.scale)
    assert torch.equal(contiguous.zero_point, channels_last.zero_point)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_choosing_a_range_leaves_the_statistics_as_they_are(observer):
    seen = _seen(*_batches())
    before = {name: value.clone() for name, value in seen.state_dict().items()}

    find_grid(seen, observer, 8).scale.zero_()

    assert all(torch.equal(value, before[name]) for name, value in seen.state_dict().items())


def test_minmax_takes_all_that_was_seen():
    assert _ends("minmax", EVEN, 5 * EVEN - 1, EVEN) == pytest.approx((-6, 4), abs=10 / 255)


def test_a_moving_average_hardly_moves_for_one_batch():
    # After the first batch, each one moves the range by a hundredth of the way.
    low, high = -1 + 0.01 * (-6 + 1), 1 + 0.01 * (4 - 1)

    assert _ends("moving_average", EVEN, 5 * EVEN - 1) == pytest.approx((low, high), abs=2 / 255)


def test_percentile_cuts_off_one_value_in_ten_thousand():
    low, high = _ends("percentile", torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([50.0])]))

    assert low == 0
    assert 0.9 < high < 1.2


def test_percentile_cuts_off_as_many_values_at_both_ends():
    x = torch.cat([DENSE, torch.linspace(-10, -1, 50), torch.linspace(1, 20, 50)])

    low, high = _ends("percentile", x)

    assert int((x < low).sum()) == pytest.approx(len(x) * 0.00005, abs=1)
    assert int((x > high).sum()) == pytest.approx(len(x) * 0.00005, abs=1)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("skewed", [False, True])
def test_mse_range_is_the_best_of_a_brute_force_search(bits, skewed):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) ** 3
    x = torch.where(x > 0, 3 * x, x) if skewed else x

    low, high = _ends("mse", x, bits=bits)

    lows, highs = (torch.linspace(0.1, 1.0, 24).double() * float(end) for end in x.aminmax())
    best = min(_error(x, float(least), float(most), bits) for least in lows for most in highs)
    assert _error(x, low, high, bits) < 1.03 * best
    assert _error(x, low, high, bits) < 0.97 * _error(x, float(x.min()), float(x.max()), bits)


@pytest.mark.parametrize("sign", [1, -1])
def test_mse_cuts_off_no_part_of_an_even_distribution(sign):
    ends = _ends("mse", sign * torch.linspace(0, 2, 10_000))

    assert sorted(abs(end) for end in ends) == pytest.approx([0, 2], abs=0.03)


@pytest.mark.parametrize(
    ("batches", "ends"),
    [
        pytest.param([3 * EVEN], (-3, 2.99707), id="even"),
        pytest.param([20 * EVEN**5], (-20, 19.84375), id="dense around 0"),
        pytest.param([torch.cat([DENSE, torch.tensor([100.0])])], (-1, 0.97266), id="one far out"),
        pytest.param([torch.cat([DENSE, torch.tensor([-30.0, -12, -3, 2, 9, 40])])], (-30, 8.99902), id="some far out"),
        pytest.param(
            [torch.cat([DENSE, torch.linspace(-30, -1, 9), torch.linspace(1, 40, 13)])],
            (-22.75391, 40),
            id="thin tails",
        ),
        pytest.param(
            [EVEN**3, 5 * EVEN**3, torch.cat([2 * EVEN**3 - 1, torch.tensor([-7.0, 20])])],
            (-7, 19.98682),
            id="growing",
        ),
    ],
)
def test_histogram_takes_the_range_that_torchs_observer_takes(batches, ends):
    """The numbers are those of torch.ao.quantization.HistogramObserver, of torch 2.15."""
    low, high = _ends("histogram", *batches)
    step = (high - low) / 255
    assert (low, high) == pytest.approx(ends, abs=step / 2 + 1e-4)


def test_histogram_narrows_the_range_only_while_the_error_falls():
    x = torch.cat([DENSE, torch.tensor([-30.0, -12, -3, 2, 9, 40])])

    narrowed, whole = (_error(x.clamp(*ends), *ends, 8) for ends in (_ends("histogram", x), _ends("minmax", x)))

    assert narrowed < whole


def test_more_is_cut_off_for_fewer_bits():
    x = 20 * DENSE**5

    (low_7, high_7), (low_8, high_8) = (_ends("mse", x, bits=bits) for bits in (7, 8))

    assert low_8 <= low_7 < 0 < high_7 <= high_8
    assert high_7 - low_7 < high_8 - low_8


@pytest.mark.parametrize("observer", OBSERVERS)
def test_no_observer_reaches_beyond_what_was_seen(observer):
    seen = _seen(*_batches())

    low, high, step = find_grid(seen, observer, 8).range

    bin_width = float(seen.max_val - seen.min_val) / NUM_BINS
    assert low > float(seen.min_val) - step - bin_width
    assert high < float(seen.max_val) + step + bin_width
