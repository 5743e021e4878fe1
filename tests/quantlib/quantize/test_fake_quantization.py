"""Fake quantization and fused Conv-BatchNorm for training, compared with what torch's own operations compute."""

import copy

import pytest
import torch
from torch import nn

from quantlib.graph.fusion import ConvBatchNorm2d, freeze_batch_norm
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize, freeze_observers
from quantlib.quantize.grids import activation_grid, weight_grid

LAYOUTS = [torch.contiguous_format, torch.channels_last]


class TorchsKernel(nn.Module):
    """Torch's operation for fake quantization of an activation on a grid that follows a moving average."""

    def __init__(self, bits):
        super().__init__()
        self.last_step = 2**bits - 1
        self.min_val, self.max_val = torch.tensor([float("inf")]), torch.tensor([float("-inf")])
        self.scale, self.zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def forward(self, x):
        on, averages, grid = torch.ones(1), (self.min_val, self.max_val), (self.scale, self.zero_point)
        return torch.fused_moving_avg_obs_fake_quant(x, on, on, *averages, *grid, 0.01, 0, self.last_step, 0)


def _run(module, x):
    """The module's output, and the gradient of its weighted sum."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad


def _rectifying(bits):
    module = ActivationFakeQuantize(bits)
    module.fuses_relu = True
    return module


def _quantizer(kind):
    return kind(8) if kind is ActivationFakeQuantize else kind(4, per_channel=True)


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_are_quantized_as_by_torch(bits, relu, layout):
    torch.manual_seed(0)
    ours, theirs = ActivationFakeQuantize(bits), TorchsKernel(bits)
    for step in range(3):  # From the second step on, values fall outside the moving range.
        x = (torch.randn(4, 6, 5, 5) * (step + 1)).contiguous(memory_format=layout)
        x = x.relu() if relu else x
        (y, gradient), (expected, expected_gradient) = _run(ours, x), _run(theirs, x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        assert torch.equal(gradient, expected_gradient)
        assert step == 0 or 0 < (gradient == 0).float().mean() < (0.9 if relu else 0.5)
    for name, value in ours.state_dict().items():
        assert float(value) == pytest.approx(float(getattr(theirs, name)), rel=1e-6), name


@pytest.mark.parametrize("bits", [7, 8])
def test_it_rectifies_like_a_relu_before_it(bits):
    torch.manual_seed(0)
    ours, theirs = _rectifying(bits), ActivationFakeQuantize(bits)
    for step in range(3):
        x = torch.randn(4, 6, 5, 5) * (step + 1)
        (y, gradient), (expected, expected_gradient) = _run(ours, x), _run(nn.Sequential(nn.ReLU(), theirs), x)
        assert torch.equal(y, expected)
        assert torch.equal(gradient, expected_gradient)
        assert 0.4 < (gradient == 0).float().mean() < 0.9
    assert str(ours.state_dict()) == str(theirs.state_dict())
    # As if a grid that starts below 0 had been loaded.
    for module in (ours, theirs):
        freeze_observers(module)
        module.zero_point.fill_(30)
    (y, gradient), (expected, expected_gradient) = _run(ours, x), _run(nn.Sequential(nn.ReLU(), theirs), x)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_takes_the_place_of_what_was_rectified_if_that_keeps_its_layout(layout):
    """In another layout, the earlier layers would sum it in another order."""
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    inside = (x > 0).detach()

    gradient = torch.autograd.grad(_rectifying(7)(x), x, torch.ones_like(x, memory_format=layout))[0]

    assert torch.equal(gradient, inside.float())
    assert gradient.is_contiguous(memory_format=layout)
    assert (gradient.data_ptr() == x.data_ptr()) == (layout == torch.channels_last)


def test_without_a_relu_the_gradient_takes_the_place_of_nothing():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    before = x.detach().clone()

    torch.autograd.grad(ActivationFakeQuantize(8)(x), x, torch.ones_like(x))

    assert torch.equal(x, before)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 10)])
def test_weights_are_quantized_as_by_torch(shape, per_channel):
    torch.manual_seed(0)
    module = WeightFakeQuantize(6, per_channel=per_channel)
    sizes = torch.logspace(-3, 1, 6).view(-1, *[1] * (len(shape) - 1))
    largest = None

    def theirs(w):
        if per_channel:
            return torch.fake_quantize_per_channel_affine(w, largest / 127.5, torch.zeros(6), 0, -128, 127)
        return torch.fake_quantize_per_tensor_affine(w, float(largest) / 127.5, 0, -128, 127)

    for step in range(3):
        w = torch.randn(shape) * sizes * (step + 1)
        w[5] = 0.0
        seen = w.abs().flatten(1).amax(1) if per_channel else w.abs().max()
        largest = seen if largest is None else 0.99 * largest + 0.01 * seen
        largest = largest.clamp_min(1e-4)  # Any grid gives zeros for zeros.
        (y, gradient), (expected, expected_gradient) = _run(module, w), _run(theirs, w)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=0)
        if step > 0:  # In the first step, the largest value lies right on the limit.
            assert torch.equal(gradient, expected_gradient)
            assert 0 < (gradient == 0).float().mean() < 0.9
    assert not y[5].any()


def test_a_weights_grid_follows_its_largest_value_whatever_its_sign():
    module = WeightFakeQuantize(1, per_channel=True)
    for w in ([[4.0, -1.0]], [[1.0, -8.0]]):
        module(torch.tensor(w))

    assert module.largest.tolist() == pytest.approx([4 + 0.01 * (8 - 4)])


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_first_weight_gives_the_grid_that_conversion_would_give_it(per_channel):
    weight = torch.randn(6, 4, 3, 3)
    module = WeightFakeQuantize(6, per_channel=per_channel)

    y = module(weight)

    expected = weight_grid(weight, per_channel=per_channel)
    assert torch.equal(module.grid().scale, expected.scale)
    torch.testing.assert_close(y, expected(weight), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [ActivationFakeQuantize, WeightFakeQuantize])
def test_a_frozen_observer_keeps_its_grid(kind):
    module = _quantizer(kind)
    module(torch.randn(4, 3, 2, 2))
    freeze_observers(nn.Sequential(nn.Sequential(module)))
    before = copy.deepcopy(module.state_dict())
    y = module(torch.randn(4, 3, 2, 2) * 100)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert y.abs().max() < 100


@pytest.mark.parametrize("kind", [ActivationFakeQuantize, WeightFakeQuantize])
def test_its_grid_rounds_as_it_does_and_stays_behind_when_it_moves_on(kind):
    module, x = _quantizer(kind), torch.randn(4, 3, 2, 2)
    y = module(x)

    grid = module.grid()
    module(10 * x)

    torch.testing.assert_close(grid(x), y, rtol=1e-6, atol=1e-6)
    assert not torch.equal(module.grid()(x), grid(x))


@pytest.mark.parametrize("kind", [ActivationFakeQuantize, WeightFakeQuantize])
def test_it_goes_on_from_its_state(kind):
    module, again = _quantizer(kind), _quantizer(kind)
    module(torch.randn(4, 3, 2, 2))

    again.load_state_dict(copy.deepcopy(module.state_dict()))

    x = 3 * torch.randn(4, 3, 2, 2)
    for _ in range(2):
        assert torch.equal(again(x), module(x))
    assert str(again.state_dict()) == str(module.state_dict())


@pytest.mark.parametrize("bits", [7, 8])
def test_an_activation_starts_from_a_grid_and_its_average_moves_on_from_there(bits):
    grid = activation_grid(torch.tensor(-1.0), torch.tensor(3.0), bits)
    low, high, _ = grid.range
    module, x = ActivationFakeQuantize(bits), torch.tensor([-7.0, 0.3, 20.0])

    module.start_from(grid)

    torch.testing.assert_close(module.grid()(x), grid(x))
    module(x)
    assert float(module.min_val) == pytest.approx(low + 0.01 * (-7 - low))
    assert float(module.max_val) == pytest.approx(high + 0.01 * (20 - high))
    assert grid.range == (low, high, grid.range[2])
    assert grid.range[2] != pytest.approx(float(module.scale))


def test_starting_from_a_grid_shares_nothing_with_it():
    grid = activation_grid(torch.tensor(-1.0), torch.tensor(3.0), 8)
    before = grid.range
    module = ActivationFakeQuantize(8)
    module.start_from(grid)

    module.scale.fill_(5)
    module.zero_point.fill_(5)

    assert grid.range == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_and_batch_norm_train_as_the_two_modules_do(frozen, bias):
    """Without rounding, which would turn the smallest differences into whole steps."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8))
    nn.init.uniform_(theirs[1].weight, 0.1, 2.0)
    nn.init.normal_(theirs[1].bias)
    ours = ConvBatchNorm2d.of(*copy.deepcopy(theirs))
    if frozen:
        for one in (theirs, ours):
            freeze_batch_norm(one)
    for _ in range(2):
        x = torch.randn(5, 4, 9, 9)
        (y, gradient), (expected, expected_gradient) = _run(ours, x), _run(theirs, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    state = {name.replace("0.", "").replace("1.", "bn."): value for name, value in theirs.state_dict().items()}
    torch.testing.assert_close(dict(ours.state_dict()), state, rtol=1e-4, atol=1e-5)
    assert (float(ours.bn.num_batches_tracked) == 0) == frozen
    parameters = dict(ours.named_parameters())
    for name, other in theirs.named_parameters():
        own = parameters[name.replace("0.", "").replace("1.", "bn.")]
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_conv_and_batch_norm_round_the_weight_that_they_fold_to():
    torch.manual_seed(0)
    layer = ConvBatchNorm2d.of(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
    nn.init.uniform_(layer.bn.weight, 0.1, 2.0)
    layer.weight_quantizer = WeightFakeQuantize(8, per_channel=True)
    layer.eval()
    x = torch.randn(2, 4, 9, 9)

    y = layer(x)

    weight, bias = layer.folded()
    grid = weight_grid(weight, per_channel=True)
    torch.testing.assert_close(layer.weight_quantizer.grid().scale, grid.scale)
    torch.testing.assert_close(y, nn.functional.conv2d(x, grid(weight), bias), rtol=1e-4, atol=1e-5)


def test_a_channel_that_batch_norm_switches_off_trains_without_a_division_by_zero():
    layer = ConvBatchNorm2d.of(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))
    nn.init.zeros_(layer.bn.weight)
    layer.weight_quantizer = WeightFakeQuantize(8, per_channel=True)

    y, gradient = _run(layer, torch.randn(5, 4, 9, 9))

    assert torch.isfinite(y).all()
    assert torch.isfinite(gradient).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
