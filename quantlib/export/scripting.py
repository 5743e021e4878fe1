"""Turns a model into the TorchScript file that is shipped and measured."""

from __future__ import annotations

import io

import torch
from torch import fx

from quantlib.errors import ModelError
from quantlib.graph.tracing import untraced


def script(model: fx.GraphModule, engine: str | None, input_shape: tuple[int, int, int]) -> bytes:
    """Script a model as a TorchScript file; `torch.jit.load` reads it without this package.

    The same model gives the same bytes.

    Args:
        model: Fused float, or quantized.
        engine: The engine whose int8 kernels a quantized model will run on; None for float.
        input_shape: Channels, height and width of its input.

    Raises:
        ModelError: If it uses Python that TorchScript cannot express, its int8 kernels cannot run it, or this torch has
            no TorchScript any more.
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
            torch.jit.save(_scripted(own, input_shape), buffer)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            # The interpreter says what happened last.
            reason = lines[-1] if "TorchScript interpreter" in lines[0] else lines[0]
            raise ModelError(f"The model cannot be written as TorchScript: {reason}") from None
    return torchscript.canonical(buffer.getvalue())


def _scripted(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> torch.jit.ScriptModule:
    """A model in TorchScript; it can run."""
    # Its class's name gets into the file, and depends on where the model comes from.
    model = fx.GraphModule(model, model.graph, "Classifier")
    try:
        scripted: torch.jit.ScriptModule = torch.jit.script(model)
    except RuntimeError:
        # TorchScript is stricter with types than Python. What is recorded has none, but only one way through branches.
        if untraced(model):
            raise
        scripted = torch.jit.trace(model, torch.zeros(2, *input_shape), check_trace=False)
    with torch.inference_mode():
        for num_images in (1, 3):
            scripted(torch.zeros(num_images, *input_shape))
    return scripted
