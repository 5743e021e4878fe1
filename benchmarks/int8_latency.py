"""int8 MobileNetV2 at 224 px, in milliseconds per image: the tutorial's, quantflow's, ONNX Runtime's own, NNCF's own.

    pip install nncf
    ORT_DISABLE_TELEMETRY=1 python benchmarks/int8_latency.py

The same float model, quantized by each. Batch sizes 1 and 50, one and two threads; all in one process, taking turns,
each call timed after an untimed one. All benefit from the allocator setting, including the tutorial's.
"""

import copy
import tempfile
import warnings
from pathlib import Path

import contestants
import nncf
import openvino
import pairs
import torch
from torch import Tensor
from torch.ao import quantization as tq
from torchvision.models import quantization

from quantlib import api, machine
from quantlib.measure import benchmark
from quantlib.runtimes import classifiers
from quantlib.runtimes.engine import use_engine

NUM_CALIBRATION = 8
SETTINGS = [(batch_size, threads) for batch_size in (1, 50) for threads in (1, 2)]
OURS = {
    "torchscript-x86": "ours.pt",
    "torchscript-onednn": "ours.pt",
    "onnxruntime": "ort.onnx",
    "openvino": "openvino.onnx",
}


class AsInTheTutorial:
    """Just torch.jit.load, on the fbgemm engine."""

    def __init__(self, path: Path) -> None:
        with use_engine("fbgemm"):
            self.model = torch.jit.load(str(path)).eval()

    def arrange(self, images: Tensor) -> Tensor:
        """As they are."""
        return images.contiguous()

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits."""
        with use_engine("fbgemm"), torch.no_grad():
            return self.model(images)


class NNCF(classifiers.OpenVINOClassifier):
    """A model quantized by NNCF, in OpenVINO."""


def make_files(folder: Path) -> None:
    """The same float model, quantized by each."""
    torch.manual_seed(0)
    x = torch.randn(NUM_CALIBRATION, 3, 224, 224)
    model = quantization.mobilenet_v2()
    model(x)  # BatchNorm's statistics, so that activations have sensible ranges.
    ours = api.quantize(model, [x], observer="minmax", activation_bits=8)
    for name, runtime in (("ours.pt", "torchscript-x86"), ("ort.onnx", "onnxruntime"), ("openvino.onnx", "openvino")):
        ours.save(folder / name, runtime)
    model.eval().fuse_model(is_qat=False)
    make_tutorials(copy.deepcopy(model), x, folder / "tutorial.pt")
    contestants.export_onnx(model, x, folder / "float.onnx")
    for name, layout in (("ort_qdq", "QDQ"), ("ort_qop", "QOperator")):
        contestants.quantize_onnx(folder / "float.onnx", folder / f"{name}.onnx", iter(x.numpy()[:, None]), layout)
    quantized = nncf.quantize(
        openvino.convert_model(folder / "float.onnx"), nncf.Dataset([one.numpy() for one in x.split(1)])
    )
    openvino.save_model(quantized, folder / "nncf.xml")


def make_tutorials(fused: torch.nn.Module, x: Tensor, path: Path) -> None:
    """The file of PyTorch's tutorial, by torch's eager-mode quantization."""
    fused.qconfig = tq.get_default_qconfig("fbgemm")
    with use_engine("fbgemm"), torch.no_grad():
        prepared = tq.prepare(fused)
        prepared(x)
        torch.jit.save(torch.jit.script(tq.convert(prepared)), str(path))


def open_all(folder: Path, threads: int) -> dict[str, classifiers.Classifier]:
    """Every contender, by name."""
    return {
        "tutorial": AsInTheTutorial(folder / "tutorial.pt"),
        **{
            f"ours, {runtime}": classifiers.open_model(folder / file, runtime, threads)
            for runtime, file in OURS.items()
        },
        **{
            f"ONNX Runtime's own, {name}": classifiers.ONNXRuntimeClassifier(folder / f"{name}.onnx", threads)
            for name in ("ort_qdq", "ort_qop")
        },
        "NNCF's own in OpenVINO": NNCF(folder / "nncf.xml", threads),
    }


def main() -> None:
    """Measure, print, write."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        machine.keep_freed_memory()
        names = list(open_all(folder, 1))
        inputs = torch.randn(50, 3, 224, 224)
        for batch_size, threads in SETTINGS:
            (*timings,) = benchmark.time_models(
                lambda threads: list(open_all(folder, threads).values()),
                inputs,
                [batch_size],
                [threads],
                num_samples=100 if batch_size == 1 else 10,
            )
            samples = {
                name: [ms / batch_size for ms in timing.samples_ms] for name, timing in zip(names, timings, strict=True)
            }
            medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
            ours = min((name for name in names if name.startswith("ours")), key=medians.__getitem__)
            torchscript = min((name for name in names if "torchscript" in name), key=medians.__getitem__)
            others = min((name for name in names if "own" in name), key=medians.__getitem__)
            pairs.conclude(
                f"int8 latency batch {batch_size} threads {threads}",
                "ms_per_image",
                samples,
                {
                    f"tutorial / {torchscript}": pairs.ratio(samples, "tutorial", torchscript),
                    f"{others} / {ours}": pairs.ratio(samples, others, ours),
                },
            )


if __name__ == "__main__":
    main()
