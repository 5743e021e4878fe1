"""Converting a prepared model to int8 in eager mode."""

import torch
from torch import nn
from torch.ao import quantization as tq

from quantlib.eager.modules import ObserverBase


def convert(prepared: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Convert a prepared model, or a copy of it, to int8 for the engine in use (see `use_engine`)."""
    return tq.convert(prepared.eval(), inplace=inplace)


def convert_blank(prepared: nn.Module) -> nn.Module:
    """An int8 model with weights and scales still to be loaded, made from a prepared model that has seen no images."""
    for module in prepared.modules():
        # Every observer must have seen something: torch has no scale for it otherwise.
        if isinstance(module, ObserverBase) and not getattr(module, "ch_axis", -1) >= 0:
            module(torch.zeros(1))
        weight_fake_quant = getattr(module, "weight_fake_quant", None)
        if weight_fake_quant is not None:
            weight_fake_quant(module.weight)
    return convert(prepared, inplace=True)
