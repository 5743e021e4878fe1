"""The program of ExecuTorch: computed by XNNPACK, for one image at a time."""

import subprocess
import sys
import zipfile

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib import api
from quantlib.errors import MachineError, ModelError
from quantlib.export import executorch, torch_export
from quantlib.quantize import conversion
from quantlib.runtimes import classifiers
from quantlib.runtimes.available import is_installed

SHAPE = (3, 32, 32)
needs_executorch = pytest.mark.skipif(not is_installed("executorch"), reason="ExecuTorch is not installed")


@pytest.fixture(scope="module")
def quantized(calibrated):
    """The trained net, quantized; read-only."""
    return conversion.convert(calibrated("accurate"), scheme("accurate"))


@pytest.fixture(scope="module")
def content(quantized):
    """Its program."""
    return executorch.write(quantized, SHAPE)


def noise(expected, got):
    return float((expected - got).square().sum() / expected.square().sum())


@needs_executorch
def test_a_program_answers_as_its_model_and_the_same_model_gives_the_same_bytes(
    quantized, content, val_inputs, tmp_path
):
    (tmp_path / "net.pte").write_bytes(content)
    model = classifiers.open_model(tmp_path / "net.pte", "executorch", num_threads=1)
    with torch.inference_mode():
        expected = quantized(val_inputs)
    for x, own in ((val_inputs, expected), (val_inputs[:1], expected[:1])):
        assert noise(own, model(x)) < 1e-3
    assert executorch.write(quantized, SHAPE) == content
    # In float, the weights alone take four bytes each.
    assert len(content) < 0.6 * 4 * sum(value.numel() for value in quantized.state_dict().values())


@needs_executorch
def test_a_file_at_the_end_is_found_and_changes_no_answer(content, val_inputs, tmp_path):
    answers = []
    for number, own in enumerate((content, executorch.add_file(content, "about.json", b"{}"))):
        (tmp_path / f"{number}.pte").write_bytes(own)
        answers.append(classifiers.open_model(tmp_path / f"{number}.pte", "executorch")(val_inputs))
    assert torch.equal(*answers)
    assert executorch.find_file(own, "about.json") == b"{}"
    assert executorch.find_file(own, "other.json") is executorch.find_file(content, "about.json") is None
    with zipfile.ZipFile(tmp_path / "1.pte") as archive:
        assert archive.namelist() == ["about.json"]


@needs_executorch
def test_several_sizes_of_values_are_joined_on_one_grid(tmp_path):
    class Joining(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 3, 3)
            self.two.weight.data.mul_(20)

        def forward(self, x):
            return self.head(torch.cat([self.one(x), self.two(x)], 1)).mean((2, 3))

    torch.manual_seed(0)
    x = torch.randn(8, *SHAPE)
    joined = api.quantize(Joining().eval(), [x])
    joined.save(tmp_path / "net.pte")
    assert noise(joined(x), api.load(tmp_path / "net.pte")(x)) < 1e-3


@needs_executorch
def test_writing_and_loading_print_nothing(tmp_path):
    code = f"""
from quantlib.process import prepare_process
prepare_process()
import torch
from quantlib import api
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
api.quantize(model, [torch.randn(4, 3, 8, 8)]).save({str(tmp_path / "net.pte")!r})
api.load({str(tmp_path / "net.pte")!r}, num_threads=1)(torch.randn(2, 3, 8, 8))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@needs_executorch
def test_a_program_that_is_cut_short_does_not_load(content, tmp_path):
    (tmp_path / "net.pte").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="does not load in executorch"):
        classifiers.open_model(tmp_path / "net.pte", "executorch")


@needs_executorch
def test_what_executorch_cannot_express_is_refused_with_the_reason(quantized, monkeypatch):
    exir = pytest.importorskip("executorch.exir")

    def refuse(*_, **__):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(exir, "to_edge_transform_and_lower", refuse)
    with pytest.raises(ModelError, match=r"^The model cannot be written for ExecuTorch: no such operator"):
        executorch.write(quantized, SHAPE)


def test_without_executorch_an_error_says_what_to_install(quantized, monkeypatch):
    def fail(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(executorch, "import_module", fail)
    monkeypatch.setattr(torch_export, "program", lambda *_, **__: None)
    with pytest.raises(MachineError, match=r"ExecuTorch cannot be used: .*pip install 'quantflow\[executorch\]'"):
        executorch.write(quantized, SHAPE)
