"""Fake quantization and fused Conv-BatchNorm for training, compared with torch's own."""

import copy

import pytest
import torch
from torch import nn

from quantlib.eager.modules import (
    FakeQuantizeBase,
    FusedMovingAvgObsFakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)
from quantlib.eager.training import freeze_batch_norm, freeze_observers, use_fast_forward
from quantlib.graph import fusion
from quantlib.quantize import preparation
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize
from quantlib.recipe.scheme import Scheme


def _activation(kind, reduce_range):
    return kind(MovingAverageMinMaxObserver, 0, 255, reduce_range=reduce_range)


def _weight(kind):
    return kind(
        MovingAveragePerChannelMinMaxObserver,
        -128,
        127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


def _run(module, x):
    """The module's output, and the gradient of its weighted sum."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), x.grad


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_activations_are_quantized_as_by_torch(reduce_range, relu, layout):
    torch.manual_seed(0)
    ours, theirs = (_activation(kind, reduce_range) for kind in (ActivationFakeQuantize, FusedMovingAvgObsFakeQuantize))
    for step in range(3):  # From the second step on, values fall outside the moving range.
        x = (torch.randn(4, 6, 5, 5) * (step + 1)).contiguous(memory_format=layout)
        x = x.relu() if relu else x
        (y, gradient), (expected, expected_gradient) = _run(ours, x), _run(theirs, x)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
        assert torch.equal(gradient, expected_gradient)
        assert step == 0 or 0 < (gradient == 0).float().mean() < (0.9 if relu else 0.5)
    assert {name: value.tolist() for name, value in ours.state_dict().items()} == {
        name: value.tolist() for name, value in theirs.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore:Please use quant_min")
def test_it_rectifies_like_a_relu_before_it():
    torch.manual_seed(0)
    ours, theirs = (_activation(ActivationFakeQuantize, True) for _ in range(2))
    ours.fuses_relu = True
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


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_gradient_takes_the_place_of_what_was_rectified_if_that_keeps_its_layout(
    layout,
):
    """In another layout, the earlier layers would sum it in another order."""
    module = _activation(ActivationFakeQuantize, True)
    module.fuses_relu = True
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    inside = (x > 0).detach()

    gradient = torch.autograd.grad(module(x), x, torch.ones_like(x, memory_format=layout))[0]

    assert torch.equal(gradient, inside.float())
    assert gradient.is_contiguous(memory_format=layout)
    assert (gradient.data_ptr() == x.data_ptr()) == (layout == torch.channels_last)


def test_relu_is_left_to_the_quantization_that_follows():
    model = preparation.prepare(
        fusion.fuse_model(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), "qat"),
        Scheme(observer="minmax", weights="per_channel", activation_bits=8),
        "qat",
    )
    x = torch.randn(5, 4, 9, 9)
    assert model(x).min() == 0
    use_fast_forward(model)
    assert model[0].activation_post_process.fuses_relu
    assert model[0]._forward(x).min() < 0
    # A replacement must find a ReLU.
    model[0].activation_post_process = nn.Identity()
    assert model(x).min() == 0


def test_weights_are_quantized_as_by_torch():
    torch.manual_seed(0)
    ours, theirs = _weight(WeightFakeQuantize), _weight(FusedMovingAvgObsFakeQuantize)
    for step in range(3):
        w = torch.randn(6, 4, 3, 3) * torch.logspace(-3, 1, 6).view(-1, 1, 1, 1) * (step + 1)
        w[5] = 0.0
        (y, gradient), (expected, expected_gradient) = _run(ours, w), _run(theirs, w)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
        assert torch.equal(gradient, expected_gradient)
    # torch uses another grid for an all-zero channel; the values are zero on that one, too.
    torch.testing.assert_close(ours.scale[:5], theirs.scale[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.zero_point[:5], theirs.zero_point[:5].int())


@pytest.mark.filterwarnings("ignore:Please use quant_min")
@pytest.mark.parametrize("kind", [ActivationFakeQuantize, WeightFakeQuantize])
def test_a_frozen_observer_keeps_its_grid(kind):
    module = _activation(kind, False) if kind is ActivationFakeQuantize else _weight(kind)
    module(torch.randn(4, 3, 2, 2))
    freeze_observers(module)
    before = copy.deepcopy(module.state_dict())
    y = module(torch.randn(4, 3, 2, 2) * 100)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert y.abs().max() < 100


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv_and_batch_norm_train_as_in_torch(frozen, bias):
    """Without rounding, which would turn the smallest differences into whole steps."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.uniform_(chain[1].weight, 0.1, 2.0)
    nn.init.normal_(chain[1].bias)
    fused = fusion.fuse_model(chain, "qat")
    model = preparation.prepare(
        fused, Scheme(observer="minmax", weights="per_channel", activation_bits=8, float_layers=()), "qat"
    )
    for module in model.modules():
        for name in ("weight_fake_quant", "activation_post_process"):
            if isinstance(getattr(module, name, None), FakeQuantizeBase):
                setattr(module, name, nn.Identity())
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        module.__dict__.pop("_forward_approximate", None)
    for one in (model, theirs):
        if frozen:
            freeze_batch_norm(one)
    for _ in range(2):
        x = torch.randn(5, 4, 9, 9)
        (y, gradient), (expected, expected_gradient) = _run(model, x), _run(theirs, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)
    for parameter, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4)
    assert type(model[0]).__name__ == "ConvBnReLU2d"
