"""int8 accuracy without int8 kernels: fake quantization in float, of weights, activations, or both."""

import copy
from typing import Literal

from torch import nn

from quantlib.eager.rounding import fake_quantize_ptq, fake_quantize_qat
from quantlib.recipe.scheme import FuseMode

Parts = Literal["both", "weights", "activations"]


def simulate(prepared: nn.Module, mode: FuseMode, parts: Parts) -> nn.Module:
    """A float copy of a prepared model that rounds what int8 would round.

    Args:
        prepared: Calibrated (mode "eval") or quantization-aware trained (mode "qat").
        mode: The mode it was prepared in.
        parts: What is rounded; the rest stays in float, which shows what the rounded part costs.
    """
    model = copy.deepcopy(prepared).eval()
    switches = {"weights": parts != "activations", "activations": parts != "weights"}
    if mode == "qat":
        fake_quantize_qat(model, **switches)
    else:
        fake_quantize_ptq(model, **switches)
    return model
