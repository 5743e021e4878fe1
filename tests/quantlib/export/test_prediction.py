"""The order of a shipped model's answers."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rows import file_info, model_info

from quantlib.export import bundle, folder, prediction
from quantlib.runtimes import classifiers

# Classes 3 and 7 tie. 30 is likelier than the rest, which tie, by less than a probability can show.
LOGITS = np.full((1, 40), -200, np.float32)
LOGITS[0, [3, 7, 30]] = 5, 5, -199
ORDER = ["3", "7", "30", "0", "1"]


@pytest.fixture
def place(tmp_path):
    """A bundle without its file, and an image."""
    info = model_info(file_info(name="a.pt", runtime="torchscript"), classes=list(map(str, range(40))))
    (tmp_path / "model.json").write_bytes(bundle.document(info))
    (tmp_path / "predict.py").write_bytes(Path(folder.__file__).with_name("predict.py").read_bytes())
    Image.new("RGB", (224, 224)).save(tmp_path / "a.png")
    return tmp_path


def test_ties_go_to_the_lower_class_and_close_answers_keep_their_order(place, monkeypatch):
    monkeypatch.setattr(classifiers, "open_model", lambda *_: lambda _: torch.from_numpy(LOGITS))
    (found,) = prediction.Predictor(place).predict([str(place / "a.png")])
    assert found.classes == ORDER
    assert found.probabilities[:2] == pytest.approx([0.5, 0.5])


def test_the_script_of_a_bundle_puts_them_in_the_same_order(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict.py", str(place / "a.png")])
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    monkeypatch.setattr(torch.jit, "load", lambda _: torch.nn.Identity())
    monkeypatch.setattr(torch.jit, "optimize_for_inference", lambda _: lambda _: torch.from_numpy(LOGITS))
    runpy.run_path(str(place / "predict.py"), run_name="__main__")
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ORDER
