"""The tutorial's figures, on real images and trained weights (../shared); takes minutes."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from flows.cli.outcome import NO_WINNER

# Top-1 on 5,000 CIFAR-10 validation images: the expected value and its tolerance.
FIGURES = {
    "mobilenet_v2_cifar10_64px": {"float": (0.8332, 1e-9), "minmax": (0.8310, 0.01), "per_channel": (0.8348, 0.01)},
    "mobilenet_v2_cifar10_64px_uneven": {
        "float": (0.8332, 1e-9),
        "minmax": (0.475, 0.125),
        "per_channel": (0.8058, 0.015),
    },
}
SIZES_MB = {"float": 8.918, "minmax": 2.350, "per_channel": 2.644}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("weights", FIGURES)
def test_the_tutorials_recipe_gives_the_tutorials_figures(weights, shared, tmp_path):
    home = tmp_path / "home"
    command = [sys.executable, "-m", "flows.cli.commands", "run", "cifar10", "--home", home, "--set", "qat.0.epochs=2"]
    settings = [f"data.root={shared('data/cifar10')}", f"model.weights={shared(f'weights/{weights}.pth')}"]
    settings.append('gate.runtimes=["torchscript"]')
    done = subprocess.run([*command, *(part for s in settings for part in ("--set", s))], check=False)
    assert done.returncode in {0, NO_WINNER}
    variants = pd.read_parquet(home / "reports" / "variants").set_index("variant")
    for name, (top1, tolerance) in FIGURES[weights].items():
        assert variants.top1[name] == pytest.approx(top1, abs=tolerance), name
        assert variants.num_images[name] == 5000
        assert variants.size_bytes[name] == pytest.approx(SIZES_MB[name] * 1e6, rel=0.02), name
    epochs = pd.read_parquet(home / "reports" / "epochs")
    # Epochs are evaluated on torch's own engine, the file to ship on its fastest one.
    assert variants.top1["qat"] == pytest.approx(epochs.top1.max(), abs=0.003)
    # The cost of the tutorial's training transform on these weights.
    assert variants.top1["qat"] == pytest.approx(0.79 if weights.endswith("64px") else 0.7736, abs=0.03)
    _check_plain_load(variants.loc["per_channel"], shared("data/cifar10"))


def _check_plain_load(variant, data):
    code = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torchvision
from torchvision import transforms as T
normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
transform = T.Compose([T.Resize(64), T.CenterCrop(64), T.ToTensor(), normalize])
images = torchvision.datasets.ImageFolder(sys.argv[2], transform)
# Weights are packed for the engine when the file is loaded.
torch.backends.quantized.engine = sys.argv[3].partition("-")[2]
model = torch.jit.load(sys.argv[1])
with torch.inference_mode():
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in torch.utils.data.DataLoader(images, 50))
print(json.dumps(right / len(images)))
"""
    arguments = [sys.executable, "-c", code, variant.artifact_path, data / "val", variant.runtime]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(variant.top1, abs=1e-9)
