"""int8 accuracy without int8 kernels: the quantized model computes in float, with all of its rounding or some."""

import copy
from typing import Any, Literal

from torch import fx, nn

from quantlib.quantize.preparation import int8_layers, quantizers

Parts = Literal["both", "weights", "activations"]


def simulate(quantized: fx.GraphModule, parts: Parts) -> fx.GraphModule:
    """A copy of a quantized model, or of a calibrated one with its weights still in float, that rounds some parts.

    Args:
        quantized: As `convert` makes it.
        parts: What is rounded; the rest stays in float, which shows what the rounded part costs.
    """
    model = copy.deepcopy(quantized).eval()
    if parts == "activations":
        for path in int8_layers(model):
            layer: Any = model.get_submodule(path)
            layer.weight_quantizer = nn.Identity()
    if parts == "weights":
        for path in quantizers(model):
            model.set_submodule(path, nn.Identity())
    return model
