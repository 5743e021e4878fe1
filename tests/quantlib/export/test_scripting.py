"""The TorchScript file that is shipped."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib import api
from quantlib.errors import ModelError
from quantlib.export import scripting
from quantlib.graph import fusion
from quantlib.models import checkpoint
from quantlib.quantize import calibration, conversion, preparation, stored
from quantlib.runtimes.engine import use_engine

Calibrated = Callable[[str], nn.Module]

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


def test_the_int8_file_gives_the_same_logits_with_torch_alone(calibrated, val_inputs, engine, tmp_path):
    int8 = conversion.convert(calibrated("fbgemm"), engine)
    with torch.inference_mode(), use_engine(engine):
        expected = int8(val_inputs)
    (tmp_path / "model.pt").write_bytes(scripting.script(int8, engine))
    torch.save(val_inputs, tmp_path / "inputs")
    arguments = [tmp_path / name for name in ("model.pt", "inputs", "logits")]

    # -I: neither the working folder nor the user's packages are on the path. -W: torch.jit is announced for removal.
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", _SERVE, *arguments], check=True, cwd=tmp_path)

    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), expected)


def test_a_float_file_gives_the_same_logits(fused_model, val_inputs, tmp_path):
    (tmp_path / "model.pt").write_bytes(scripting.script(fused_model))

    loaded = api.load(tmp_path / "model.pt")

    with torch.inference_mode():
        torch.testing.assert_close(loaded(val_inputs), fused_model(val_inputs), rtol=1e-5, atol=1e-5)


def test_the_file_has_the_same_bytes_each_time(fused_model, calibrated, engine):
    int8 = conversion.convert(calibrated("default"), engine)

    assert scripting.script(int8, engine) == scripting.script(int8, engine)
    assert scripting.script(fused_model) == scripting.script(fused_model)


_SCRIPT = """
import hashlib, pathlib, sys, warnings
import torch
from torch import nn
from quantlib.export import scripting
from quantlib.quantize import stored
warnings.simplefilter("ignore")
torch.jit.script(nn.Sequential(nn.Linear(1, 1), nn.Conv2d(1, 1, 1)))
model, header = stored.open_model(pathlib.Path(sys.argv[1]).read_bytes())
content = scripting.script(model, header.engine)
print(hashlib.sha256(content).hexdigest())
"""


def test_the_file_has_the_same_bytes_in_a_process_that_did_other_things(calibrated, tiny_header, engine, tmp_path):
    int8 = conversion.convert(calibrated("fbgemm"), engine)
    header = replace(tiny_header, scheme=scheme("fbgemm"), fused="eval", engine=engine)
    (tmp_path / "model").write_bytes(checkpoint.save(int8, header))
    other = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tmp_path / "model"],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert other.stdout.strip() == hashlib.sha256(scripting.script(int8, engine)).hexdigest()


@pytest.mark.parametrize("mode", ["eval", "qat"])
def test_a_model_just_made_and_the_same_read_back_give_the_same_bytes(
    tiny_model, tiny_header, train_shard, engine, mode
):
    prepared = preparation.prepare(fusion.fuse_model(tiny_model, mode), scheme("fbgemm"), mode)
    calibration.calibrate(prepared, train_shard, batch_size=36)
    header = replace(tiny_header, scheme=scheme("fbgemm"), fused=mode, engine=engine)
    just_made = conversion.convert(prepared, engine)
    read_back, _ = stored.open_model(checkpoint.save(just_made, header))

    assert scripting.script(just_made, engine) == scripting.script(read_back, engine)


def test_the_engine_in_use_is_put_back(calibrated, engine):
    before = torch.backends.quantized.engine
    scripting.script(conversion.convert(calibrated("default"), engine), engine)

    assert torch.backends.quantized.engine == before


def test_an_architecture_that_cannot_be_scripted_is_refused():
    class Unscriptable(nn.Module):
        def forward(self, x):
            return globals()["torch"].relu(x)

    with pytest.raises(ModelError, match=r"cannot be scripted.*"):
        scripting.script(Unscriptable())
