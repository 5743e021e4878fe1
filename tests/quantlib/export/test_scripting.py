"""The TorchScript file that is shipped."""

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from schemes import scheme
from torch import fx, nn

from quantlib import api
from quantlib.errors import MachineError, ModelError
from quantlib.export import native, scripting
from quantlib.graph import fusion
from quantlib.graph.model import trace_model
from quantlib.models import checkpoint
from quantlib.quantize import calibration, conversion, preparation, stored
from quantlib.runtimes.engine import use_engine

SHAPE = (3, 32, 32)
SMALL = (3, 8, 8)
SCHEME = scheme("fbgemm")

# What a user writes to serve the file: torch alone, quantlib out of reach.
_SERVE = """
import sys
assert "quantlib" not in sys.modules
import torch
torch.set_num_threads(1)
model = torch.jit.load(sys.argv[1])
with torch.inference_mode():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
assert "quantlib" not in sys.modules
"""


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


def loaded(content):
    """A file's model."""
    return torch.jit.load(io.BytesIO(content))


def small(model, mode="eval"):
    """A model for small images, as it is fused."""
    return fusion.fuse_model(trace_model(model.eval(), SMALL), mode, inplace=True)


@pytest.fixture(scope="module")
def quantized(calibrated):
    """The trained net, quantized; read-only."""
    return conversion.convert(calibrated("fbgemm"), SCHEME)


@pytest.fixture(scope="module")
def header(tiny_header):
    """The header of `quantized`."""
    return replace(tiny_header, scheme=SCHEME, fused="eval", quantized=True)


def test_the_int8_file_gives_the_same_logits_with_torch_alone(quantized, val_inputs, engine, tmp_path):
    with torch.inference_mode(), use_engine(engine):
        expected = native.to_native(quantized)(val_inputs)
    (tmp_path / "model.pt").write_bytes(scripting.script(quantized, engine, SHAPE))
    torch.save(val_inputs, tmp_path / "inputs")
    arguments = [tmp_path / name for name in ("model.pt", "inputs", "logits")]

    # -I: neither the working folder nor the user's packages are on the path. -W: torch.jit is announced for removal.
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", _SERVE, *arguments], check=True, cwd=tmp_path)

    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), expected)


def test_a_float_file_gives_the_same_logits(fused_model, val_inputs, tmp_path):
    (tmp_path / "model.pt").write_bytes(scripting.script(fused_model, None, SHAPE))

    model = api.load(tmp_path / "model.pt")

    with torch.inference_mode():
        torch.testing.assert_close(model(val_inputs), fused_model(val_inputs), rtol=1e-5, atol=1e-5)


def test_scripting_leaves_the_model_as_it_was(quantized, fused_model, val_inputs, engine):
    with torch.inference_mode():
        before = quantized(val_inputs), fused_model(val_inputs)
    scripting.script(quantized, engine, SHAPE)
    scripting.script(fused_model, None, SHAPE)
    with torch.inference_mode():
        assert torch.equal(quantized(val_inputs), before[0])
        assert torch.equal(fused_model(val_inputs), before[1])


def test_the_file_has_the_same_bytes_each_time(fused_model, quantized, engine):
    assert scripting.script(quantized, engine, SHAPE) == scripting.script(quantized, engine, SHAPE)
    assert scripting.script(fused_model, None, SHAPE) == scripting.script(fused_model, None, SHAPE)


_SCRIPT = """
import hashlib, pathlib, sys, warnings
import torch
from torch import nn
from quantlib.export import scripting
from quantlib.quantize import stored
warnings.simplefilter("ignore")
torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1)))
model, header = stored.open_model(pathlib.Path(sys.argv[1]).read_bytes())
content = scripting.script(model, sys.argv[2], header.input_shape)
print(hashlib.sha256(content).hexdigest())
"""


def test_the_file_has_the_same_bytes_in_a_process_that_did_other_things(quantized, header, engine, tmp_path):
    (tmp_path / "model").write_bytes(checkpoint.save(quantized, header))
    other = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tmp_path / "model", engine],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert other.stdout.strip() == hashlib.sha256(scripting.script(quantized, engine, SHAPE)).hexdigest()


def test_a_calibrated_model_just_made_and_the_same_read_back_give_the_same_bytes(quantized, header, engine):
    read_back, _ = stored.open_model(checkpoint.save(quantized, header))

    assert scripting.script(quantized, engine, SHAPE) == scripting.script(read_back, engine, SHAPE)


def test_a_trained_model_just_made_and_the_same_read_back_give_the_same_bytes(tiny_model, header, val_inputs, engine):
    trained = preparation.prepare_qat(fusion.fuse_model(trace_model(tiny_model, SHAPE), "qat"), SCHEME)
    trained(val_inputs)
    just_made = conversion.convert(trained, SCHEME)
    read_back, _ = stored.open_model(checkpoint.save(just_made, replace(header, fused="qat")))

    assert scripting.script(just_made, engine, SHAPE) == scripting.script(read_back, engine, SHAPE)


def test_a_float_model_just_made_and_the_same_read_back_give_the_same_bytes(fused_model, tiny_header):
    read_back, _ = stored.open_model(checkpoint.save(fused_model, replace(tiny_header, fused="eval")))

    assert scripting.script(fused_model, None, SHAPE) == scripting.script(read_back, None, SHAPE)


def test_the_engine_in_use_is_put_back(quantized, engine):
    before = torch.backends.quantized.engine
    other = next(e for e in torch.backends.quantized.supported_engines if e not in {before, "none"})

    scripting.script(quantized, other, SHAPE)

    assert torch.backends.quantized.engine == before


def test_an_engine_that_this_machine_lacks_is_refused(quantized):
    with pytest.raises(MachineError, match="'tensorrt' is not available"):
        scripting.script(quantized, "tensorrt", SHAPE)


class Branching(nn.Module):
    """Its forward depends on the values that it sees."""

    def forward(self, x):
        return 2 * x if bool(x.sum() > 0) else -x


def test_a_module_taken_as_a_whole_keeps_its_branches(engine):
    torch.manual_seed(0)
    model = small(nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), Branching()))
    x = torch.randn(1, *SMALL)
    observed = preparation.observe(model, ())
    observed(torch.cat([x, -x]))
    calibration.choose_ranges(observed, SCHEME)
    int8 = conversion.convert(observed, SCHEME)

    for made, content in (
        (model, scripting.script(model, None, SMALL)),
        (int8, scripting.script(int8, engine, SMALL)),
    ):
        with torch.inference_mode(), use_engine(engine):
            positive, negative = (loaded(content)(each) for each in (x, -x))
            assert noise(made(x), positive) < 0.01
            assert noise(made(-x), negative) < 0.01
        # Of the two, one was doubled.
        assert abs(float((positive.norm() / negative.norm()).log2())) == pytest.approx(1, abs=0.1)


def test_what_torchscript_is_too_strict_for_is_recorded():
    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return nn.functional.leaky_relu(self.conv(x), 2).flatten(1)  # Its slope should be a float.

    torch.manual_seed(0)
    model = small(Leaky())
    with pytest.raises(RuntimeError, match="Expected a value of type 'float'"):
        torch.jit.script(model)

    recorded = loaded(scripting.script(model, None, SMALL))

    for number in (1, 5):
        x = torch.randn(number, *SMALL)
        torch.testing.assert_close(recorded(x), model(x))


class Annotated(nn.Module):
    """Branches, and has an annotation that TorchScript does not know."""

    module: "nn.Module"

    def __init__(self):
        super().__init__()
        self.module = nn.ReLU()

    def forward(self, x):
        return self.module(x) if bool(x.sum() > 0) else -x


class Unscriptable(nn.Module):
    """Branches, and uses Python that TorchScript does not know."""

    def forward(self, x):
        return globals()["torch"].relu(x) if bool(x.sum() > 0) else x


@pytest.mark.parametrize("kind", [Unscriptable, Annotated])
def test_what_cannot_be_scripted_is_refused(kind):
    model = small(nn.Sequential(nn.Conv2d(3, 4, 1), kind()))

    with pytest.raises(ModelError, match=r"cannot be written as TorchScript: \S"):
        scripting.script(model, None, SMALL)


class Failing(nn.Module):
    """Runs on no image of this size."""

    def forward(self, x):
        return x.view(7, -1)


def test_a_file_that_does_not_run_is_refused_when_it_is_tried_out(monkeypatch, quantized, engine):
    # Some kernels refuse what others compute, and only as they run.
    monkeypatch.setattr(native, "to_native", lambda model: fx.symbolic_trace(Failing()))

    content = scripting.script(quantized, engine, SHAPE)
    with pytest.raises(ModelError, match=r"cannot be written as TorchScript: .*shape '\[7, -1\]' is invalid"):
        scripting.try_out(content, engine, SHAPE)


def test_a_torch_without_its_own_int8_is_refused(monkeypatch, fused_model):
    monkeypatch.setitem(sys.modules, "quantlib.export.native", None)
    monkeypatch.delattr("quantlib.export.native")

    with pytest.raises(ModelError, match="This torch has no TorchScript"):
        scripting.script(fused_model, None, SHAPE)
