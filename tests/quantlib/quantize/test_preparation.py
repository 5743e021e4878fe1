import pytest
import torch
from torch import nn

from quantlib.eager import converting
from quantlib.eager.modules import ObserverBase
from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.models import mobilenet_v2
from quantlib.quantize import preparation
from quantlib.recipe.scheme import Scheme
from quantlib.runtimes.engine import use_engine

SETTING = [[1, 8, 1, 1], [3, 8, 2, 2]]


def scheme(**options):
    return Scheme(**{"observer": "minmax", "weights": "per_channel", "activation_bits": 8, **options})


@pytest.fixture
def fused():
    torch.manual_seed(0)
    net = mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING).eval()
    return fusion.fuse_model(net, "eval")


def int8(prepared):
    prepared(torch.randn(4, 3, 16, 16))
    with use_engine("auto"):
        return converting.convert(prepared)


@pytest.mark.parametrize(("bits", "largest"), [(7, 127), (8, 255)])
@pytest.mark.parametrize("observer", ["minmax", "moving_average", "histogram", "percentile", "mse"])
def test_every_observer_keeps_to_the_activation_bits(fused, observer, bits, largest):
    prepared = preparation.prepare(fused, scheme(observer=observer, activation_bits=bits), "eval")
    found = [m.quant_max for m in prepared.modules() if isinstance(m, ObserverBase)]
    assert found
    assert set(found) == {largest}


@pytest.mark.parametrize(
    ("weights", "qscheme"), [("per_tensor", torch.per_tensor_affine), ("per_channel", torch.per_channel_affine)]
)
def test_weights_have_one_scale_per_tensor_or_per_channel(fused, weights, qscheme):
    layer = int8(preparation.prepare(fused, scheme(weights=weights), "eval")).features[0][0]
    assert layer.weight().qscheme() == qscheme


@pytest.mark.parametrize("name", ["features.1.conv.0.0", "Linear", "features.2"])
def test_float_layers_stay_float_and_the_int8_model_runs(fused, name):
    model = int8(preparation.prepare(fused, scheme(float_layers=(name,)), "eval"))
    kept = [m for m in model.modules() if isinstance(m, preparation.KeptInFloat)]
    assert len(kept) == 1
    assert any(type(m) in {nn.Conv2d, nn.Linear} for m in kept[0].modules())
    with use_engine("auto"):
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 4)
        torch.jit.script(model)


def test_float_layers_that_the_model_lacks_are_an_error_with_the_nearest_name(fused):
    with pytest.raises(ModelError, match=r"did you mean 'classifier.1'"):
        preparation.prepare(fused, scheme(float_layers=("clasifier.1",)), "eval")


def test_float_layers_in_training_are_trained_in_float():
    net = fusion.fuse_model(
        mobilenet_v2.mobilenet_v2(num_classes=4, width_mult=0.25, inverted_residual_setting=SETTING), "qat"
    )
    prepared = preparation.prepare(net, scheme(float_layers=("features.0.0",)), "qat")
    prepared(torch.randn(4, 3, 16, 16)).sum().backward()
    assert not hasattr(prepared.features[0][0].module, "weight_fake_quant")
