"""Turns a model into the TorchScript file that is shipped and measured."""

import io

import torch
from torch import nn

from quantlib.errors import ModelError
from quantlib.export import torchscript
from quantlib.runtimes.engine import use_engine


def script(model: nn.Module, engine: str | None = None) -> bytes:
    """Script a model as a TorchScript file; `torch.jit.load` reads it without this package.

    The same model gives the same bytes.

    Args:
        model: Fused float, or int8.
        engine: The engine that the int8 weights are packed for; None for float.

    Raises:
        ModelError: If the architecture uses Python that TorchScript cannot express.
    """
    buffer = io.BytesIO()
    try:
        with use_engine(engine or "auto"):
            torchscript.forget_classes()
            torch.jit.save(torch.jit.script(model.eval()), buffer)
    except (RuntimeError, NotImplementedError, OSError) as error:
        raise ModelError(
            f"The model cannot be scripted: {error}\nUse operations that torch.jit.script supports in its forward()."
        ) from None
    return torchscript.canonical(buffer.getvalue())
