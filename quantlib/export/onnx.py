"""A model as ONNX: the graph of its architecture, with its weights and grids filled in."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from torch import fx

from quantlib.errors import ModelError
from quantlib.export.onnx_draft import ACTIVATION, DOMAIN, NAME, PARAMETER, WEIGHT
from quantlib.graph.nodes import calls_layer, module_of
from quantlib.graph.plan import ADDITIONS
from quantlib.quantize.grids import Grid
from quantlib.quantize.preparation import QUANTIZERS, is_int8

# A Protocol Buffers message has at most 2 GiB; the graph itself takes a little.
_MAX_SIZE = 2**31 - 2**24


def write_onnx(draft: bytes, model: fx.GraphModule, runtime: str) -> bytes:
    """Write a model as ONNX, for any number of images; int8 as QuantizeLinear and DequantizeLinear.

    The same model gives the same bytes.

    Args:
        draft: The graph of its architecture.
        model: Fused float, or quantized.
        runtime: The runtime that will run the file, onnxruntime or openvino: it decides what is rounded.

    Raises:
        ModelError: If the graph holds a weight of another model, or the file would be larger than ONNX allows.
    """
    import onnx

    written = onnx.load_from_string(draft)
    _Filling(written.graph, model, _rounded_for(runtime, model)).fill()
    others = [each for each in written.opset_import if each.domain != DOMAIN]
    del written.opset_import[:]
    written.opset_import.extend(others)
    content: bytes = written.SerializeToString(deterministic=True)
    return content


def _rounded_for(runtime: str, model: fx.GraphModule) -> set[str]:
    """Names of the tensors that are rounded in a file for a runtime.

    ONNX Runtime computes a layer in int8 only if its output is rounded, too; OpenVINO is faster without that, except
    where int8 arithmetic reads the output, and in a sum of two layers: it adds one to the other in place, in the
    other's type.
    """
    grids = {
        node: str(node.target).removeprefix(f"{QUANTIZERS}.")
        for node in model.graph.nodes
        if isinstance(module_of(model, node), Grid)
    }
    if runtime == "onnxruntime":
        return set(grids.values())
    rounded = {node for node in grids if _is_read_by_layer(model, node)}
    for node in model.graph.nodes:
        if node.target in ADDITIONS and set(node.args) <= grids.keys() - rounded:
            rounded.add(node.args[-1])
    return {grids[node] for node in rounded}


def _is_read_by_layer(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an int8 layer reads a rounded tensor, with no other grid between."""
    waiting, seen = list(node.users), set()
    while waiting:
        each = waiting.pop()
        if each in seen or not is_int8(each):
            continue
        seen.add(each)
        if calls_layer(model, each):
            return True
        waiting += each.users
    return False


class _Filling:
    """Replaces the marks of a graph by roundings, and its constants by a model's values."""

    def __init__(self, graph: Any, model: fx.GraphModule, rounded: Collection[str]) -> None:
        self.graph, self.model, self.rounded = graph, model, rounded
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.renamed: dict[str, str] = {}

    def fill(self) -> None:
        """Do it, in place."""
        from onnx import numpy_helper

        state = {name: value.numpy() for name, value in self.model.state_dict().items()}
        for initializer in self.graph.initializer:
            values = state.get(initializer.name)
            if values is None:
                values = numpy_helper.to_array(initializer)
            elif list(values.shape) != list(initializer.dims):
                raise ModelError(f"The graph's {initializer.name} is of another model.")
            self.initializers[initializer.name] = values
        readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        for node in list(self.graph.node):
            for position, name in enumerate(node.input):
                node.input[position] = self.renamed.get(name, name)
            kind, name = f"{node.domain}::{node.op_type}", _name_of(node)
            if kind == ACTIVATION:
                self._round_activation(node, name)
            elif kind == PARAMETER:
                self.renamed[node.output[0]] = node.input[0]
            elif kind == WEIGHT:
                self._round_weight(node, name, readers[node.output[0]])
            elif node.output[0] not in self.renamed:
                self.nodes.append(node)
        self._write()

    def _round_activation(self, mark: Any, name: str) -> None:
        if name not in self.rounded:
            self.renamed[mark.output[0]] = mark.input[0]
            return
        grid = self.model.get_submodule(f"{QUANTIZERS}.{name}")
        assert isinstance(grid, Grid)
        self._add_grid(name, grid)
        constants = [f"{name}_scale", f"{name}_zero_point"]
        self._add("QuantizeLinear", [mark.input[0], *constants], f"{name}_int8")
        self._add("DequantizeLinear", [f"{name}_int8", *constants], mark.output[0])

    def _round_weight(self, mark: Any, path: str, readers: list[Any]) -> None:
        layer: Any = self.model.get_submodule(path)
        grid = getattr(layer, "weight_quantizer", None)
        name = f"{path}.weight"
        if not isinstance(grid, Grid):
            self.renamed[mark.output[0]] = mark.input[0]
            return
        stored, axis, output = grid.steps(layer.weight.detach()).numpy(), 0, mark.output[0]
        self.initializers.pop(mark.input[0], None)
        if len(readers) == 1 and readers[0].op_type == "Transpose":
            # Of a layer over tokens: runtimes look for int8 right before the product.
            stored, axis, output = np.ascontiguousarray(stored.T), 1, readers[0].output[0]
            self.renamed[output] = output
        self.initializers[f"{name}_int8"] = stored
        self._add_grid(name, grid)
        attributes = {"axis": axis} if grid.scale.dim() else {}
        self._add("DequantizeLinear", [f"{name}_int8", f"{name}_scale", f"{name}_zero_point"], output, **attributes)

    def _add_grid(self, name: str, grid: Grid) -> None:
        self.initializers[f"{name}_scale"] = grid.scale.numpy()
        kind = np.int8 if grid.quant_min < 0 else np.uint8
        self.initializers[f"{name}_zero_point"] = grid.zero_point.numpy().astype(kind)

    def _add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}_{kind}", **attributes))

    def _write(self) -> None:
        from onnx import numpy_helper

        for output in self.graph.output:
            if output.name in self.renamed:
                self._add("Identity", [self.renamed[output.name]], output.name)
        used = {name for node in self.nodes for name in node.input}
        size = sum(values.nbytes for name, values in self.initializers.items() if name in used)
        if size > _MAX_SIZE:
            raise ModelError(f"The weights take {size / 1e9:.1f} GB, and an ONNX file holds at most 2 GB.")
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(
            numpy_helper.from_array(values, name) for name, values in self.initializers.items() if name in used
        )


def _name_of(mark: Any) -> str:
    return next((each.s.decode() for each in mark.attribute if each.name == NAME), "")
