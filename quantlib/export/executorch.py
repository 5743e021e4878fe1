"""A model as a program of ExecuTorch, for phones and other small machines; XNNPACK computes it."""

from __future__ import annotations

import io
import zipfile
from importlib import import_module

from torch import fx

from quantlib.errors import MachineError, ModelError, reason_of
from quantlib.export import torch_export
from quantlib.export.ends import Ends
from quantlib.runtimes.executorch import quiet


def write(model: fx.GraphModule, input_shape: tuple[int, int, int], ends: Ends | None = None) -> bytes:
    """Write a model as a program for one image at a time.

    A program can take several, but plans memory for as many as it could. The same model gives the same bytes.

    Args:
        model: Fused float, or quantized.
        input_shape: Channels, height and width of its input.
        ends: What the program does besides the model; None: nothing.

    Raises:
        ModelError: If torch.export or ExecuTorch cannot express it.
        MachineError: If ExecuTorch is not installed as a whole.
    """
    program = torch_export.program(model, input_shape, ends, num_images=1)
    with quiet():
        try:
            exir = import_module("executorch.exir")
            xnnpack = import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        except ImportError as error:
            raise MachineError(
                f"ExecuTorch cannot be used: {error}. Run pip install 'quantflow[executorch]'."
            ) from None
        try:
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            content: bytes = lowered.to_executorch().buffer
        except Exception as error:
            raise ModelError(f"The model cannot be written for ExecuTorch: {reason_of(error)}") from None
    return content


def add_file(content: bytes, name: str, extra: bytes) -> bytes:
    """A program with a file in a ZIP archive at its end, which ExecuTorch does not read."""
    buffer = io.BytesIO(content)
    buffer.seek(0, io.SEEK_END)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), extra)
    return buffer.getvalue()


def find_file(content: bytes, name: str) -> bytes | None:
    """A file in the ZIP archive at the end of a program; None if there is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(name)
    except (KeyError, zipfile.BadZipFile):
        return None
