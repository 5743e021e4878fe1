"""quantflow against the tutorial's script, from process start to the report, on an empty store.

    python benchmarks/end_to_end.py imagenet --tutorial tutorial.py --data imagenet-sample
    python benchmarks/end_to_end.py cifar10 --tutorial tutorial.py --data cifar10 --weights cifar10.pth
    python benchmarks/end_to_end.py many --tutorial tutorial.py --data imagenet-sample

`imagenet`: 224 px, 8 calibration batches, 2 epochs of 5 batches. `defaults`: the same, but quantflow also writes and
evaluates ONNX files, and times every runtime, as it does by default. `cifar10`: 64 px and the tutorial's own settings.
`many`: like `imagenet`, with 5,000 validation images (the files repeated) and 8 epochs of one batch, so they are
evaluated 11 times. Both sides evaluate, calibrate and train on the same numbers of images.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import pairs
import torch

from quantlib.models import mobilenet_v2

QUESTIONS = {
    "imagenet": {"resize": 256, "crop": 224, "calibration": 8, "epochs": 2, "batches": 5, "images": None},
    "cifar10": {"resize": 64, "crop": 64, "calibration": 32, "epochs": 8, "batches": 20, "images": None},
    "defaults": {"resize": 256, "crop": 224, "calibration": 8, "epochs": 2, "batches": 5, "images": None},
    "many": {"resize": 256, "crop": 224, "calibration": 8, "epochs": 8, "batches": 1, "images": 5000},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--tutorial", type=Path, required=True, help="the tutorial as a script")
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--weights", type=Path, help="a state_dict; absent: random weights")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = QUESTIONS[arguments.question]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = arguments.data.resolve()
        if settings["images"]:
            data = repeat_validation(data, folder / "data", settings["images"])
        num_classes = sum(1 for _ in (data / "train").iterdir())
        weights = arguments.weights or random_weights(folder / "weights.pth", num_classes)
        sides = {
            "tutorial": lambda: pairs.seconds(
                tutorial(arguments.tutorial, data, weights, num_classes, settings, folder)
            ),
            "quantflow": lambda: pairs.seconds(
                quantflow(data, weights, settings, folder, arguments.question == "defaults")
            ),
        }
        samples = pairs.in_turn(sides, arguments.rounds)
    pairs.conclude(
        f"end to end {arguments.question}",
        "seconds",
        samples,
        {"tutorial / quantflow": pairs.ratio(samples, "tutorial", "quantflow")},
    )


def tutorial(script: Path, data: Path, weights: Path, num_classes: int, settings: dict, folder: Path) -> list[object]:
    """The tutorial's command."""
    return [
        *(sys.executable, script, "--data", data, "--weights", weights, "--out", folder / "tutorial"),
        *("--num-classes", num_classes, "--resize", settings["resize"], "--crop", settings["crop"]),
        *("--calibration-batches", settings["calibration"], "--epochs", settings["epochs"]),
        *("--train-batches", settings["batches"]),
    ]


def quantflow(data: Path, weights: Path, settings: dict, folder: Path, by_default: bool) -> list[object]:
    """Command that runs quantflow on a new home; the gate is open, because random weights have no accuracy to lose."""
    home = folder / "home"
    shutil.rmtree(home, ignore_errors=True)
    changes = {
        "data.root": data,
        "model.weights": weights,
        "data.resize": settings["resize"],
        "data.crop": settings["crop"],
        "calibration.num_batches": settings["calibration"],
        "qat.0.epochs": settings["epochs"],
        "qat.0.batches_per_epoch": settings["batches"],
        "gate.max_top1_drop": 1.0,
        "benchmark.batch_sizes": [1],
    }
    like_the_tutorial = {
        # TorchScript alone, like the tutorial. That times 5 batches of 50 images for two models; this, 10 single images
        # for four models, three of them on each engine.
        "benchmark.runtimes": '["torchscript"]',
        "benchmark.num_samples": 10,
    }
    changes |= {} if by_default else like_the_tutorial
    command = [sys.executable, "-m", "flows.cli.commands", "run", "cifar10", "--home", home]
    return [*command, *(part for key, value in changes.items() for part in ("--set", f"{key}={value}"))]


def repeat_validation(data: Path, place: Path, num_images: int) -> Path:
    """A dataset that links to the same training images, and to the validation images over and over."""
    place.mkdir()
    (place / "train").symlink_to(data / "train")
    files = sorted((data / "val").glob("*/*"))
    for number in range(num_images):
        file = files[number % len(files)]
        folder = place / "val" / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:06}{file.suffix}").symlink_to(file)
    return place


def random_weights(place: Path, num_classes: int) -> Path:
    """An untrained state_dict; BatchNorm has seen noise, without which activations would vanish layer by layer."""
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(num_classes).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 64, 64))
    torch.save(model.state_dict(), place)
    return place


if __name__ == "__main__":
    main()
