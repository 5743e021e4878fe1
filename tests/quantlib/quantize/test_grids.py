"""Grids: where they lie, and what they round to."""

import copy

import pytest
import torch

from quantlib.quantize.grids import Grid, activation_grid, largest_of, symmetric_grid, weight_grid

# Beyond both ends of every activation grid below.
X = torch.linspace(-5, 9, 4001)


def _between(low, high, bits=8):
    return activation_grid(torch.tensor(low), torch.tensor(high), bits)


def _weight(*shape):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return torch.randn(*shape, generator=generator) * sizes


@pytest.mark.parametrize("bits", [7, 8])
def test_an_activation_grid_reaches_from_end_to_end(bits):
    grid = _between(-2.0, 4.0, bits)
    low, high, step = grid.range

    assert step == pytest.approx(6 / (2**bits - 1))
    assert (low, high) == (pytest.approx(-2, abs=step / 2), pytest.approx(4, abs=step / 2))
    assert (grid.quant_min, grid.quant_max) == (0, 2**bits - 1)
    rounded = grid(X)
    assert (float(rounded.min()), float(rounded.max())) == (pytest.approx(low), pytest.approx(high))
    assert len(rounded.unique()) == 2**bits


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize(("low", "high"), [(-2.0, 4.0), (0.0, 6.0), (-1.7, 0.9), (-3.0, 0.0), (-0.001, 4.0)])
def test_a_value_inside_an_activation_grid_moves_by_half_a_step_at_most(low, high, bits):
    grid = _between(low, high, bits)
    inside = X[(low <= X) & (high >= X)]

    error = (grid(inside) - inside).abs().max()

    assert 0.4 * float(grid.scale) < error < 0.51 * float(grid.scale)


@pytest.mark.parametrize(("low", "high"), [(-2.0, 4.0), (1.0, 4.0), (-4.0, -1.0), (-1.7, 0.9), (0.0, 0.0)])
def test_zero_is_on_every_activation_grid(low, high):
    grid = _between(low, high)

    assert float(grid(torch.zeros(()))) == 0
    assert grid.range[0] <= 0 <= grid.range[1]
    assert 0 <= int(grid.zero_point) <= 255


@pytest.mark.parametrize(("low", "high", "ends"), [(1.0, 4.0, (0, 4)), (-4.0, -1.0, (-4, 0))])
def test_an_activation_grid_away_from_zero_is_extended_to_it(low, high, ends):
    assert _between(low, high).range[:2] == pytest.approx(ends)


def test_a_grid_around_a_single_point_has_a_step_and_stays_finite():
    grid = _between(0.0, 0.0)

    assert float(grid.scale) > 0
    assert grid(torch.tensor([-1.0, 0.0, 1.0])).abs().max() < 1e-4


@pytest.mark.parametrize("grid", [_between(-2.0, 4.0, 7), _between(-2.0, 4.0, 8), symmetric_grid(torch.tensor(3.0))])
def test_one_grid_rounds_as_torchs_fake_quantization_does(grid):
    expected = torch.fake_quantize_per_tensor_affine(
        X, float(grid.scale), int(grid.zero_point), grid.quant_min, grid.quant_max
    )

    torch.testing.assert_close(grid(X), expected, rtol=0, atol=1e-6)


def test_infinite_values_are_rounded_to_the_ends():
    grid = _between(-2.0, 4.0)

    assert grid(torch.tensor([float("-inf"), float("inf")])).tolist() == pytest.approx(grid.range[:2])


@pytest.mark.parametrize("grid", [_between(-2.0, 4.0, 7), symmetric_grid(torch.tensor([0.1, 1.0, 7.0]))])
def test_rounding_a_second_time_changes_nothing(grid):
    x = X[:3999].view(3, -1)

    assert torch.equal(grid(grid(x)), grid(x))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
def test_each_channel_of_a_weight_has_a_grid_of_its_own(shape):
    weight = _weight(*shape)

    grid = weight_grid(weight, per_channel=True)

    rounded = grid(weight)
    assert grid.scale.shape == grid.zero_point.shape == (6,)
    for channel in range(6):
        alone = weight_grid(weight[channel : channel + 1], per_channel=False)
        assert float(grid.scale[channel]) == float(alone.scale)
        torch.testing.assert_close(rounded[channel], alone(weight[channel]), rtol=0, atol=float(alone.scale) / 1000)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
def test_a_weight_can_have_one_grid_for_all_channels(shape):
    weight = _weight(*shape)

    grid = weight_grid(weight, per_channel=False)

    assert grid.scale.shape == grid.zero_point.shape == ()
    assert float(grid.scale) == pytest.approx(float(weight.abs().max()) / 127.5)
    assert (grid(weight) - weight).abs().max() <= 0.51 * grid.scale
    assert (grid(weight)[0] == 0).all()  # The smallest channel is far below the step of the largest.


@pytest.mark.parametrize("per_channel", [False, True])
def test_no_weight_moves_by_more_than_half_a_step(per_channel):
    weight = _weight(6, 4, 3, 3)
    grid = weight_grid(weight, per_channel=per_channel)

    errors = (grid(weight) - weight).abs().flatten(1).amax(1)

    assert (errors <= 0.51 * grid.scale).all()
    # A grid of 127 steps to the largest value would be coarser, and reach its largest value exactly.
    largest = weight.abs().flatten(1).amax(1)
    assert torch.allclose(grid.scale * 127.5, largest if per_channel else largest.max())


def test_weight_grids_are_symmetric_and_keep_zero():
    grid = weight_grid(_weight(6, 10), per_channel=True)

    assert (grid.quant_min, grid.quant_max) == (-128, 127)
    assert not grid.zero_point.any()
    assert not grid(torch.zeros(6, 10)).any()


def test_a_channel_of_zeros_stays_zero():
    weight = _weight(4, 9)
    weight[2] = 0

    rounded = weight_grid(weight, per_channel=True)(weight)

    assert torch.isfinite(rounded).all()
    assert not rounded[2].any()
    assert rounded[[0, 1, 3]].abs().amax(1).min() > 0


def test_the_largest_of_a_weight_counts_negative_values():
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.5]], requires_grad=True)

    assert largest_of(weight, per_channel=True).tolist() == [3, 2]
    assert float(largest_of(weight, per_channel=False)) == 3
    assert not largest_of(weight, per_channel=False).requires_grad


@pytest.mark.parametrize("bits", [7, 8])
def test_steps_of_an_activation_are_unsigned_bytes_that_stand_for_what_it_rounds_to(bits):
    grid = _between(-2.0, 4.0, bits)

    steps = grid.steps(X)

    assert steps.dtype == torch.uint8
    assert (int(steps.min()), int(steps.max())) == (0, 2**bits - 1)
    torch.testing.assert_close((steps.float() - grid.zero_point) * grid.scale, grid(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(400, 2, 3, 3), (400, 9)])
def test_steps_of_a_weight_are_signed_bytes_that_stand_for_what_it_rounds_to(shape, per_channel):
    """The largest value, too, though it lies in the middle between two steps."""
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    grid = weight_grid(weight, per_channel=per_channel)

    steps = grid.steps(weight)

    assert steps.dtype == torch.int8
    assert steps.shape == weight.shape
    scale = grid.scale.view(-1, *[1] * (weight.dim() - 1)) if per_channel else grid.scale
    expected = (grid(weight) / scale).round()
    different = steps != expected
    assert steps[different].tolist() == expected[different].tolist()


def test_a_grid_is_restored_from_its_state():
    stored = _between(-2.0, 4.0)
    fresh = _between(0.0, 0.0)

    fresh.load_state_dict(copy.deepcopy(stored.state_dict()))

    assert set(stored.state_dict()) == {"scale", "zero_point"}
    assert torch.equal(fresh(X), stored(X))


def test_a_grid_keeps_its_step_in_float_and_its_zero_as_an_integer():
    grid = Grid(torch.tensor(0.1, dtype=torch.float64), torch.tensor(3.0), 0, 255)

    assert (grid.scale.dtype, grid.zero_point.dtype) == (torch.float32, torch.int32)
    assert grid(X.double().float()).dtype == torch.float32


def test_a_grid_is_not_trained():
    assert list(_between(-2.0, 4.0).parameters()) == []
