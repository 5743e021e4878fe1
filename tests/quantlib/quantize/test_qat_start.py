import pytest
import torch
from torch import nn

from quantlib.eager import converting
from quantlib.errors import RecipeError
from quantlib.graph import fusion
from quantlib.models import mobilenet_v2
from quantlib.quantize import equalization, preparation, qat
from quantlib.recipe.schedule import Schedule
from quantlib.recipe.schema import parse_recipe
from quantlib.recipe.scheme import Scheme
from quantlib.runtimes.engine import use_engine

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
    return equalization.equalize(model.eval(), (3, 16, 16))


def test_training_starts_as_the_calibrated_int8_model(net):
    x = torch.randn(16, 3, 16, 16)
    calibrated = preparation.prepare(fusion.fuse_model(net, "eval"), SCHEME, "eval")
    with torch.inference_mode():
        calibrated(x)
    for module in calibrated.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias.data += 0.05  # As bias correction might.
    start = qat.start_from(fusion.fuse_model(net, "qat"), calibrated, SCHEME)
    with use_engine("auto"), torch.inference_mode():
        wanted, found = converting.convert(calibrated)(x), converting.convert(start)(x)
    # A value halfway between two steps of the grid may fall to either side.
    assert (wanted - found).abs().mean() < 0.02 * wanted.std()


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
    parse_recipe(tables(start="float", freeze_observer_after_epoch=3))


def test_named_qconfigs_are_torchs_own_until_an_option_is_given():
    recipe = parse_recipe(
        tables()
        | {
            "ptq": [
                {"name": "a", "qconfig": "default"},
                {"name": "b", "qconfig": "fbgemm", "observer": "minmax", "equalize": True, "activation_bits": 8},
                {"name": "c"},
            ]
        }
    )
    minmax, mixed, accurate = recipe.ptq
    assert minmax.scheme(8) == Scheme(observer="minmax", weights="per_tensor", activation_bits=7)
    assert not minmax.equalizes
    assert not minmax.corrects_bias
    assert mixed.scheme(7) == Scheme(observer="minmax", weights="per_channel", activation_bits=8)
    assert mixed.equalizes
    assert accurate.equalizes
    assert accurate.corrects_bias
    assert [accurate.scheme(bits).activation_bits for bits in (7, 8)] == [7, 8]
