"""torch's own int8: its engines, its modules, and the warnings that it gives."""

import copy
import io
import re
import tomllib
import warnings
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.errors import MachineError
from quantlib.export import native, scripting
from quantlib.graph import fusion
from quantlib.graph.model import trace_model
from quantlib.process import EXPECTED_WARNINGS
from quantlib.quantize import calibration, conversion, preparation
from quantlib.quantize.grids import Grid
from quantlib.recipe.scheme import Scheme
from quantlib.recipe.sections import EngineName
from quantlib.runtimes.available import resolve_engine
from quantlib.runtimes.engine import use_engine

SHAPE = (3, 8, 8)
# 7 bits of activations: no engine saturates on any CPU.
SCHEME = Scheme(observer="minmax", weights="per_channel", activation_bits=7)
ENGINES = [name for name in torch.backends.quantized.supported_engines if name not in {"none", "onednn"}]


def quantized(model, scheme=SCHEME, mode="eval"):
    """The quantized model, with ranges found on noise, and the noise."""
    torch.manual_seed(0)
    x = torch.randn(8, *SHAPE)
    fused = fusion.fuse_model(trace_model(copy.deepcopy(model).eval(), SHAPE), mode, inplace=True)
    if mode == "qat":
        prepared = preparation.prepare_qat(fused, scheme, inplace=True)
        prepared(x)
    else:
        prepared = preparation.observe(fused, scheme.float_layers, inplace=True)
        with torch.inference_mode():
            prepared(x)
        calibration.choose_ranges(prepared, scheme)
    return conversion.convert(prepared, scheme, inplace=True), x


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


def difference(model, x, engine):
    """How far torch's int8 is from the quantized model, as a share of the output's power."""
    with torch.inference_mode(), use_engine(engine):
        return noise(model(x), native.to_native(model)(x))


def of_kind(model, kind):
    return [module for module in model.modules() if type(module) is kind]


# Engines


def test_an_unknown_engine_is_refused_with_those_there_are():
    with pytest.raises(MachineError, match=r"'tensorrt' is not available.*qnnpack"):
        resolve_engine("tensorrt")


def test_no_engine_at_all_is_refused(monkeypatch):
    # Some builds of torch list it, but it cannot compute.
    monkeypatch.setattr(torch.backends, "quantized", SimpleNamespace(supported_engines=["qnnpack", "none"]))

    with pytest.raises(MachineError, match=r"'none' is not available: this machine's torch has qnnpack\."):
        resolve_engine("none")


def test_auto_is_an_engine_of_this_machine():
    assert resolve_engine("auto") in set(get_args(EngineName)) - {"auto"}


def test_the_engine_is_put_back_after_use_also_after_an_error():
    before = torch.backends.quantized.engine
    other = next(e for e in torch.backends.quantized.supported_engines if e not in {before, "none"})

    with use_engine(other):
        assert torch.backends.quantized.engine == other
    assert torch.backends.quantized.engine == before
    with pytest.raises(KeyError), use_engine(other):
        raise KeyError
    assert torch.backends.quantized.engine == before


# Warnings


def test_expected_warnings_are_those_that_pyproject_lists(pytestconfig):
    settings = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    first, *filters = settings["filterwarnings"]

    assert first == "error"
    assert filters == [f"ignore:{message}:{kind.__name__}" for message, kind in EXPECTED_WARNINGS]


def test_each_expected_warning_is_one_that_torch_gives(fused_model, calibrated, engine):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        int8 = conversion.convert(calibrated("fbgemm"), scheme("fbgemm"))
        torch.jit.load(io.BytesIO(scripting.script(int8, engine, (3, 32, 32))))
        scripting.script(fused_model, None, (3, 32, 32))

    unseen = [
        message
        for message, kind in EXPECTED_WARNINGS
        if not any(re.match(message, str(w.message)) and issubclass(w.category, kind) for w in caught)
    ]
    # torch gives this warning once per process, and may already have done so; the others are ExecuTorch's.
    assert set(unseen) <= {
        "torch.quantize_per_tensor, torch.quantize_per_channel",
        "(read_text|open_text|read_binary) is deprecated",
        "This API is experimental and subject to change without notice",
    }


# torch's int8 computes what the quantized model does


class Residual(nn.Module):
    """Sums with and without a ReLU, one in place, and a ReLU for all."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.relu, self.last = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2, groups=4)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = torch.nn.functional.relu(self.second(x))
        y = self.relu(y + x)
        y += self.third(y)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(self.last(y), 1), 1))


class Operations(nn.Module):
    """Everything that computes in int8, one after the other, and float operations in between."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (3, 8, 16, 8, 8, 8))
        self.narrow, self.fc, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8, 8), nn.Linear(32, 3)

    def forward(self, x):
        x = nn.functional.relu6(self.layers[0](x))
        left, right = torch.chunk(self.layers[1](x), 2, 1)
        x = self.layers[2](torch.cat([x, right, left], 1))
        x = self.layers[3](nn.functional.hardswish(x))
        x, gate = torch.split(x, [4, 4], 1)  # A layer reads the first part, a float operation the second.
        x = self.narrow(x) * torch.sigmoid(gate.mean((1, 2, 3), keepdim=True))
        x = nn.functional.silu(self.layers[4](nn.functional.max_pool2d(x, 2)))
        x = self.layers[5](x) * torch.sigmoid(x)
        x = torch.relu(self.fc(x.flatten(2).transpose(1, 2)))  # A layer over tokens.
        return self.head(nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).reshape(-1, 8, 4, 4), 2).flatten(1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weights", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", [Residual, Operations])
def test_each_engine_computes_what_the_quantized_model_does(kind, weights, engine):
    torch.manual_seed(1)
    model = kind().eval()
    int8, x = quantized(model, Scheme(observer="minmax", weights=weights, activation_bits=7))
    with torch.inference_mode():
        assert 0 < noise(model(x), int8(x)) < 0.05
    assert difference(int8, x, engine) < 0.001


@pytest.mark.parametrize("kind", [Residual, Operations])
def test_a_model_from_training_computes_the_same(kind, engine):
    torch.manual_seed(1)
    int8, x = quantized(kind(), mode="qat")
    assert difference(int8, x, engine) < 0.001


def test_the_tiny_net_computes_the_same_on_real_images(calibrated, val_inputs, engine):
    int8 = conversion.convert(calibrated("fbgemm"), scheme("fbgemm"))
    assert difference(int8, val_inputs, engine) < 0.001


def test_logits_lie_on_the_grid_of_the_quantized_model(engine):
    torch.manual_seed(1)
    int8, x = quantized(Residual().eval())
    grid = int8.get_submodule("quantizers.fc")
    with torch.inference_mode(), use_engine(engine):
        steps = (native.to_native(int8)(x) / grid.scale).double()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert len(steps.round().unique()) > 5


@pytest.mark.parametrize("weights", ["per_tensor", "per_channel"])
def test_weights_are_packed_on_the_grid_of_the_quantized_model(weights, engine):
    torch.manual_seed(1)
    int8, _ = quantized(
        nn.Sequential(nn.Conv2d(3, 4, 3)), Scheme(observer="minmax", weights=weights, activation_bits=7)
    )
    with use_engine(engine):
        (packed,) = of_kind(native.to_native(int8), native.nnq.Conv2d)
    layer = int8.get_submodule("0")
    assert torch.equal(packed.weight().int_repr(), layer.weight_quantizer.steps(layer.weight.detach()))
    assert torch.equal(packed.bias(), layer.bias)


# What torch's model is made of


def test_every_layer_is_one_of_torchs_with_its_relu_and_every_tensor_is_rounded_once(engine):
    with use_engine(engine):
        own = native.to_native(quantized(Residual().eval())[0])

    assert len(of_kind(own, native.nniq.ConvReLU2d)) == 2
    assert len(of_kind(own, native.nnq.Conv2d)) == 2
    assert len(of_kind(own, native.nnq.Linear)) == 1
    # The image and the mean over its pixels, which is float; and out of int8 before the mean and for the logits.
    assert len(of_kind(own, native.nnq.Quantize)) == 2
    assert len(of_kind(own, native.nnq.DeQuantize)) == 2
    assert not [m for m in own.modules() if type(m).__module__.startswith("quantlib.quantize") or type(m) is nn.ReLU]
    assert not list(own.parameters())


def test_a_layer_over_tokens_takes_its_relu(engine):
    with use_engine(engine):
        own = native.to_native(quantized(Operations().eval())[0])

    assert len(of_kind(own, native.nniq.LinearReLU)) == 1
    assert len(of_kind(own, native.nnq.Hardswish)) == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("high", [6, 9])
def test_relu6_clips_at_6_wherever_its_grid_ends(high, engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1)).eval()
    model[0].bias.data += 5
    int8, x = quantized(model)
    with torch.inference_mode():
        assert (model[0](x) > 7).any()
    int8.set_submodule("quantizers._1", Grid(torch.tensor(high / 127), torch.tensor(0), 0, 127))

    assert difference(int8, x, engine) < 1e-5


def test_what_stays_float_comes_along_as_it_is(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 4)).eval()
    scheme = Scheme(observer="minmax", weights="per_channel", activation_bits=7, float_layers=("2",))
    int8, x = quantized(model, scheme)
    with use_engine(engine):
        own = native.to_native(int8)

    assert own.get_submodule("2") is int8.get_submodule("2")
    assert torch.equal(own.get_submodule("2").weight, model[2].weight)
    assert difference(int8, x, engine) < 0.001


class Branching(nn.Module):
    """Its forward depends on the values that it sees."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if bool(x.abs().sum() > 0) else x


def test_a_layer_of_a_module_that_cannot_be_traced_is_int8_by_itself(engine):
    torch.manual_seed(0)
    int8, x = quantized(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Branching(), nn.Conv2d(8, 4, 1)))
    before = repr(int8)
    with use_engine(engine):
        own = native.to_native(int8)

    assert len(of_kind(own.get_submodule("2"), native.nnq.Conv2d)) == 1
    assert not of_kind(own.get_submodule("2"), nn.Conv2d)
    assert repr(int8) == before
    assert difference(int8, x, engine) < 0.001


def test_the_quantized_model_stays_as_it_was(engine):
    int8, x = quantized(Operations().eval())
    with torch.inference_mode():
        before = int8(x)
    state = copy.deepcopy(int8.state_dict())

    with use_engine(engine), torch.inference_mode():
        native.to_native(int8)(x)

    with torch.inference_mode():
        assert torch.equal(int8(x), before)
    assert int8.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in int8.state_dict().items())


@pytest.mark.parametrize("bits", [7, 8])
def test_rounding_is_torchs_own(bits):
    torch.manual_seed(0)
    grid = Grid(torch.tensor(0.03), torch.tensor(50), 0, 2**bits - 1)
    x = torch.cat([torch.randn(10_000) * 3, (torch.arange(-100, 300) + 0.5) * 0.03])

    rounded = native.nnq.Quantize(0.03, 50, torch.quint8)(x)

    assert torch.equal(grid.steps(x), rounded.int_repr().clamp_max(2**bits - 1))
    torch.testing.assert_close(grid(x), rounded.dequantize().clamp_max(grid.range[1]))
