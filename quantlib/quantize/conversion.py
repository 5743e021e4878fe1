"""Conversion: a prepared model becomes an int8 model."""

from dataclasses import replace

import torch
from torch import nn

from quantlib.eager import converting
from quantlib.eager.converting import convert_blank
from quantlib.errors import ModelError
from quantlib.graph import fusion
from quantlib.models import checkpoint
from quantlib.quantize import calibration, preparation
from quantlib.recipe.scheme import Scheme
from quantlib.runtimes.engine import use_engine


def convert(prepared: nn.Module, engine: str, *, inplace: bool = False) -> nn.Module:
    """An int8 model made of a calibrated or quantization-aware trained one, or of its copy.

    Raises:
        MachineError: If this machine lacks the engine.
    """
    with use_engine(engine):
        return converting.convert(prepared, inplace=inplace)


def convert_saved(content: bytes, engine: str, crop: int) -> bytes:
    """A stored calibrated model, or an epoch's state, as a stored int8 model that is known to run.

    Raises:
        ModelError: As `check_int8`.
        MachineError: If this machine lacks the engine.
    """
    prepared, header = calibration.load_prepared(content)
    int8 = convert(prepared, engine, inplace=True)
    check_int8(int8, engine, crop)
    return checkpoint.hand_over(int8, header | {"engine": engine})


def check_int8(model: nn.Module, engine: str, crop: int) -> None:
    """Run one empty image through an int8 model.

    Raises:
        ModelError: If the architecture uses an operation that eager-mode quantization cannot convert.
    """
    try:
        with use_engine(engine), torch.inference_mode():
            model(torch.zeros(1, 3, crop, crop))
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"The int8 model cannot run: {str(error).splitlines()[0]} The architecture needs QuantStub and DeQuantStub "
            "around what is quantized, and FloatFunctional in place of + and torch.cat between quantized tensors."
        ) from None


def load_deployable(content: bytes) -> tuple[nn.Module, str | None]:
    """A fused float model and None, or an int8 model and its engine, as `checkpoint.save` made it.

    Raises:
        MachineError: If this machine lacks the engine.
    """
    if taken := checkpoint.take(content):
        model, header = taken
        return model, header["engine"]
    header, state = checkpoint.open_saved(content)
    if "engine" not in header:
        return fusion.load(content)[0], None
    # Ranges come with the int8 model; an observer that searches for them would search in vain, for seconds.
    scheme = replace(Scheme.from_header(header), observer="minmax")
    prepared = preparation.rebuild(header, scheme)
    with use_engine(header["engine"]):
        model = convert_blank(prepared)
        model.load_state_dict(state)
    return model, header["engine"]
