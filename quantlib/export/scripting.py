"""Turns a model into the TorchScript file that is shipped and measured."""

from __future__ import annotations

import io

import torch
from torch import fx

from quantlib.errors import ModelError, reason_of
from quantlib.export.ends import Ends
from quantlib.graph.tracing import untraced


def script(
    model: fx.GraphModule, engine: str | None, input_shape: tuple[int, int, int], ends: Ends | None = None
) -> bytes:
    """Script a model as a TorchScript file; `torch.jit.load` reads it without this package.

    The same model gives the same bytes. Whether its int8 kernels can run it shows only as it runs.

    Args:
        model: Fused float, or quantized.
        engine: The engine whose int8 kernels a quantized model will run on; None for float.
        input_shape: Channels, height and width of its input.
        ends: What the file does besides the model; None: nothing.

    Raises:
        ModelError: If it uses Python that TorchScript cannot express, or this torch has no TorchScript any more.
        MachineError: If this machine lacks the engine.
    """
    try:
        from quantlib.export import native, torchscript
    except ImportError as error:
        raise ModelError(f"This torch has no TorchScript: {error}.") from None
    from quantlib.runtimes.engine import use_engine

    buffer = io.BytesIO()
    with use_engine(engine or "auto"):
        try:
            own = model.eval() if engine is None else native.to_native(model)
            torchscript.forget_classes()
            scripted = _scripted(own, input_shape)
            torch.jit.save(ends.add_to_script(scripted, input_shape[2]) if ends else scripted, buffer)
        except Exception as error:
            raise ModelError(f"The model cannot be written as TorchScript: {reason_of(error)}") from None
    return torchscript.canonical(buffer.getvalue())


def try_out(content: bytes, engine: str | None, input_shape: tuple[int, int, int]) -> None:
    """Run a TorchScript file in this process, on images of zeros.

    Args:
        content: The file.
        engine: The engine that it was written for; None for float.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it does not run.
        MachineError: If this machine lacks the engine.
    """
    from quantlib.runtimes.engine import use_engine

    with use_engine(engine or "auto"), torch.inference_mode():
        try:
            torch.jit.load(io.BytesIO(content))(torch.zeros(1, *input_shape))
        except Exception as error:
            raise ModelError(f"The model cannot be written as TorchScript: {reason_of(error)}") from None


def _scripted(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> torch.jit.ScriptModule:
    """A model in TorchScript."""
    # Its class's name gets into the file, and depends on where the model comes from.
    model = fx.GraphModule(model, model.graph, "Classifier")
    try:
        return torch.jit.script(model)
    except RuntimeError:
        # TorchScript is stricter with types than Python. What is recorded has none, but only one way through branches.
        if untraced(model):
            raise
        return torch.jit.trace(model, torch.zeros(2, *input_shape), check_trace=False)
