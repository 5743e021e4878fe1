"""Classifiers that run an exported model, one for each runtime."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import torch
from torch import Tensor

from quantlib.errors import MachineError, ModelError, reason_of
from quantlib.models import exported_file, exported_graph
from quantlib.recipe.sections import RuntimeName
from quantlib.runtimes import executorch
from quantlib.runtimes.available import is_installed, package_of, resolve_engine
from quantlib.runtimes.engine import use_engine


class Classifier(Protocol):
    """A model that is ready to be called."""

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest for it; it takes any."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its logits or probabilities, [N, num_classes] float32.

        Args:
            images: [N, C, H, W] float32, normalized; or uint8 pixels, if the file was exported for them.
        """


def _channels_last(images: Tensor) -> Tensor:
    # A file that takes pixels puts its own order on them.
    kind = torch.channels_last if images.is_floating_point() else torch.contiguous_format
    return images.contiguous(memory_format=kind)


class TorchScriptClassifier:
    """A TorchScript file, frozen. It runs on as many threads as torch is set to.

    Args:
        path: The file.
        engine: The engine that int8 weights are packed for; float models need none.

    Raises:
        MachineError: If this machine lacks the engine.
    """

    def __init__(self, path: Path, engine: str) -> None:
        self.engine = resolve_engine(engine)
        with use_engine(self.engine):
            # Freezes, and gives float convolutions to oneDNN with their weights in its own layout.
            self.model = torch.jit.optimize_for_inference(torch.jit.load(str(path), map_location="cpu").eval())

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest."""
        return _channels_last(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its answers, [N, num_classes] float32."""
        with torch.inference_mode(), use_engine(self.engine):
            return self.model(self.arrange(images))


class ONNXRuntimeClassifier:
    """An ONNX file in ONNX Runtime.

    Args:
        path: The file.
        num_threads: Its own threads; 0: as many as there are cores.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        # Importing it puts a device id into the user's cache, and reports to Microsoft some seconds later.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # Errors only: it warns about every shape that it cannot know.
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest."""
        return images.contiguous()

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its answers, [N, num_classes] float32."""
        return torch.from_numpy(self.session.run(None, {self.input: self.arrange(images).numpy()})[0])


def import_openvino() -> Any:
    """The package openvino.

    Raises:
        ImportError: If it is not installed.
    """
    # Importing OpenVINO reports to Google; without this module it does not, and works the same.
    cast("dict[str, Any]", sys.modules).setdefault("openvino_telemetry", None)
    import openvino

    return openvino


class OpenVINOClassifier:
    """An ONNX file, or OpenVINO IR, in OpenVINO.

    Args:
        path: The file.
        num_threads: Its own threads; 0: as many as it likes.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        openvino = import_openvino()
        # Float stays float32: OpenVINO would use bfloat16 if the CPU has it.
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if num_threads:
            settings["INFERENCE_NUM_THREADS"] = num_threads
        core = openvino.Core()
        self.request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest."""
        return images.contiguous()

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its answers, [N, num_classes] float32."""
        outputs = self.request.infer([self.arrange(images).numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0].copy())  # The next output is written into the same memory.


class TorchExportClassifier:
    """A file of torch.export, whose operations run one by one. It runs on as many threads as torch is set to.

    torch's own loader evaluates expressions that it finds in a file; here, no code of it runs.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.model = exported_graph.build(exported_file.read_program(str(path)), quantized=True)
        self.model.load_state_dict(exported_file.read_state(str(path)))

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest."""
        return _channels_last(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its answers, [N, num_classes] float32."""
        with torch.inference_mode():
            return self.model(self.arrange(images))


class ExecuTorchClassifier:
    """A program of ExecuTorch, which takes one image at a time.

    Args:
        path: The file.
        num_threads: Threads of all programs in this process; 0: as they are.
    """

    def __init__(self, path: Path, num_threads: int) -> None:
        self.method = executorch.load_method(str(path), num_threads)

    def arrange(self, images: Tensor) -> Tensor:
        """Images in the memory layout that is fastest."""
        return images.contiguous()

    def __call__(self, images: Tensor) -> Tensor:
        """Images as the file takes them to its answers, [N, num_classes] float32."""
        return torch.cat([self.method.execute([image])[0] for image in self.arrange(images).split(1)])


def open_model(path: Path, runtime: str, num_threads: int = 0) -> Classifier:
    """Open an exported model in a runtime.

    Args:
        path: A file for that runtime.
        runtime: torchscript, torchscript-ENGINE, onnxruntime, openvino, executorch or torch_export.
        num_threads: Its own threads; 0: as many as it likes. TorchScript and torch.export run on torch's.

    Raises:
        ModelError: If the file cannot be read, or is not for that runtime.
        MachineError: If the runtime is not installed, or this machine lacks the engine.
    """
    kind, _, engine = runtime.partition("-")
    if kind not in get_args(RuntimeName) or (engine and kind != "torchscript"):
        raise MachineError(
            f"Runtime {runtime!r} is unknown: torchscript-ENGINE, {', '.join(get_args(RuntimeName))} are allowed."
        )
    if not is_installed(kind):
        raise MachineError(f"Runtime {runtime!r} is not installed: pip install {package_of(kind)}.")
    try:
        if kind == "torchscript":
            return TorchScriptClassifier(path, engine or "auto")
        if kind == "openvino":
            return OpenVINOClassifier(path, num_threads)
        if kind == "executorch":
            return ExecuTorchClassifier(path, num_threads)
        if kind == "torch_export":
            return TorchExportClassifier(path)
        return ONNXRuntimeClassifier(path, num_threads)
    except Exception as error:
        if isinstance(error, MachineError):
            raise
        raise ModelError(
            f"{path} does not load in {runtime}: {reason_of(error)} A .pt file is TorchScript, an .onnx file ONNX, "
            "an .xml file OpenVINO IR, a .pte file for executorch, and a .pt2 file for torch_export."
        ) from None
