"""int8 by quantflow, by ONNX Runtime's static quantization and by NNCF's default preset: accuracy and latency.

    pip install nncf
    ORT_DISABLE_TELEMETRY=1 python benchmarks/specialists.py torchvision:resnet18 WEIGHTS IMAGES --side 32

The same float model, the same calibration images, the same validation images. IMAGES is an image folder with train and
val. Files are timed in turns on one thread.
"""

import argparse
import json
import math
import tempfile
import warnings
from pathlib import Path

import nncf
import numpy as np
import openvino
import pairs
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from quantlib import api, machine
from quantlib.data import datasets, loading
from quantlib.data.normalization import IMAGENET
from quantlib.data.shards import to_input
from quantlib.data.transforms import EvalTransform
from quantlib.measure import benchmark
from quantlib.models import registry
from quantlib.models.weights import load_weights, read_weights
from quantlib.runtimes import classifiers

NUM_CALIBRATION, BATCH_SIZE = 960, 32


class Images(CalibrationDataReader):
    """Calibration images, one after the other."""

    def __init__(self, x: Tensor) -> None:
        self.batches = iter([{"images": one.numpy()} for one in x.split(1)])

    def get_next(self) -> dict | None:
        """The next image, or None at the end."""
        return next(self.batches, None)


def read(folder: str, name: str, side: int, num_images: int | None) -> tuple[Tensor, np.ndarray]:
    """Images [N, 3, side, side], drawn at random if not all are wanted, and their labels."""
    split = datasets.open_split("imagefolder", folder, name)
    order = loading.shuffled(len(split), 0)[:num_images]
    transform = EvalTransform(resize=side, crop=(side, side))
    found = list(loading.batches(split, order, transform, 0, 500))
    pixels, labels = (np.concatenate(each) for each in zip(*found, strict=True))
    return to_input(torch.from_numpy(pixels), IMAGENET), labels


def make_files(model: torch.nn.Module, x: Tensor, folder: Path) -> dict[str, tuple[Path, str]]:
    """The float model, and each one's int8: file and runtime, by name."""
    ours = api.quantize(model, x.split(BATCH_SIZE))
    files = {}
    for runtime in ("onnxruntime", "openvino"):
        files[f"quantflow, {runtime}"] = folder / f"ours.{runtime}.onnx", runtime
        ours.save(folder / f"ours.{runtime}.onnx", runtime)
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        model,
        (x[:1],),
        folder / "float.onnx",
        opset_version=17,
        dynamo=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=axes,
    )
    try:
        quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"))
    except AssertionError:  # Its symbolic shapes do not know every Reshape, such as a vision transformer's.
        quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    for name, method in (("min/max", CalibrationMethod.MinMax), ("percentile", CalibrationMethod.Percentile)):
        path = folder / f"ort-{method.name}.onnx"
        quantize_static(
            str(folder / "prepared.onnx"),
            str(path),
            Images(x),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            calibrate_method=method,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        files[f"ONNX Runtime's own, {name}"] = path, "onnxruntime"
    quantized = nncf.quantize(
        openvino.convert_model(folder / "float.onnx"),
        nncf.Dataset([one.numpy() for one in x.split(1)]),
        subset_size=len(x),
    )
    openvino.save_model(quantized, folder / "nncf.xml")
    files["NNCF's own, openvino"] = folder / "nncf.xml", "openvino"
    files |= {f"float, {runtime}": (folder / "float.onnx", runtime) for runtime in ("onnxruntime", "openvino")}
    return files


def answers(path: Path, runtime: str, x: Tensor) -> Tensor:
    """Logits."""
    classifier = _open(path, runtime, 0)
    return torch.cat([classifier(batch) for batch in x.split(500)])


def compared(logits: Tensor, expected: Tensor, labels: np.ndarray) -> str:
    """Top-1; how many images get the class that float gives them; signal to quantization noise of the logits."""
    found, float_found = logits.argmax(1), expected.argmax(1)
    top1, agreement = (found.numpy() == labels).mean(), (found == float_found).double().mean()
    noise = (logits - expected).square().sum()
    sqnr = 10 * math.log10(expected.square().sum() / noise) if noise else math.inf
    return f"{100 * top1:6.2f}% {100 * agreement:8.2f}% {sqnr:8.1f} dB"


def _open(path: Path, runtime: str, threads: int) -> classifiers.Classifier:
    if runtime == "openvino":
        return classifiers.OpenVINOClassifier(path, threads)
    return classifiers.ONNXRuntimeClassifier(path, threads)


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("architecture")
    parser.add_argument("weights")
    parser.add_argument("images")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--arguments", type=json.loads, default={}, help="of the architecture, as JSON")
    options = parser.parse_args()
    machine.keep_freed_memory()
    calibration, _ = read(options.images, "train", options.side, NUM_CALIBRATION)
    validation, labels = read(options.images, "val", options.side, None)
    arguments = {"num_classes": len(set(labels.tolist()))} | options.arguments
    model = registry.build(options.architecture, arguments)
    load_weights(model, read_weights(options.weights, options.architecture), options.weights)
    with tempfile.TemporaryDirectory() as name:
        files = make_files(model.eval(), calibration, Path(name))
        logits = {name: answers(*file, validation) for name, file in files.items()}
        for batch_size in (1, BATCH_SIZE):
            (*timings,) = benchmark.time_models(
                lambda threads: [_open(*file, threads) for file in files.values()],
                validation[:batch_size],
                [batch_size],
                [1],
                num_samples=200 if batch_size == 1 else 20,
            )
            samples = {name: timing.samples_ms for name, timing in zip(files, timings, strict=True)}
            ratios = {
                f"float / {name}": pairs.ratio(samples, f"float, {runtime}", name)
                for name, (_, runtime) in files.items()
                if not name.startswith("float")
            }
            pairs.conclude(f"specialists batch {batch_size}", "ms", samples, ratios)
    print(f"\n  {'':<40} {'top-1':>7} {'as float':>9} {'logits':>11}")
    for name, found in logits.items():
        print(f"  {name:<40} {compared(found, logits[f'float, {files[name][1]}'], labels)}")


if __name__ == "__main__":
    main()
