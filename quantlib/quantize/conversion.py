"""Conversion: a prepared model becomes an int8 model."""

import torch
from torch import nn

from quantlib.eager import converting
from quantlib.errors import ModelError
from quantlib.runtimes.engine import use_engine


def convert(prepared: nn.Module, engine: str, *, inplace: bool = False) -> nn.Module:
    """Convert a calibrated or quantization-aware trained model, or a copy of it, to int8.

    Raises:
        MachineError: If this machine lacks the engine.
    """
    with use_engine(engine):
        return converting.convert(prepared, inplace=inplace)


def check_int8(model: nn.Module, engine: str, input_shape: tuple[int, int, int]) -> None:
    """Run one empty image through an int8 model.

    Raises:
        ModelError: If the architecture uses an operation that eager-mode quantization cannot convert.
    """
    try:
        with use_engine(engine), torch.inference_mode():
            model(torch.zeros(1, *input_shape))
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"The int8 model cannot run: {str(error).splitlines()[0]} The architecture needs QuantStub and DeQuantStub "
            "around what is quantized, and FloatFunctional in place of + and torch.cat between quantized tensors."
        ) from None
