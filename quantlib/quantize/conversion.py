"""Conversion: a calibrated or trained model becomes the quantized model, which every file is written from.

It is float weights, biases and grids, nothing more: it computes in float what int8 arithmetic computes, and knows of no
runtime.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from quantlib.graph.fusion import ConvBatchNorm2d, recast
from quantlib.quantize.fake_quantization import ActivationFakeQuantize, WeightFakeQuantize
from quantlib.quantize.grids import weight_grid
from quantlib.quantize.layers import quantized
from quantlib.quantize.preparation import int8_layers, quantizers
from quantlib.recipe.scheme import Scheme


def convert(prepared: fx.GraphModule, scheme: Scheme, *, inplace: bool = False) -> fx.GraphModule:
    """Fix every grid of a calibrated or quantization-aware trained model, or of a copy of it, and fold BatchNorm."""
    model = prepared if inplace else copy.deepcopy(prepared)
    # Training leaves weights in another order in memory, which would be stored along with them.
    model.to(memory_format=torch.contiguous_format)
    for path in int8_layers(model):
        layer: Any = model.get_submodule(path)
        own = getattr(layer, "weight_quantizer", None)
        if isinstance(layer, ConvBatchNorm2d):
            layer = _folded(layer)
        grid = (
            own.grid()
            if isinstance(own, WeightFakeQuantize)
            else weight_grid(layer.weight, per_channel=scheme.weights == "per_channel")
        )
        model.set_submodule(path, quantized(layer, grid))
    for path, layer in list(model.named_modules()):
        if isinstance(layer, ConvBatchNorm2d):  # One that stays float.
            model.set_submodule(path, _folded(layer))
    for path, quantizer in quantizers(model).items():
        if isinstance(quantizer, ActivationFakeQuantize):
            model.set_submodule(path, quantizer.grid())
            if quantizer.fuses_relu:
                _restore_relu(model, path)
    return model.eval()


def _folded(layer: ConvBatchNorm2d) -> nn.Conv2d:
    """A plain convolution that does what one with BatchNorm does in inference."""
    plain = recast(layer, nn.Conv2d)
    weight, bias = layer.folded()
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    return plain


def _restore_relu(model: fx.GraphModule, path: str) -> None:
    (quantizer,) = (node for node in model.graph.nodes if node.target == path)
    model.set_submodule(str(quantizer.all_input_nodes[0].target), nn.ReLU())
