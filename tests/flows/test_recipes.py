"""The ready recipes run: with random weights, on a few real images."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dashboard_driver import own_environment
from torch import nn
from torchvision import models

from quantlib.recipe.file import load_recipe
from quantlib.recipe.sections import TORCHVISION
from quantlib.report import tables

IMAGES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-sample"
RECIPES = Path(__file__).parents[2] / "recipes"


def _settled(model):
    """A model with statistics in BatchNorm, without which its answers would hardly depend on the image."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(4, 3, 224, 224))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("imagenet_*.toml")))
def test_a_recipe_for_a_model_of_torchvision_runs(tmp_path, name):
    if not IMAGES.is_dir():
        pytest.skip(f"needs the images in {IMAGES}")
    recipe = load_recipe(RECIPES / f"{name}.toml")
    builder = recipe.model.architecture.removeprefix(TORCHVISION)
    published = models.get_model_weights(builder)[recipe.model.weights.removeprefix(TORCHVISION)]
    assert published.meta["categories"]
    num_classes = len(list((IMAGES / "val").iterdir()))
    torch.save(_settled(models.get_model(builder, num_classes=num_classes)).state_dict(), tmp_path / "random.pth")
    changes = {
        "model.weights": tmp_path / "random.pth",
        "data.format": "imagefolder",
        "data.root": IMAGES,
        "evaluation.max_images": 20,
        "evaluation.num_held_out": 20,
        "calibration.batch_size": 8,
        "calibration.num_batches": 2,
        "benchmark.num_samples": 10,
        "gate.max_top1_drop": 1.0,
        "gate.min_speedup": 0,
    }
    settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    ended = subprocess.run(
        [sys.executable, "-m", "flows.cli.commands", "run", name, "--home", "home", *settings],
        check=False,
        capture_output=True,
        text=True,
        timeout=540,
        cwd=tmp_path,
        env=own_environment(),
    )
    assert ended.returncode == 0, ended.stderr
    rows = [row for _, row in tables.read_variants(tmp_path / "home" / "reports")]
    assert [row.variant for row in rows] == ["float", "accurate"]
    assert rows[1].winner
    assert rows[1].onnx_refusal is None
    assert rows[1].torchscript_refusal is None
    assert rows[1].int8_share > 0.85
    assert f"{rows[1].int8_share:.1%} of the multiply-adds are int8." in ended.stdout
