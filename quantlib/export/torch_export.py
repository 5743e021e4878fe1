"""A model as a program of torch.export: float operations, and `quantized_decomposed` ones where it rounds.

A program stores int8 weights, and rounds activations to int8. Each is dequantized once for each operation that reads
it, and rounded again behind an operation that carries it: backends look for int8 around each operation.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from quantlib.errors import ModelError, reason_of
from quantlib.export import archive
from quantlib.export.ends import Ends
from quantlib.graph.nodes import is_layer, module_of
from quantlib.graph.plan import CONCATENATIONS, gives_new_values
from quantlib.models import quantized_decomposed
from quantlib.quantize.grids import Grid
from quantlib.quantize.preparation import is_int8

_GRAPH, _SAMPLE_INPUTS = "models/model.json", "data/sample_inputs/model.pt"


def write(model: fx.GraphModule, input_shape: tuple[int, int, int], ends: Ends | None = None) -> bytes:
    """Write a model as a file that `torch.export.load` reads, for any number of images.

    The same model gives the same bytes, none of which is a pickle.

    Args:
        model: Fused float, or quantized.
        input_shape: Channels, height and width of its input.
        ends: What the file does besides the model; None: nothing.

    Raises:
        ModelError: If torch.export cannot express it.
    """
    buffer = io.BytesIO()
    torch.export.save(program(model, input_shape, ends), buffer)
    records = archive.read(buffer.getvalue())
    saved = json.loads(records[_GRAPH])
    for node in saved["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {}  # Stack traces: they hold this machine's paths.
    records[_GRAPH] = json.dumps(saved, separators=(",", ":")).encode()
    records[_SAMPLE_INPUTS] = b""  # A pickle, which nothing needs.
    return archive.write(records)


def program(
    model: fx.GraphModule,
    input_shape: tuple[int, int, int],
    ends: Ends | None = None,
    num_images: int | None = None,
) -> ExportedProgram:
    """Export a model.

    Args:
        model: Fused float, or quantized.
        input_shape: Channels, height and width of its input.
        ends: What the program does besides the model; None: nothing.
        num_images: How many images it takes; None: any number.

    Raises:
        ModelError: If torch.export cannot express it.
    """
    whole = _lowered(model)
    x = torch.zeros(num_images or 2, *input_shape)
    if ends is not None:
        whole, x = ends.add_to_module(whole, input_shape[2]), ends.example(x)
    shapes = ({0: torch.export.Dim.DYNAMIC},) if num_images is None else None
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        # It is one operation of torch's own, which no backend knows.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            return torch.export.export(whole.eval(), (x,), dynamic_shapes=shapes)
    except Exception as error:
        raise ModelError(f"The model cannot be exported by torch.export: {reason_of(error)}") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _lowered(model: fx.GraphModule) -> nn.Module:
    """A copy of a model whose weights are stored as int8, and whose activations are rounded to int8."""
    lowered = copy.deepcopy(model)
    _round_again(lowered)
    for module in list(lowered.modules()):
        grid = getattr(module, "weight_quantizer", None)
        if isinstance(grid, Grid):
            _store_steps(module, grid)
    for node in list(lowered.graph.nodes):
        grid = module_of(lowered, node)
        if isinstance(grid, Grid):
            _dequantize_for_each(lowered, node, grid)
    for path, module in list(lowered.named_modules()):
        if isinstance(module, Grid):  # Around a layer inside a module that was taken as a whole.
            lowered.set_submodule(path, nn.Sequential(_Quantize(module), _Dequantize(module)))
    lowered.recompile()
    return lowered


def _round_again(model: fx.GraphModule) -> None:
    """Round again on the same grid where backends look for int8: behind what carries it, and before a concatenation.

    No value changes, but for means, which are carried, too.
    """
    grids: dict[fx.Node, Grid] = {}
    for node in list(model.graph.nodes):
        module = module_of(model, node)
        if isinstance(module, Grid):
            grids[node] = module
        elif is_int8(node) and node.target in CONCATENATIONS:
            (after,) = node.users
            own = model.get_submodule(str(after.target))
            for number, part in enumerate(node.all_input_nodes):
                _round(model, part, [node], f"parts.{node.name}.{number}", own)
        elif is_int8(node) and not is_layer(module) and not gives_new_values(node, model):
            grid = next((grids[each] for each in node.all_input_nodes if each in grids), None)
            readers = [user for user in node.users if is_int8(user)]
            if grid is None or not readers:
                continue
            grids[node] = grid
            if "shape" in node.meta:  # Not several tensors, of which each is taken next.
                grids[_round(model, node, readers, f"carried.{node.name}", grid)] = grid


def _round(model: fx.GraphModule, node: fx.Node, readers: Iterable[fx.Node], path: str, grid: nn.Module) -> fx.Node:
    """Let some readers of a tensor read it rounded."""
    model.add_submodule(path, grid)
    with model.graph.inserting_after(node):
        rounded = model.graph.call_module(path, (node,))
    for reader in readers:
        reader.replace_input_with(node, rounded)
    return rounded


def _store_steps(layer: Any, grid: Grid) -> None:
    stored = grid.steps(layer.weight.detach())
    del layer.weight
    layer.register_buffer("weight", stored)
    layer.weight_quantizer = _DequantizeWeight(grid)


def _dequantize_for_each(model: fx.GraphModule, node: fx.Node, grid: Grid) -> None:
    """Quantize a tensor at a node, and dequantize it once for each of its readers."""
    for number, reader in enumerate(list(node.users)):
        path = f"values.{node.name}.{number}"
        model.add_submodule(path, _Dequantize(grid))
        with model.graph.inserting_before(reader):
            reader.replace_input_with(node, model.graph.call_module(path, (node,)))
    model.set_submodule(str(node.target), _Quantize(grid))


class _Rounding(nn.Module):
    """A step of rounding an activation to a grid, shifted from uint8 to int8: all backends take that."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.operations = quantized_decomposed.operations()
        shift = 0 if grid.quant_min < 0 else 128
        steps = (int(grid.zero_point) - shift, grid.quant_min - shift, grid.quant_max - shift)
        self.grid = (float(grid.scale), *steps, torch.int8)


class _Quantize(_Rounding):
    def forward(self, x: Tensor) -> Tensor:
        """Numbers of steps, int8."""
        steps: Tensor = self.operations.quantize_per_tensor(x, *self.grid)
        return steps


class _Dequantize(_Rounding):
    def forward(self, steps: Tensor) -> Tensor:
        """The values of numbers of steps, float32."""
        x: Tensor = self.operations.dequantize_per_tensor(steps, *self.grid)
        return x


class _DequantizeWeight(nn.Module):
    """Gives the weight of a layer that stores it as int8."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.operations = quantized_decomposed.operations()
        self.range = (grid.quant_min, grid.quant_max, torch.int8)
        self.per_channel = grid.scale.dim() > 0
        self.one = () if self.per_channel else (float(grid.scale), int(grid.zero_point))
        if self.per_channel:
            self.register_buffer("scale", grid.scale)
            self.register_buffer("zero_point", grid.zero_point.long())

    def forward(self, steps: Tensor) -> Tensor:
        """The values of numbers of steps, float32."""
        x: Tensor
        if self.per_channel:
            x = self.operations.dequantize_per_channel(steps, self.scale, self.zero_point, 0, *self.range)
        else:
            x = self.operations.dequantize_per_tensor(steps, *self.one, *self.range)
        return x
