"""quantflow against ONNX Runtime's, NNCF's and torchao's own quantization: each a process, on the same images, in turn.

    pip install nncf torchao
    ORT_DISABLE_TELEMETRY=1 python benchmarks/against.py torchvision:resnet18 --weights resnet18.pth --data cifar10 \
        --resize 32 --crop 32

MODEL is a recipe's `model.architecture`. The others run as plain scripts, contestants.py; quantflow runs a recipe with
one default PTQ branch and one ONNX runtime, on an empty home, with Prefect. All start from the float model's weights,
calibrate on the same images, write int8 files, and measure the accuracy of float and int8 on the same JPEG files.

Seconds are from the process's start to its end; processor time depends less on what else the machine does. The peak is
that of the largest process. Accuracy and latency are
measured afterwards, of all files alike: on one thread, one call of each in turn. A contestant that is not installed is
named and left out; `--python nncf=PATH` gives it an interpreter of its own, which must have torch and torchvision, too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import contestants
import end_to_end
import numpy as np
import pairs
import pyarrow.parquet as pq
import torch
from contestants import CONTESTANTS, Job

SCRIPT = Path(contestants.__file__)
OURS = {f"quantflow-{runtime}": runtime for runtime in ("onnxruntime", "openvino")}
CALIBRATION_BATCH = 30
NUM_CALLS = {1: 200, 32: 20}
"""Timed calls by batch size."""


@dataclass(frozen=True)
class File:
    """A file that was written, and what opens it."""

    path: Path
    runtime: str
    python: str

    def parts(self) -> list[Path]:
        """OpenVINO's weights are beside the graph."""
        return (
            [self.path, *self.path.parent.glob(f"{self.path.stem}.bin")] if self.path.suffix == ".xml" else [self.path]
        )


@dataclass(frozen=True)
class Ended:
    """What a process took."""

    seconds: float
    cpu_seconds: float
    """Summed over its cores, with the processes that it waited for."""
    megabytes: float
    log: str


def run(command: Sequence[object], log: Path, environment: dict[str, str], allowed: tuple[int, ...] = (0,)) -> Ended:
    """Run a process to its end; what it prints is shown if it fails."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        # The largest of its own peak, that of a process which it waited for, and this process's, which it inherits: all
        # of them import torch, too.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode not in allowed:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-3000:]}")
    return Ended(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, log.read_text())


def run_contestant(name: str, job: Job, python: str) -> tuple[Ended, File]:
    """Quantize with a plain script, in a new folder."""
    folder = Path(job.folder)
    # torchao's compiled code would be taken from the last round otherwise.
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    ended = run([python, "-W", "ignore", SCRIPT, name, job.save()], folder / "log", environment)
    _, _, runtime, file = CONTESTANTS[name]
    return ended, File(folder / file, runtime, python)


def run_quantflow(runtime: str, job: Job, num_calibration: int) -> tuple[Ended, File]:
    """Run a recipe on an empty home."""
    folder = Path(job.folder)
    (folder / "recipe.toml").write_text(recipe(runtime, job, num_calibration))
    home = folder / "home"
    command = [sys.executable, "-m", "flows.cli.commands", "run", folder / "recipe.toml", "--home", home]
    # The gate is open: there is a winner unless quantflow refuses to write the file.
    ended = run(command, folder / "log", {"PYTHONPATH": str(SCRIPT.parents[1])})
    stages = pq.read_table(home / "reports" / "stages").to_pylist()
    lines = [f"    {row['seconds']:8.2f} s  {row['stage']}" for row in stages]
    rest = ended.seconds - sum(row["seconds"] for row in stages)
    log = "\n".join([*lines, f"    {rest:8.2f} s  outside of stages: imports, Prefect, the report", ""])
    files = pq.read_table(home / "reports" / "files").to_pylist()
    (path,) = (row["path"] for row in files if row["variant"] == "ptq" and row["runtime"] == runtime)
    return replace(ended, log=log), File(Path(path), runtime, sys.executable)


def recipe(runtime: str, job: Job, num_calibration: int) -> str:
    """A recipe that does no more than the scripts: one branch, one runtime, no images held out, few timings."""
    arguments = ", ".join(f"{key} = {json.dumps(value)}" for key, value in job.arguments.items())
    return f"""name = "against"
[model]
architecture = "{job.architecture}"
arguments = {{ {arguments} }}
weights = "{job.weights}"
[data]
format = "imagefolder"
root = "{job.data}"
resize = {job.resize}
crop = {job.crop}
interpolation = "bilinear"
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
[evaluation]
select_on = "validation"
num_examples = 0
[calibration]
batch_size = {CALIBRATION_BATCH}
num_batches = {num_calibration // CALIBRATION_BATCH}
[[ptq]]
name = "ptq"
[benchmark]
runtimes = ["{runtime}"]
num_samples = 10
[gate]
runtimes = ["{runtime}"]
max_top1_drop = 1.0
min_speedup = 0
"""


def link_images(source: Path, place: Path, num_images: int) -> None:
    """Links to images of a split, drawn at random: each class has as many as the others, or one more."""
    draw = random.Random(0)
    classes = sorted(folder for folder in source.iterdir() if folder.is_dir())
    if num_images < len(classes):
        sys.exit(f"{num_images} images of {source} were asked for, and it has {len(classes)} classes: ask for more.")
    files = {folder: sorted(folder.iterdir()) for folder in classes}
    for each in files.values():
        draw.shuffle(each)
    for number in range(num_images):
        folder = classes[number % len(classes)]
        # A small data set's images are repeated.
        file = files[folder][number // len(classes) % len(files[folder])]
        (place / folder.name).mkdir(parents=True, exist_ok=True)
        (place / folder.name / f"{number:06}{file.suffix}").symlink_to(file.resolve())


def measure(files: dict[str, File], job: Path) -> tuple[dict[str, np.ndarray], dict[int, pairs.Samples]]:
    """Logits on the validation images, and milliseconds per call by batch size; each file has a process of its own."""
    order = random.Random(0)
    timings: dict[int, pairs.Samples] = {batch_size: {name: [] for name in files} for batch_size in NUM_CALLS}
    with ExitStack() as stack:
        opened = {}
        for name, file in files.items():
            command = [file.python, "-W", "ignore", SCRIPT, "open", file.runtime, file.path, job]
            environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            opened[name] = stack.enter_context(subprocess.Popen(list(map(str, command)), env=environment, **pipes))
            while "ready" not in (line := opened[name].stdout.readline()):  # One opens at a time.
                if not line:
                    sys.exit(f"{name}: {file.path} does not open in {file.runtime}.")
        for batch_size, num_calls in NUM_CALLS.items():
            for number in range(num_calls + 1):
                for name in order.sample(list(opened), len(opened)):
                    print(batch_size, file=opened[name].stdin, flush=True)
                    milliseconds = float(opened[name].stdout.readline())
                    if number:  # The first call of a size may compile.
                        timings[batch_size][name].append(milliseconds)
        for process in opened.values():
            process.stdin.close()
    return {name: np.load(f"{file.path}.npy") for name, file in files.items()}, timings


def compared(logits: np.ndarray, expected: np.ndarray, labels: np.ndarray) -> str:
    """Top-1; how many images get the class that float gives them; signal to quantization noise of the logits."""
    found = logits.argmax(1)
    noise = float(np.square(logits - expected).sum())
    sqnr = 10 * math.log10(float(np.square(expected).sum()) / noise) if noise else math.inf
    return f"{(found == labels).mean():8.2%} {(found == expected.argmax(1)).mean():9.2%} {sqnr:8.1f} dB"


def available(wanted: Sequence[str], pythons: dict[str, str]) -> dict[str, str]:
    """The interpreter of each contestant that can be imported; the others are named."""
    found = {}
    for name in wanted:
        package = CONTESTANTS[name][1] if name in CONTESTANTS else OURS[name]
        found[name] = pythons.get(package, sys.executable) if name in CONTESTANTS else sys.executable
        done = subprocess.run([found[name], "-c", f"import {package}"], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  {name} is left out: {done.stderr.strip().splitlines()[-1]}")
            del found[name]
    return found


def run_all(names: Sequence[str], pythons: dict[str, str], job: Job, options: argparse.Namespace) -> dict[str, File]:
    """Run each in turn, round after round; print what the last took, and return the last round's files."""
    ended: dict[str, list[Ended]] = {name: [] for name in names}
    files: dict[str, File] = {}

    def once(name: str) -> float:
        own = replace(job, folder=str(Path(job.folder) / f"{name}-{len(ended[name])}"))
        Path(own.folder).mkdir()
        if name in CONTESTANTS:
            found, files[name] = run_contestant(name, own, pythons[name])
        else:
            found, files[name] = run_quantflow(OURS[name], own, options.num_calibration)
        ended[name].append(found)
        return found.seconds

    seconds = pairs.in_turn({name: partial(once, name) for name in names}, options.rounds)
    for name, found in ended.items():
        print(f"\n  {name}, last round\n{found[-1].log}", end="")
    for question, unit, samples in (
        ("time", "seconds", seconds),
        ("processor time", "seconds", {name: [one.cpu_seconds for one in found] for name, found in ended.items()}),
        ("memory", "peak_MB", {name: [one.megabytes for one in found] for name, found in ended.items()}),
    ):
        pairs.conclude(f"against {options.title} {question}", unit, samples, ratios(samples, files))
    return files


def main() -> None:
    """Measure, print, write."""
    options = _options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", options.num_calibration), ("val", options.num_images)):
            link_images(options.data / split, folder / "data" / split, count)
        classes = sorted(each.name for each in (folder / "data" / "val").iterdir())
        weights = options.weights or end_to_end.random_weights(folder / "weights.pth", len(classes))
        arguments = {"num_classes": len(classes)} | options.arguments
        sizes = {"resize": options.resize, "crop": options.crop}
        job = Job(options.model, arguments, str(weights.resolve()), str(folder / "data"), folder=name, **sizes)
        pythons = available(options.only, dict(options.python))
        files = run_all(list(pythons), pythons, job, options)
        conclude(files, job, options.title)


def ratios(samples: pairs.Samples, files: dict[str, File]) -> dict[str, float]:
    """The others' over quantflow's in the same runtime; torchao's, which has none of them, over each."""
    return {
        f"{name} / {own}": pairs.ratio(samples, name, own)
        for own, runtime in OURS.items()
        for name in samples
        if own in samples and name not in OURS and files[name].runtime in {runtime, "torchao"}
    }


def conclude(files: dict[str, File], job: Job, title: str) -> None:
    """Print and write accuracy, size and latency of the files, and of the float model in both ONNX runtimes."""
    exported = Path(job.folder) / "float.onnx"
    contestants.export_onnx(job.model(), torch.zeros(1, 3, job.crop, job.crop), exported)
    for runtime in dict.fromkeys(OURS.values()):
        copy = exported.with_name(f"float-{runtime}.onnx")  # Each has its logits beside it.
        shutil.copy(exported, copy)
        files[f"float-{runtime}"] = File(copy, runtime, sys.executable)
    logits, timings = measure(files, job.save())
    labels = np.concatenate([labels.numpy() for _, labels in job.images("val", contestants.BATCH_SIZE)])
    for batch_size, samples in timings.items():
        pairs.conclude(f"against {title} batch {batch_size}", "ms", samples, ratios(samples, files))
    print(f"\n  {'':<24} {'top-1':>8} {'as float':>9} {'logits':>11} {'MB':>9}")
    for name, found in logits.items():
        size = sum(part.stat().st_size for part in files[name].parts()) / 1e6
        print(f"  {name:<24} {compared(found, logits['float-onnxruntime'], labels)} {size:9.2f}")


def _interpreter(text: str) -> tuple[str, str]:
    package, _, path = text.partition("=")
    packages = {each[1] for each in CONTESTANTS.values()}
    if package not in packages or shutil.which(path) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: give PACKAGE=PATH, PACKAGE one of {', '.join(sorted(packages))}")
    return package, path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument(
        "--weights", type=Path, help="a state_dict; absent: mobilenet_v2 with random weights, whose logits say nothing"
    )
    parser.add_argument("--arguments", type=json.loads, default={}, help="of the architecture, as JSON")
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--num-images", type=int, default=1000, help="validation images")
    parser.add_argument("--num-calibration", type=int, default=300, help="a multiple of 30")
    parser.add_argument("--rounds", type=int, default=3)
    names = [*CONTESTANTS, *OURS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--python",
        type=_interpreter,
        action="append",
        default=[],
        metavar="PACKAGE=PATH",
        help="nncf=PATH, for example",
    )
    options = parser.parse_args()
    if options.num_calibration % CALIBRATION_BATCH:
        parser.error(f"--num-calibration {options.num_calibration}: it must be a multiple of {CALIBRATION_BATCH}.")
    if options.weights is None and options.model != "mobilenet_v2":
        parser.error(f"--weights is missing: only mobilenet_v2 gets random ones, and MODEL is {options.model}.")
    name = options.weights.stem if options.weights else options.model
    options.title = f"{name} {options.crop}px"
    return options


if __name__ == "__main__":
    main()
