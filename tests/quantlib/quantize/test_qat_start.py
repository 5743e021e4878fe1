"""Where training starts: from a calibrated model; and what a recipe's options for it mean."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from quantlib.errors import RecipeError
from quantlib.graph import fusion
from quantlib.graph.fusion import ConvBatchNorm2d
from quantlib.graph.tracing import trace
from quantlib.models import mobilenet_v2
from quantlib.quantize import calibration, conversion, equalization, preparation, qat
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.scheme import Scheme

SCHEME = Scheme(observer="mse", weights="per_channel", activation_bits=8)
SETTING = [[1, 8, 1, 1], [3, 8, 2, 2], [3, 8, 1, 1]]


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data = torch.exp(torch.randn(module.num_features))
    return equalization.equalize(trace(model.eval(), (3, 16, 16)), (3, 16, 16))


@pytest.fixture
def x(net):
    return torch.randn(16, 3, 16, 16)


def _calibrated(net, x, scheme):
    """A calibrated model with biases as bias correction might leave them."""
    model = preparation.observe(fusion.fuse_model(net, "eval"), scheme.float_layers)
    with torch.inference_mode():
        model(x)
    calibration.choose_ranges(model, scheme)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias.data += 0.05
    return model


def _answers(prepared, x, scheme=SCHEME):
    with torch.inference_mode():
        return conversion.convert(prepared, scheme)(x)


@pytest.mark.parametrize("weights", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("float_layers", [(), ("features.2",)])
def test_training_starts_as_the_calibrated_int8_model(net, x, weights, float_layers):
    scheme = replace(SCHEME, weights=weights, float_layers=float_layers)
    calibrated = _calibrated(net, x, scheme)

    start = qat.start_from(fusion.fuse_model(net, "qat"), calibrated, scheme)

    wanted, found = _answers(calibrated, x, scheme), _answers(start, x, scheme)
    # A value halfway between two steps of the grid may fall to either side.
    assert (wanted - found).abs().mean() < 0.02 * wanted.std()


def test_training_starts_with_the_grids_of_the_calibrated_model(net, x):
    calibrated = _calibrated(net, x, SCHEME)

    start = qat.start_from(fusion.fuse_model(net, "qat"), calibrated, SCHEME)

    found, wanted = preparation.quantizers(start), preparation.quantizers(calibrated)
    assert {name: each.grid().range for name, each in found.items()} == {
        name: grid.range for name, grid in wanted.items()
    }
    quantized = conversion.convert(calibrated, SCHEME)
    for path in preparation.int8_layers(start):
        own, other = (model.get_submodule(path).weight_quantizer for model in (start, quantized))
        torch.testing.assert_close(own.grid().scale, other.scale)


def test_biases_are_those_of_the_calibrated_model_once_batch_norm_is_folded(net, x):
    calibrated = _calibrated(net, x, SCHEME)

    start = qat.start_from(fusion.fuse_model(net, "qat"), calibrated, SCHEME)

    for path in preparation.int8_layers(start):
        layer, wanted = start.get_submodule(path), calibrated.get_submodule(path)
        bias = layer.folded()[1] if isinstance(layer, ConvBatchNorm2d) else layer.bias
        torch.testing.assert_close(bias, wanted.bias)


def test_the_start_is_ready_for_training_and_the_models_it_came_from_are_as_they_were(net, x):
    calibrated, trainable = _calibrated(net, x, SCHEME), fusion.fuse_model(net, "qat")
    before = [copy.deepcopy(model.state_dict()) for model in (calibrated, trainable)]

    start = qat.start_from(trainable, calibrated, SCHEME)
    start(x).sum().backward()

    assert start.training
    assert all(parameter.grad is not None for parameter in start.parameters())
    for model, state in zip((calibrated, trainable), before, strict=True):
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Branching(nn.Module):
    """Cannot be traced: it branches on values."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean([2, 3])) if x.mean() < 100 else x.mean([2, 3])


def test_what_cannot_be_traced_starts_as_the_calibrated_int8_model_too():
    torch.manual_seed(0)
    net, x = trace(Branching(), (3, 16, 16)), torch.randn(16, 3, 16, 16)
    calibrated = _calibrated(net, x, SCHEME)

    start = qat.start_from(fusion.fuse_model(net, "qat"), calibrated, SCHEME)

    wanted, found = _answers(calibrated, x), _answers(start, x)
    assert (wanted - found).abs().mean() < 0.02 * wanted.std()
    start(x).sum().backward()
    assert all(parameter.grad is not None for parameter in start.parameters())


def schedule(**options):
    given = {
        "batches_per_epoch": 2,
        "batch_size": 4,
        "epochs": 4,
        "learning_rate": 0.1,
        "decay": "cosine",
        "freeze_batch_norm_after_epoch": -2,
        "freeze_observer_after_epoch": -2,
        "seed": 0,
    }
    return Schedule(**(given | options))


def test_cosine_falls_from_the_learning_rate_to_zero():
    rates = [schedule().learning_rate_at(epoch, part) for epoch, part in ((0, 0.0), (2, 0.0), (3, 0.999))]
    assert rates == pytest.approx([0.1, 0.05, 0.0], abs=1e-5)
    assert schedule(decay="constant").learning_rate_at(3, 0.5) == 0.1


def test_minus_two_freezes_before_the_first_epoch_and_minus_one_after_it():
    assert schedule().freezes_batch_norm(-1)
    assert not schedule(freeze_batch_norm_after_epoch=-1).freezes_batch_norm(-1)
    assert schedule(freeze_batch_norm_after_epoch=-1).freezes_batch_norm(0)


def test_distillation_asks_for_nothing_where_the_teacher_agrees():
    logits, x = torch.randn(5, 4), torch.zeros(5)
    labels = torch.zeros(5, dtype=torch.int64)
    assert qat._loss(logits, labels, x, lambda _: logits) == pytest.approx(0, abs=1e-6)
    assert qat._loss(logits, labels, x, lambda _: -logits) > 0.01


def tables(**qat_options):
    return {
        "name": "r",
        "model": {"weights": "train"},
        "data": {"format": "digits"},
        "qat": [{"name": "q", **qat_options}],
    }


def test_a_float_start_without_a_search_for_ranges_is_refused():
    with pytest.raises(RecipeError, match="freeze_observer_after_epoch"):
        parse_recipe(tables(start="float"))
    assert parse_recipe(tables(start="float", freeze_observer_after_epoch=3)).qat[0].start == "float"


def test_named_qconfigs_are_torchs_own_until_an_option_is_given():
    recipe = parse_recipe(
        tables()
        | {
            "ptq": [
                {"name": "a", "qconfig": "default"},
                {"name": "b", "qconfig": "fbgemm", "observer": "minmax", "equalize": True, "activation_bits": 8},
                {"name": "c"},
                {"name": "d", "smoothing": False},
            ]
        }
    )
    minmax, mixed, accurate, unsmoothed = recipe.ptq
    assert minmax.scheme(8) == Scheme(observer="minmax", weights="per_tensor", activation_bits=7)
    assert not minmax.equalizes
    assert not minmax.corrects_bias
    assert mixed.scheme(7) == Scheme(observer="minmax", weights="per_channel", activation_bits=8)
    assert mixed.equalizes
    assert not accurate.equalizes
    assert [branch.smooths for branch in recipe.ptq] == [None, None, 0.5, None]
    assert unsmoothed.corrects_bias
    assert accurate.corrects_bias
    assert [accurate.scheme(bits).activation_bits for bits in (7, 8)] == [7, 8]
