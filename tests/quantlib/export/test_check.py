"""An exported file must answer as its model does."""

import copy

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib import helper
from quantlib.errors import ModelError
from quantlib.export import check, executorch, native, onnx_draft, scripting, torch_export
from quantlib.export.check import check_file
from quantlib.quantize import conversion
from quantlib.quantize.grids import Grid
from quantlib.recipe.interface import FLOAT
from quantlib.runtimes import available

SHAPE = (3, 32, 32)
SCHEME = scheme("fbgemm")
ONNX_RUNTIMES = [found.name for found in available.find_runtimes()]
NAMED = [name for name in ("torch_export", "executorch") if available.is_installed(name)]
RUNTIMES = ["torchscript", *NAMED, *ONNX_RUNTIMES]


@pytest.fixture(scope="module")
def quantized(calibrated):
    """The trained net, quantized; read-only."""
    return conversion.convert(calibrated("fbgemm"), SCHEME)


@pytest.fixture(scope="module")
def write(fused_model):
    """Writes a model as a file for a runtime: (content, the runtime's full name)."""
    draft = onnx_draft.draft(fused_model, SHAPE) if ONNX_RUNTIMES else b""

    def write(model, runtime):
        if runtime == "torchscript":
            engine = available.default_engine() if any(isinstance(each, Grid) for each in model.modules()) else None
            return scripting.script(model, engine, SHAPE), available.torchscript_on(engine)
        if runtime == "torch_export":
            return torch_export.write(model, SHAPE), runtime
        if runtime == "executorch":
            return executorch.write(model, SHAPE), runtime
        from quantlib.export import onnx

        return onnx.write_onnx(draft, model, runtime), runtime

    return write


def with_wrong_weights(model):
    """A copy of a model whose last layer has weights of the other sign."""
    wrong = copy.deepcopy(model)
    wrong.get_submodule("classifier.1").weight.data.neg_()
    return wrong


def with_wrong_scale(model):
    """A copy of a quantized model that cuts off most of what the last layer reads."""
    wrong = copy.deepcopy(model)
    wrong.get_submodule("quantizers.classifier_0").scale.mul_(0.1)
    return wrong


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("spoil", [with_wrong_weights, with_wrong_scale])
def test_a_file_that_answers_as_its_model_passes_and_one_with_a_wrong_layer_or_scale_is_refused(
    write, quantized, runtime, val_shard, spoil
):
    content, full_name = write(quantized, runtime)
    check_file(content, quantized, full_name, val_shard)
    other, _ = write(spoil(quantized), runtime)
    with pytest.raises(
        ModelError, match=rf"In {full_name} the logits are [\d.]+% of their power away.* are allowed\.$"
    ):
        check_file(other, quantized, full_name, val_shard)


def test_a_refusal_advises_7_bits_where_there_are_8(write, calibrated, val_shard):
    quantized = conversion.convert(calibrated("onednn"), scheme("onednn"))
    content, full_name = write(with_wrong_weights(quantized), "torchscript")
    with pytest.raises(
        ModelError, match=r"are allowed\. On a CPU whose int8 arithmetic saturates, set activation_bits = 7\.$"
    ):
        check_file(content, quantized, full_name, val_shard)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_float_file_answers_as_its_model_to_a_hundredth_of_a_percent(
    write, fused_model, quantized, runtime, val_shard
):
    content, full_name = write(fused_model, runtime)
    check_file(content, fused_model, full_name, val_shard)
    content, full_name = write(quantized, runtime)
    with pytest.raises(ModelError, match=r"at most 0\.01% are allowed\.$"):
        check_file(content, fused_model, full_name, val_shard)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_gives_no_numbers_is_refused(write, fused_model, runtime, val_shard):
    wrong = copy.deepcopy(fused_model)
    wrong.get_submodule("classifier.1").bias.data.fill_(float("nan"))
    content, full_name = write(wrong, runtime)
    with pytest.raises(ModelError, match="nan% of their power"):
        check_file(content, fused_model, full_name, val_shard)


class Failing(nn.Module):
    """Runs on no image of this size."""

    def forward(self, x):
        return x.view(7, -1)


def test_a_file_that_does_not_run_is_refused_with_the_reason(monkeypatch, quantized, engine, val_shard):
    # Some kernels refuse what others compute, and only as they run.
    monkeypatch.setattr(native, "to_native", lambda model: torch.fx.symbolic_trace(Failing()))
    content = scripting.script(quantized, engine, SHAPE)
    with pytest.raises(
        ModelError, match=r"TorchScript file does not run in torchscript\S*: .*shape '\[7, -1\]' is invalid"
    ):
        check_file(content, quantized, available.torchscript_on(engine), val_shard)


def test_a_file_is_compared_on_real_images(monkeypatch, quantized, write, val_shard):
    asked = []
    monkeypatch.setattr(check.helper, "run_file", lambda *request: asked.append(request) or torch.zeros(18, 3))
    content, full_name = write(quantized, "torchscript")
    with pytest.raises(ModelError, match=r"100\.00% of their power"):
        check_file(content, quantized, full_name, val_shard)
    assert [request[1:] for request in asked] == [(full_name, val_shard, 32, FLOAT)]


def test_a_check_prints_nothing(quantized, write, val_shard, capfd):
    helper._HELPER.stop()  # torch warns once per process.
    content, full_name = write(quantized, "torchscript")
    check_file(content, quantized, full_name, val_shard)
    assert "".join(capfd.readouterr()) == ""
