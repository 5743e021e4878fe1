"""Scripts as a user would write them to quantize a classifier with other tools; against.py runs each in a process.

python benchmarks/contestants.py NAME JOB.json                 quantizes, evaluates float and int8, writes files
python benchmarks/contestants.py open RUNTIME FILE JOB.json    answers the validation images, then times a call of
                                                               each batch size that it reads from its input
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    Answer = Callable[[np.ndarray], np.ndarray]
    """Images [N, 3, H, W] to logits [N, num_classes]."""

BATCH_SIZE = 50
"""Images per call when accuracy is measured, as in a recipe."""
NUM_WORKERS = 2
MAX_DROP = 0.01
"""What NNCF may lose when it is told to control accuracy; a recipe's default."""


@dataclass
class Job:
    """What to quantize, on which images."""

    architecture: str
    arguments: dict[str, Any]
    weights: str
    data: str
    """Folder that holds train and val; all of train is for calibration."""
    resize: int
    crop: int
    folder: str
    """Where files are written."""

    def __post_init__(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def save(self) -> Path:
        """Write it into its folder."""
        self.path("job.json").write_text(json.dumps(asdict(self)))
        return self.path("job.json")

    def path(self, name: str) -> Path:
        """A file to write."""
        return Path(self.folder) / name

    def did(self, what: str) -> None:
        """Print how long a step took."""
        now = time.perf_counter()
        print(f"    {now - self._last:8.2f} s  {what}", flush=True)
        self._last = now

    def model(self) -> nn.Module:
        """The float model."""
        import torch

        if self.architecture.startswith("torchvision:"):
            from torchvision.models import get_model

            model = get_model(self.architecture.partition(":")[2], **self.arguments)
        else:
            # The tutorial's MobileNetV2, which is one module that needs only torch.
            name = {"mobilenet_v2": "quantlib.models.mobilenet_v2:mobilenet_v2"}.get(
                self.architecture, self.architecture
            )
            module, _, function = name.partition(":")
            model = getattr(importlib.import_module(module), function)(**self.arguments)
        model.load_state_dict(torch.load(self.weights, weights_only=True))
        return model.eval()

    def images(self, split: str, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images and labels."""
        from torch.utils.data import DataLoader
        from torchvision import transforms as T  # noqa: N812 (as torchvision's own examples do)
        from torchvision.datasets import ImageFolder

        transform = T.Compose(
            [
                *(T.Resize(self.resize), T.CenterCrop(self.crop), T.ToTensor()),
                T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )
        return DataLoader(ImageFolder(f"{self.data}/{split}", transform), batch_size, num_workers=NUM_WORKERS)

    def evaluate(self, name: str, answer: Answer) -> None:
        """Measure and print top-1."""
        right = total = 0
        for images, labels in self.images("val", BATCH_SIZE):
            right += int((answer(images.numpy()).argmax(1) == labels.numpy()).sum())
            total += len(labels)
        self.did(f"evaluated {name}: top-1 {right / total:.2%}")


def export_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a float model for any batch size."""
    import torch

    torch.onnx.export(
        model,
        (images[:1],),
        path,
        opset_version=17,
        dynamo=False,  # The other exporter takes several times as long.
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
    )


def quantize_onnx(source: Path, place: Path, batches: Iterator[np.ndarray], layout: str = "QDQ") -> None:
    """ONNX Runtime's static quantization: min/max, one scale per output channel; QDQ, or its QOperator layout."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(batches, None)
            return None if found is None else {"images": found}

    prepared = place.with_suffix(".prepared.onnx")
    try:
        quant_pre_process(str(source), str(prepared))
    except AssertionError:  # Its symbolic shapes do not know every Reshape, such as a vision transformer's.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(prepared),
        str(place),
        Reader(),
        quant_format=quantization.QuantFormat[layout],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def onnxruntime(job: Job) -> None:
    """ONNX Runtime's static quantization."""
    import onnxruntime as ort

    model, (images, _) = job.model(), next(iter(job.images("train", 1)))
    job.did("imports, model")
    export_onnx(model, images, job.path("float.onnx"))
    job.did("exported")
    # It keeps every tensor of a batch: at 224 px 50 images take six times the memory of one, and no less time.
    batches = (images.numpy() for images, _ in job.images("train", 1))
    quantize_onnx(job.path("float.onnx"), job.path("int8.onnx"), batches)
    job.did("quantized")
    for name in ("float", "int8"):
        session = ort.InferenceSession(str(job.path(f"{name}.onnx")), providers=["CPUExecutionProvider"])
        job.evaluate(name, lambda x: session.run(None, {"images": x})[0])  # noqa: B023 (called in this round)


def nncf_default(job: Job) -> None:
    """NNCF's default preset."""
    _nncf(job, control_accuracy=False)


def nncf_accuracy_aware(job: Job) -> None:
    """NNCF, which puts back layers into float until accuracy is as wanted."""
    _nncf(job, control_accuracy=True)


def _nncf(job: Job, *, control_accuracy: bool) -> None:
    import nncf
    import numpy as np
    import openvino
    import torch

    model = job.model()
    job.did("imports, model")
    torch.backends.mha.set_fastpath_enabled(False)  # OpenVINO cannot convert attention that is fused for inference.
    example = torch.zeros(1, 3, job.crop, job.crop)
    exported = openvino.convert_model(model, example_input=example, input=[-1, 3, job.crop, job.crop])
    job.did("converted")
    openvino.save_model(exported, job.path("float.xml"), compress_to_fp16=False)
    # Its statistics are those of single images.
    calibration = job.images("train", 1)
    dataset, subset_size = nncf.Dataset(calibration, lambda batch: batch[0].numpy()), len(calibration)
    if control_accuracy:

        def top1(compiled: Any, batches: Any) -> tuple[float, None]:
            right = [compiled(images)[0].argmax(1) == labels for images, labels in batches]
            return float(np.concatenate(right).mean()), None

        validation = nncf.Dataset(job.images("val", BATCH_SIZE), lambda batch: [each.numpy() for each in batch])
        quantized = nncf.quantize_with_accuracy_control(
            exported, dataset, validation, top1, max_drop=MAX_DROP, subset_size=subset_size
        )
    else:
        quantized = nncf.quantize(exported, dataset, subset_size=subset_size)
    openvino.save_model(quantized, job.path("int8.xml"))
    job.did("quantized")
    for name in ("float", "int8"):
        compiled = openvino.compile_model(job.path(f"{name}.xml"), "CPU")
        job.evaluate(name, lambda x: compiled(x)[0])  # noqa: B023 (called in this round)


def torchao(job: Job) -> None:
    """PT2E of torchao for x86, compiled by Inductor."""
    import torch
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, (images, _) = job.model(), next(iter(job.images("train", BATCH_SIZE)))
    job.did("imports, model")
    shapes = ({0: torch.export.Dim("batch")},)
    # Only a strict export says which module each node is of, which its quantizer looks for.
    exported = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=True).module()
    job.did("exported")
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch, _ in job.images("train", BATCH_SIZE):
            prepared(batch)
        converted = quantize_pt2e.convert_pt2e(prepared)
        torch.export.save(torch.export.export(converted, (images,), dynamic_shapes=shapes), job.path("int8.pt2"))
    job.did("quantized")
    with torch.inference_mode():
        job.evaluate("float", lambda x: model(torch.from_numpy(x)).numpy())
    job.evaluate("int8", _compiled(converted))


def _compiled(model: nn.Module) -> Answer:
    import torch
    from torch._inductor import config

    config.freezing = True  # Without it no layer is computed in int8.
    compiled = torch.compile(model)

    def answer(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return compiled(torch.from_numpy(images)).numpy()

    return answer


def open_file(runtime: str, path: Path) -> Answer:
    """A file that any of them wrote, on one thread."""
    import torch

    torch.set_num_threads(1)
    if runtime == "torchao":
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401 (its operations)

        return _compiled(torch.export.load(path).module())

    from quantlib import machine
    from quantlib.runtimes import classifiers

    machine.keep_freed_memory()
    classifier = classifiers.open_model(path, runtime, 1)
    return lambda images: classifier(torch.from_numpy(images)).numpy()


def serve(runtime: str, path: Path, job: Job) -> None:
    """Write the logits of the validation images to path.npy; then time a call for each batch size that is asked for."""
    import numpy as np

    answer = open_file(runtime, path)
    batches = [images.numpy() for images, _ in job.images("val", BATCH_SIZE)]
    np.save(f"{path}.npy", np.concatenate([answer(images) for images in batches]))
    print("ready", flush=True)
    for line in sys.stdin:
        images = batches[0][: int(line)]
        answer(images)  # Untimed: another file's turn has just ended, and the caches are its.
        start = time.perf_counter()
        answer(images)
        print((time.perf_counter() - start) * 1000, flush=True)


CONTESTANTS: dict[str, tuple[Callable[[Job], None], str, str, str]] = {
    "onnxruntime": (onnxruntime, "onnxruntime", "onnxruntime", "int8.onnx"),
    "nncf": (nncf_default, "nncf", "openvino", "int8.xml"),
    "nncf-accuracy-aware": (nncf_accuracy_aware, "nncf", "openvino", "int8.xml"),
    "torchao": (torchao, "torchao", "torchao", "int8.pt2"),
}
"""Script, package that it needs, runtime and file of its result, by name."""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    job = Job(**json.loads(Path(sys.argv[-1]).read_text()))
    if sys.argv[1] == "open":
        serve(sys.argv[2], Path(sys.argv[3]), job)
    else:
        CONTESTANTS[sys.argv[1]][0](job)
