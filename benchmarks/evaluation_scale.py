"""Evaluation: time and peak memory for 50,000 images against 5,000, decoding included.

    python benchmarks/evaluation_scale.py --data imagenet-sample
    python benchmarks/evaluation_scale.py --data cifar10 --side 32 --variants 10

Each runs in its own process, which decodes the images into shards, then evaluates int8 models on them, as the stages
`decode` and `evaluate` do: MobileNetV2, or below 64 px one of three blocks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import end_to_end
import numpy as np
import pairs
import torch

from quantlib import api, process
from quantlib.data import datasets, loading, shards
from quantlib.data.normalization import IMAGENET
from quantlib.data.transforms import EvalTransform
from quantlib.measure import evaluation
from quantlib.models import mobilenet_v2

# As in flows.graphs.shared_stages.
SHARD_BYTES, SHARD_IMAGES = 256 << 20, 5000
SMALL = {"inverted_residual_setting": [[1, 16, 1, 2], [4, 24, 1, 2], [4, 32, 1, 2]]}


def evaluate(root: Path, num_images: int, side: int, num_variants: int) -> dict[str, float]:
    """Seconds and peak resident memory in MB of this process."""
    process.prepare_process()
    start = time.perf_counter()
    split = datasets.open_split("imagefolder", str(root), "val")
    transform = EvalTransform(resize=side * 256 // 224 if side > 64 else side, crop=(side, side))
    size = min(SHARD_IMAGES, SHARD_BYTES // (3 * side * side))
    found = []
    for first in range(0, num_images, size):
        indices = np.arange(first, min(first + size, num_images))
        with (root / "shard").open("wb") as file:
            shards.save(loading.decode(split, indices, transform, seed=0), split.labels[indices], IMAGENET, file)
        for number in range(num_variants):
            path = root / f"int8-{number}.pt"
            found.append(evaluation.evaluate_file(path, "torchscript", root / "shard", 50))
    return {"seconds": time.perf_counter() - start, "megabytes": pairs.peak_megabytes()}


def save_int8(place: Path, side: int) -> None:
    """An int8 MobileNetV2 with random weights."""
    torch.manual_seed(0)
    model = mobilenet_v2.mobilenet_v2(**(SMALL if side < 64 else {})).eval()
    api.quantize(model, [torch.randn(2, 3, side, side)], observer="minmax", activation_bits=8).save(place)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--variants", type=int, default=1)
    arguments = parser.parse_args()
    process.prepare_process()
    with tempfile.TemporaryDirectory() as name:
        roots = {}
        for count in (5000, 50000):
            roots[count] = end_to_end.repeat_validation(arguments.data.resolve(), Path(name) / f"{count}", count)
            for number in range(arguments.variants):
                save_int8(roots[count] / f"int8-{number}.pt", arguments.side)
        found: dict[int, list[dict[str, float]]] = {count: [] for count in roots}

        def run(count: int) -> float:
            child = (sys.executable, "-W", "ignore", __file__, "--child", roots[count], count)
            command = [str(part) for part in (*child, arguments.side, arguments.variants)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[count].append(json.loads(done.stdout))
            return found[count][-1]["seconds"]

        sides = {f"{count} images, seconds": lambda count=count: run(count) for count in roots}
        samples = pairs.in_turn(sides, arguments.rounds)
    for count, measured in found.items():
        samples[f"{count} images, peak MB"] = [one["megabytes"] for one in measured]
    few, many = ("5000 images", "50000 images")
    ratios = {
        f"{kind}: 50,000 / 5,000": pairs.ratio(samples, f"{many}, {kind}", f"{few}, {kind}")
        for kind in ("seconds", "peak MB")
    }
    pairs.conclude("evaluation scale", "measured", samples, ratios)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(evaluate(Path(sys.argv[2]), *map(int, sys.argv[3:]))))
    else:
        main()
