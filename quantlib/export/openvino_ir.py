"""An ONNX file as OpenVINO IR: a graph, NAME.xml, and its weights, NAME.bin."""

from __future__ import annotations

from pathlib import Path

import torch

from quantlib.data.feeding import feed
from quantlib.errors import ModelError
from quantlib.export import bundle
from quantlib.export.bundle import ModelInfo
from quantlib.runtimes import classifiers

_NUM_CHECKED = 8
# The same runtime computes the same graph: its plan may order sums differently, and no more.
_MAX_ERROR = 1e-4


def write(onnx_file: Path, info: ModelInfo, folder: Path) -> ModelInfo:
    """Write a file for OpenVINO as IR, once it answers as the ONNX file does.

    Args:
        onnx_file: The file.
        info: Its document.
        folder: Where NAME.xml and NAME.bin are written.

    Returns:
        The document that is in the IR: of the same model, with the figures that were measured on the ONNX file.

    Raises:
        ModelError: If the IR answers differently.
        MachineError: If OpenVINO is not installed.
    """
    original = classifiers.open_model(onnx_file, "openvino")
    openvino = classifiers.import_openvino()
    (file,) = info.files
    path = folder / f"{onnx_file.stem}.xml"
    described = info.model_copy(update={"files": [file.model_copy(update={"name": path.name})]})
    model = openvino.Core().read_model(str(onnx_file))
    model.set_rt_info(bundle.document(described).decode(), bundle.IR_KEYS)
    # Weights that stay float would lose digits by default.
    openvino.save_model(model, str(path), compress_to_fp16=False)
    channels, height, width = info.input_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (_NUM_CHECKED, height, width, channels), dtype=torch.uint8, generator=generator)
    images = feed(pixels, info.preprocessing.transform().normalization, info.interface)
    expected, got = original(images), classifiers.open_model(path, "openvino")(images)
    error = float((got - expected).square().sum() / expected.square().sum().clamp_min(torch.finfo().tiny))
    if not error <= _MAX_ERROR:
        raise ModelError(
            f"As OpenVINO IR, {onnx_file.name} answers differently by {error:.2%} of its power, but at most "
            f"{_MAX_ERROR:.2%} are allowed. Export it as ONNX, without --openvino-ir."
        )
    return described
