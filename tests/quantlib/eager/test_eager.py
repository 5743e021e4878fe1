"""Engines, qconfigs, and what stands between quantlib and torch's quantization."""

import copy
import re
import tomllib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.eager import converting
from quantlib.eager.rounding import FixedFakeQuantize
from quantlib.eager.training import freeze_batch_norm, freeze_observers
from quantlib.errors import MachineError
from quantlib.export import onnx, scripting
from quantlib.graph import fusion
from quantlib.process import EXPECTED_WARNINGS
from quantlib.quantize import preparation
from quantlib.recipe.scheme import QConfigName
from quantlib.recipe.sections import EngineName
from quantlib.runtimes.available import resolve_engine
from quantlib.runtimes.engine import use_engine

Calibrated = Callable[[str], nn.Module]


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


def test_expected_warnings_are_those_that_pyproject_lists(pytestconfig):
    settings = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    first, *filters = settings["filterwarnings"]

    assert first == "error"
    assert filters == [f"ignore:{message}:{kind.__name__}" for message, kind in EXPECTED_WARNINGS]


def test_each_expected_warning_is_one_that_torch_gives(fused_model, calibrated, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converting.convert(preparation.prepare(fused_model, scheme("fbgemm"), "eval"))
        int8 = converting.convert(calibrated("fbgemm"))
        (tmp_path / "model.pt").write_bytes(scripting.script(int8))
        torch.jit.load(tmp_path / "model.pt")
        onnx.to_onnx(int8, (3, 32, 32))

    unseen = [
        message
        for message, kind in EXPECTED_WARNINGS
        if not any(re.match(message, str(w.message)) and issubclass(w.category, kind) for w in caught)
    ]
    # torch gives this warning once per process, and may already have done so.
    assert set(unseen) <= {"torch.quantize_per_tensor, torch.quantize_per_channel"}


@pytest.mark.parametrize("qconfig", get_args(QConfigName))
@pytest.mark.parametrize("mode", ["eval", "qat"])
def test_preparing_leaves_the_given_model_as_it_was(tiny_model, mode, qconfig):
    fused = fusion.fuse_model(tiny_model, mode)
    before = copy.deepcopy(fused)

    prepared = preparation.prepare(fused, scheme(qconfig), mode)

    assert repr(fused) == repr(before)
    assert not hasattr(fused, "qconfig")
    assert any("observer" in name or "post_process" in name for name, _ in prepared.named_modules())


@pytest.mark.parametrize(
    ("qconfig", "observer", "scheme", "activation_bits"),
    [
        # 7 bits: x86 CPUs without VNNI add pairs of products in 16 bits, which 8 would overflow.
        ("default", "MinMaxObserver", torch.per_tensor_symmetric, 7),
        ("fbgemm", "PerChannelMinMaxObserver", torch.per_channel_symmetric, 7),
        ("x86", "PerChannelMinMaxObserver", torch.per_channel_symmetric, 7),
        ("onednn", "PerChannelMinMaxObserver", torch.per_channel_symmetric, 8),
        ("qnnpack", "MinMaxObserver", torch.per_tensor_symmetric, 8),
    ],
)
def test_each_qconfig_has_its_weights_scheme_and_activation_bits(
    calibrated, qconfig, observer, scheme, activation_bits
):
    prepared = calibrated(qconfig)
    weights = prepared.classifier[1].qconfig.weight()
    activations = prepared.quant.activation_post_process

    assert type(weights).__name__ == observer
    assert weights.qscheme == scheme
    assert activations.quant_max - activations.quant_min + 1 == 2**activation_bits


def test_freezing_observers_and_batch_norm_stops_their_statistics(tiny_model, val_inputs):
    prepared = preparation.prepare(fusion.fuse_model(tiny_model, "qat"), scheme("fbgemm"), "qat")
    prepared(val_inputs)
    freeze_observers(prepared)
    freeze_batch_norm(prepared)
    before = {name: value.clone() for name, value in prepared.named_buffers()}

    prepared(3 * val_inputs)

    assert all(torch.equal(value, before[name]) for name, value in prepared.named_buffers())


def test_rounding_to_a_fixed_grid_follows_the_affine_map(engine):
    observer = preparation.prepare(nn.Sequential(nn.Linear(1, 1)), scheme("default"), "eval")[0].activation_post_process
    observer(torch.tensor([-1.0, 3.0]))
    scale, zero_point = (float(value) for value in observer.calculate_qparams())
    x = torch.linspace(-2, 4, 101)

    rounded = FixedFakeQuantize(observer)(x)

    # Jacob et al. 2018, eq. 1: r = S(q - Z); 7 bits of quint8.
    assert scale == pytest.approx(4 / 127)
    expected = scale * ((x / scale + zero_point).round().clamp(0, 127) - zero_point)
    torch.testing.assert_close(rounded, expected)
    assert len(rounded.unique()) > 60
