"""quantflow from Python: what a program needs to use an exported model."""

from pathlib import Path

import torch

from quantlib import machine
from quantlib.errors import ModelError
from quantlib.export import checksums
from quantlib.runtimes import available, classifiers
from quantlib.runtimes.classifiers import Classifier


def load(path: str | Path, runtime: str | None = None, num_threads: int | None = None) -> Classifier:
    """Load an exported model, ready to be called with normalized images, with the fastest settings for this machine.

    The process's memory allocator is set to keep freed memory, which makes float models several times faster.

    Args:
        path: NAME.pt or NAME.onnx of a run.
        runtime: As the report names it: torchscript, torchscript-ENGINE, onnxruntime or openvino; None: torchscript
            for a .pt file, and an installed one for an .onnx file.
        num_threads: None: as many as the runtime likes. With torchscript this is torch's own setting, for the process.

    Raises:
        ModelError: If there is no such file, it does not match the SHA256SUMS beside it, or it does not run in that
            runtime.
        MachineError: If the runtime is not installed, or this machine lacks the engine.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"No file {str(path)!r}: give the .pt or .onnx file that a run's report names.")
    checksums.verify(path)
    machine.keep_freed_memory()
    if runtime is None:
        installed = [found.name for found in available.find_onnx_runtimes()]
        runtime = "torchscript" if path.suffix == ".pt" else (installed or ["openvino"])[0]
    if num_threads is not None and runtime.startswith("torchscript"):
        torch.set_num_threads(num_threads)
    return classifiers.open_model(path, runtime, num_threads or 0)
