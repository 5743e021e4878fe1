"""The two ends of an exported file: it may normalize pixels itself, and may give probabilities."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantlib.data.normalization import Normalization
from quantlib.recipe.interface import FLOAT, Interface

_INPUT, _NORMALIZED = "images", "normalized"
_PROBABILITIES = "probabilities"


@dataclass(frozen=True)
class Ends:
    """What a file does besides its model.

    Normalization is not folded into the first convolution: that pads with zeros, which are means and not black pixels,
    and an int8 one reads a grid of normalized values. The operations are those of `shards.to_input`, in its order, so
    that the model gets the same bits.
    """

    interface: Interface
    normalization: Normalization
    """What the file does to its pixels, if it takes pixels."""

    def add_to_script(self, model: torch.jit.ScriptModule, width: int) -> torch.jit.ScriptModule:
        """A scripted model with its ends, for images of a width in pixels."""
        return model if self.interface == FLOAT else torch.jit.script(self.add_to_module(model, width))

    def add_to_module(self, model: nn.Module, width: int) -> nn.Module:
        """A model with its ends, for images of a width in pixels."""
        if self.interface == FLOAT:
            return model
        before = [Normalize(self.normalization, width, self.interface)] if self.interface.input == "uint8" else []
        after = [nn.Softmax(1)] if self.interface.softmax else []
        return nn.Sequential(*before, model, *after).eval()

    def example(self, x: Tensor) -> Tensor:
        """An input of the model, as the file takes one like it."""
        if self.interface.input == "float":
            return x
        pixels = x.to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous() if self.interface.layout == "nhwc" else pixels

    def add_to_onnx(self, content: bytes) -> bytes:
        """An ONNX file with its ends; its input keeps its name, images."""
        if self.interface == FLOAT:
            return content
        import onnx

        model = onnx.load_from_string(content)
        if self.interface.input == "uint8":
            self._normalize(model.graph)
        if self.interface.softmax:
            (output,) = model.graph.output
            model.graph.node.append(onnx.helper.make_node("Softmax", [output.name], [_PROBABILITIES], axis=1))
            output.name = _PROBABILITIES
        written: bytes = model.SerializeToString(deterministic=True)
        return written

    def _normalize(self, graph: Any) -> None:
        from onnx import TensorProto, helper, numpy_helper

        for node in graph.node:
            for position, name in enumerate(node.input):
                if name == _INPUT:
                    node.input[position] = _NORMALIZED
        (given,) = graph.input
        given.type.tensor_type.elem_type = TensorProto.UINT8
        dims = given.type.tensor_type.shape.dim
        channels, height, width = (dim.dim_value for dim in dims[1:])
        mean, std = (np.array(each, np.float32) for each in (self.normalization.mean, self.normalization.std))
        constants = {"white": np.array(255, np.float32), "mean": mean.reshape(-1, 1, 1), "std": std.reshape(-1, 1, 1)}
        steps: list[tuple[str, list[str], dict[str, Any]]] = [
            ("Cast", [], {"to": TensorProto.FLOAT}),
            ("Div", ["white"], {}),
            ("Sub", ["mean"], {}),
            ("Div", ["std"], {}),
        ]
        if self.interface.layout == "nhwc":
            for dim, size in zip(dims[1:], (height, width, channels), strict=True):
                dim.dim_value = size
            # One image row at a time: ONNX Runtime would compute on vectors of three channels.
            constants |= {"mean": np.tile(mean, width), "std": np.tile(std, width)}
            constants |= {"rows": np.array([0, height, -1]), "pixels": np.array([0, height, width, channels])}
            steps = [("Reshape", ["rows"], {}), *steps, ("Reshape", ["pixels"], {})]
            steps.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
        graph.initializer.extend(
            numpy_helper.from_array(value, f"{_INPUT}_{name}") for name, value in constants.items()
        )
        names = [_INPUT, *(f"{_INPUT}_{number}" for number in range(1, len(steps))), _NORMALIZED]
        for number, (kind, others, attributes) in enumerate(steps):
            inputs = [names[number], *(f"{_INPUT}_{name}" for name in others)]
            graph.node.insert(number, helper.make_node(kind, inputs, [names[number + 1]], **attributes))


class Normalize(nn.Module):
    """Pixels to a model's input, as `shards.to_input` does it."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalization: Normalization, width: int, interface: Interface) -> None:
        super().__init__()
        self.is_nhwc = interface.layout == "nhwc"
        # One image row at a time: vectors of three channels would be too short for the CPU's vector units.
        self.register_buffer("mean", torch.tensor(normalization.mean).repeat(width))  # (W C,)
        self.register_buffer("std", torch.tensor(normalization.std).repeat(width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, C, H, W] or [N, H, W, C] uint8 to [N, C, H, W] float32, channels last in memory."""
        if pixels.dtype != torch.uint8:
            raise TypeError("This file takes uint8 pixels.")
        if not self.is_nhwc:
            pixels = pixels.permute(0, 2, 3, 1)
        rows = pixels.flatten(2).to(torch.float32).div_(255).sub_(self.mean).div_(self.std)  # (N, H, W C)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)
