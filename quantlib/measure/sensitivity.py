"""Finds which layers cost accuracy: each made int8 alone, then all but it, in float with fake quantization."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.data import shards
from quantlib.graph.nodes import calls_layer, is_layer, module_of
from quantlib.progress import Progress, silent
from quantlib.quantize import preparation, simulation
from quantlib.quantize.grids import Grid
from quantlib.quantize.layers import EnclosedLayer

# Per batch: every tensor of it is in memory at once, in float and in int8, 150 MB each for MobileNetV2.
_MAX_PIXELS = 2**17


@dataclass(frozen=True)
class _Layer:
    """What becomes int8 as one: a tensor that is rounded, and the operations since the last ones."""

    nodes: tuple[fx.Node, ...]
    """In the graph's order."""
    rounds: tuple[fx.Node, ...]
    """Those that round: more than one if the layer runs more than once."""
    name: str
    """Path of the convolution or linear layer among them; if there is none, name of the tensor."""
    type: str
    has_weight: bool


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gives."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model, garbage_collect_values=False)


@dataclass
class LayerSums:
    """Measurements of a layer, as sums over images, so that several stages' results can be added up."""

    layer: str
    """Path of the convolution or linear layer, or name of a tensor that no such layer gives."""
    type: str
    """Conv2d, Linear, or the operation that gives the tensor."""
    activation_min: float
    """Ends of its output's int8 grid."""
    activation_max: float
    weight_min: float | None = None
    """Smallest value of the float weight; None if it has no quantized weight."""
    weight_max: float | None = None
    signal: float = 0.0
    """Sum of squares of its float output."""
    noise: float = 0.0
    """Sum of squares of its output's error when all layers are int8."""
    num_values: int = 0
    """Number of values of its output."""
    num_clipped: int = 0
    """How many of those values lie outside the grid."""
    num_images: int = 0
    num_correct_float: int = 0
    """Images that are right in float: a reference for the counts below, the same for every layer."""
    num_correct_int8: int = 0
    """Images that are right with all layers int8."""
    num_correct_only: int = 0
    """Images that are right when this layer alone is int8."""
    num_correct_all_but: int = 0
    """Images that are right when every other layer is int8."""
    divergence_only: float = 0.0
    """Kullback-Leibler divergence from float's answers when this layer alone is int8, in nats."""


def measure_layers(
    reference: fx.GraphModule,
    quantized: fx.GraphModule,
    shard: Path,
    start: int,
    stop: int,
    progress: Progress = silent,
) -> list[LayerSums]:
    """Measure each layer of a quantized model.

    Args:
        reference: The float model that was quantized, fused in mode "eval". A quantized model without rounding
            would not do: its corrected biases, or trained weights, make up for rounding that is then missing.
        quantized: As `convert` makes it.
        shard: A file of decoded images.
        start: First image to use.
        stop: One past the last image; may lie past the end of the shard.
        progress: Called with (images done, images in all).
    """
    int8_model, float_model, layers, found = _start(reference, quantized)
    images = shards.open_shard(shard)
    stop = min(stop, len(images))
    _, height, width, _ = images.pixels.shape
    size = max(1, _MAX_PIXELS // (height * width))
    with torch.inference_mode():
        for first in range(start, stop, size):
            last = min(first + size, stop)
            x, y = images.inputs(first, last), images.labels[first:last]
            in_float, in_int8 = _Recorder(float_model), _Recorder(int8_model)
            before, after = in_float.run(x), in_int8.run(x)
            answers, num_float, num_int8 = before.log_softmax(1), _num_correct(before, y), _num_correct(after, y)
            for layer, sums in zip(layers, found, strict=True):
                _compare(layer, in_float.env, in_int8.env, int8_model, sums)
                alone = _run_with(in_float, layer, int8_model)
                all_but = _run_with(in_int8, layer, float_model)
                divergence = nn.functional.kl_div(alone.log_softmax(1), answers, reduction="sum", log_target=True)
                sums.divergence_only += float(divergence)
                sums.num_correct_float += num_float
                sums.num_correct_int8 += num_int8
                sums.num_correct_only += _num_correct(alone, y)
                sums.num_correct_all_but += _num_correct(all_but, y)
                sums.num_images += len(y)
            progress(last - start, stop - start)
    return found


def compare_layers(reference: fx.GraphModule, quantized: fx.GraphModule, x: Tensor) -> list[LayerSums]:
    """Compare the output of each layer with float's, all layers being int8, on images x [N, C, H, W]."""
    int8_model, float_model, layers, found = _start(reference, quantized)
    with torch.inference_mode():
        in_float, in_int8 = _Recorder(float_model), _Recorder(int8_model)
        in_float.run(x)
        in_int8.run(x)
        for layer, sums in zip(layers, found, strict=True):
            _compare(layer, in_float.env, in_int8.env, int8_model, sums)
    return found


def _start(
    reference: fx.GraphModule, quantized: fx.GraphModule
) -> tuple[fx.GraphModule, fx.GraphModule, list[_Layer], list[LayerSums]]:
    """The model in int8 and in float, its layers, and their sums, which are still 0."""
    int8_model, float_model = copy.deepcopy(quantized).eval(), _in_float(quantized, reference)
    layers = _find_layers(int8_model)
    return int8_model, float_model, layers, [_describe(int8_model, float_model, layer) for layer in layers]


def _in_float(quantized: fx.GraphModule, reference: fx.GraphModule) -> fx.GraphModule:
    """The graph of a quantized model with everything else as in the float model."""
    model = simulation.simulate(quantized, "weights")
    for path in preparation.int8_layers(model):
        place, parent = path, path.rpartition(".")[0]
        if isinstance(model.get_submodule(parent), EnclosedLayer):
            place = parent
        model.set_submodule(place, copy.deepcopy(reference.get_submodule(place)))
    # Correction changed biases, and training everything.
    model.load_state_dict(reference.state_dict(), strict=False)
    return model.eval()


def _find_layers(model: fx.GraphModule) -> list[_Layer]:
    """Every tensor that is rounded, each with the int8 operations that no other grid comes before."""
    layers: dict[str, _Layer] = {}
    for node in model.graph.nodes:
        if node.op != "call_module" or not str(node.target).startswith(f"{preparation.QUANTIZERS}."):
            continue
        chain = [node]
        while chain[-1].all_input_nodes and _continues(chain[-1], model):
            chain.append(chain[-1].all_input_nodes[0])
        first = chain[-1] if len(chain) > 1 else node.all_input_nodes[0]
        module = module_of(model, first)
        has_weight = is_layer(module) and preparation.is_int8(first)
        name = str(first.target) if has_weight else str(node.target).removeprefix(f"{preparation.QUANTIZERS}.")
        known = layers.get(name)
        # A layer that runs more than once is one layer.
        nodes = (*(known.nodes if known else ()), *reversed(chain))
        rounds = (*(known.rounds if known else ()), node)
        layers[name] = _Layer(nodes, rounds, name, _kind(first, module), has_weight)
    return list(layers.values())


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return "Conv2d" if isinstance(module, nn.Conv2d) else "Linear" if is_layer(module) else type(module).__name__
    return "input" if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))


def _continues(node: fx.Node, model: fx.GraphModule) -> bool:
    """Whether the operation before belongs to the same layer."""
    before = node.all_input_nodes[0]
    one_input = len(node.all_input_nodes) == 1 and not calls_layer(model, node)
    return one_input and preparation.is_int8(before) and len(before.users) == 1


def _describe(int8_model: fx.GraphModule, float_model: fx.GraphModule, layer: _Layer) -> LayerSums:
    ranges = [_grid(int8_model, node).range for node in layer.rounds]
    sums = LayerSums(layer.name, layer.type, min(low for low, _, _ in ranges), max(high for _, high, _ in ranges))
    if layer.has_weight:
        weight: Any = float_model.get_submodule(layer.name).weight
        sums.weight_min, sums.weight_max = (float(end) for end in weight.detach().aminmax())
    return sums


def _grid(model: fx.GraphModule, node: fx.Node) -> Grid:
    grid = module_of(model, node)
    assert isinstance(grid, Grid)
    return grid


def _compare(
    layer: _Layer,
    in_float: dict[fx.Node, Any],
    in_int8: dict[fx.Node, Any],
    int8_model: fx.GraphModule,
    sums: LayerSums,
) -> None:
    """Add up the differences of a layer's output between float and int8."""
    names = {node.name: node for node in in_float}
    for rounds in layer.rounds:
        low, high, step = _grid(int8_model, rounds).range
        reference, rounded, value = in_float[names[rounds.name]], in_int8[rounds], in_int8[rounds.all_input_nodes[0]]
        sums.signal += float(reference.square().sum())
        sums.noise += float((rounded - reference).square().sum())
        sums.num_values += value.numel()
        # Values that round to an end of the grid are inside.
        sums.num_clipped += int(((value < low - step / 2) | (value > high + step / 2)).sum())


def _num_correct(logits: Tensor, labels: Tensor) -> int:
    """How many rows of logits [n, num_classes] are highest at the label."""
    return int((logits.argmax(1) == labels).sum())


def _run_with(recorded: _Recorder, layer: _Layer, other: fx.GraphModule) -> Tensor:
    """The logits [n, num_classes] of recorded images, with one layer as another model has it.

    What comes before is not computed again, which saves more than half of the time.
    """
    model = recorded.module
    assert isinstance(model, fx.GraphModule)
    known: dict[fx.Node, Any] = {}
    for node in model.graph.nodes:
        if node.name == layer.nodes[0].name:
            break
        known[node] = recorded.env[node]
    exchanged = [str(node.target) for node in layer.nodes if node.op == "call_module"]
    own = {path: model.get_submodule(path) for path in exchanged}
    for path in exchanged:
        model.set_submodule(path, other.get_submodule(path))
    logits: Tensor = fx.Interpreter(model).run(initial_env=known)
    for path, module in own.items():
        model.set_submodule(path, module)
    return logits
