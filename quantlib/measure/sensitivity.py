"""Finds which layers cost accuracy: each made int8 alone, then all but it, in float with fake quantization."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.data import shards
from quantlib.eager.modules import FloatFunctional, FusedModule
from quantlib.eager.rounding import FixedFakeQuantize
from quantlib.progress import Progress, silent
from quantlib.quantize import preparation, simulation
from quantlib.recipe.scheme import FuseMode

# Per batch: every layer's output for it is in memory at once, in float and in int8, 150 MB each for MobileNetV2.
_MAX_PIXELS = 2**18


@dataclass(frozen=True)
class _Layer:
    """One layer in two forms, swapped to run it in float or in int8."""

    in_float: nn.Module
    in_int8: nn.Module
    grid: FixedFakeQuantize
    """Rounds the output of `in_int8`."""


class _Outputs:
    """Each layer's outputs for a batch, in the order of its calls."""

    def __init__(self) -> None:
        self.by_layer: dict[str, list[Tensor]] = {}
        self._first: dict[str, int] = {}
        self._last: dict[str, int] = {}
        self._num_calls = 0

    def add(self, path: str, output: Tensor) -> None:
        """Record the output of a call."""
        self._num_calls += 1
        self._first.setdefault(path, self._num_calls)
        self._last[path] = self._num_calls
        self.by_layer.setdefault(path, []).append(output)

    def before(self, path: str) -> list[str]:
        """The layers that have finished when this one begins: nothing done to it changes their outputs."""
        # A layer that the model never calls has none.
        return [other for other, last in self._last.items() if last < self._first.get(path, 0)]


class _Replay(nn.Module):
    """Replaces a layer, and replays its outputs."""

    def __init__(self, outputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._outputs = iter(outputs)

    def forward(self, *_: Any) -> Tensor:
        """The next output."""
        return next(self._outputs)


@dataclass
class LayerSums:
    """Measurements of a layer, as sums over images, so that several stages' results can be added up."""

    layer: str
    """Its dotted path in the fused model."""
    type: str
    """Its class, such as ConvReLU2d."""
    weight_min: float | None = None
    """Smallest value of the float weight; None if it has no quantized weight."""
    weight_max: float | None = None
    activation_min: float | None = None
    """Ends of its output's int8 grid; None if its output is not quantized."""
    activation_max: float | None = None
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
    reference: nn.Module,
    prepared: nn.Module,
    mode: FuseMode,
    shard: Path,
    start: int,
    stop: int,
    progress: Progress = silent,
) -> list[LayerSums]:
    """Measure each layer of a calibrated or quantization-aware trained model.

    Args:
        reference: The float model that was quantized, fused in mode "eval". A prepared model without rounding
            would not do: its corrected biases, or trained weights, make up for rounding that is then missing.
        prepared: Made by `preparation.prepare`, with its ranges already found.
        mode: The mode it was prepared in.
        shard: A file of decoded images.
        start: First image to use.
        stop: One past the last image; may lie past the end of the shard.
        progress: Called with (images done, images in all).
    """
    float_model, int8_model = copy.deepcopy(reference).eval(), simulation.simulate(prepared, mode, "both")
    for model in (float_model, int8_model):
        _keep_outputs(model)
    layers = _find_layers(float_model, int8_model)
    found = {path: _describe(path, layer) for path, layer in layers.items()}
    images = shards.open_shard(shard)
    stop = min(stop, len(images))
    _, height, width, _ = images.pixels.shape
    size = max(1, _MAX_PIXELS // (height * width))
    with torch.inference_mode():
        for first in range(start, stop, size):
            last = min(first + size, stop)
            x, y = images.inputs(first, last), images.labels[first:last]
            before, after, in_float, in_int8 = _compare_outputs(float_model, int8_model, x, layers, found)
            answers, num_float, num_int8 = before.log_softmax(1), _num_correct(before, y), _num_correct(after, y)
            for path, layer in layers.items():
                sums = found[path]
                alone = _run_with(float_model, path, layer.in_int8, in_float, x)
                all_but = _run_with(int8_model, path, layer.in_float, in_int8, x)
                divergence = nn.functional.kl_div(alone.log_softmax(1), answers, reduction="sum", log_target=True)
                sums.divergence_only += float(divergence)
                sums.num_correct_float += num_float
                sums.num_correct_int8 += num_int8
                sums.num_correct_only += _num_correct(alone, y)
                sums.num_correct_all_but += _num_correct(all_but, y)
                sums.num_images += len(y)
            progress(last - start, stop - start)
    return list(found.values())


def _find_layers(float_model: nn.Module, int8_model: nn.Module) -> dict[str, _Layer]:
    """Every layer whose output is quantized, by its path; one kept in float counts along with the grid after it."""
    modules = dict(float_model.named_modules())
    layers: dict[str, _Layer] = {}
    for inner, module in int8_model.named_modules():
        grid = getattr(module, "activation_post_process", None)
        if isinstance(grid, FixedFakeQuantize):
            path = inner
            while path not in modules:
                path = path.rpartition(".")[0]
            layers[path] = _Layer(modules[path], int8_model.get_submodule(path), grid)
    return layers


def _describe(path: str, layer: _Layer) -> LayerSums:
    low, high, _ = layer.grid.grid
    sums = LayerSums(path, type(layer.in_float).__name__, activation_min=low, activation_max=high)
    own = layer.in_float[0] if isinstance(layer.in_float, FusedModule) else layer.in_float
    if isinstance(own, nn.Conv2d | nn.Linear) and not isinstance(layer.in_int8, preparation.KeptInFloat):
        sums.weight_min, sums.weight_max = (float(end) for end in own.weight.detach().aminmax())
    return sums


def _keep_outputs(model: nn.Module) -> None:
    """Keep ReLUs from overwriting the output of the layer before them in place."""
    for module in model.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False


def _compare_outputs(
    float_model: nn.Module, int8_model: nn.Module, x: Tensor, layers: Mapping[str, _Layer], found: dict[str, LayerSums]
) -> tuple[Tensor, Tensor, _Outputs, _Outputs]:
    """Run x [n, 3, H, W] in float and in int8, and add up the differences.

    Returns:
        Logits [n, num_classes] in float and in int8, then the layers' outputs in float and in int8.
    """
    in_float, in_int8 = _Outputs(), _Outputs()
    seen: Tensor | None = None

    def compare(path: str, grid: FixedFakeQuantize, value: Tensor, rounded: Tensor) -> None:
        nonlocal seen
        again, seen = value is seen, rounded
        if again:
            return  # A fused module is a Sequential: its observer is its last part, and also hooked after it.
        in_int8.add(path, rounded)
        sums, reference = found[path], in_float.by_layer[path][len(in_int8.by_layer[path]) - 1]
        low, high, step = grid.grid
        sums.signal += float(reference.square().sum())
        sums.noise += float((rounded - reference).square().sum())
        sums.num_values += value.numel()
        # Values that round to an end of the grid are inside.
        sums.num_clipped += int(((value < low - step / 2) | (value > high + step / 2)).sum())

    handles = [
        _place_of_output(layer.in_float).register_forward_hook(
            lambda _module, _inputs, output, path=path: in_float.add(path, output)
        )
        for path, layer in layers.items()
    ]
    handles += [
        layer.grid.register_forward_hook(
            lambda grid, inputs, rounded, path=path: compare(path, grid, inputs[0], rounded)
        )
        for path, layer in layers.items()
    ]
    before, after = float_model(x), int8_model(x)
    for handle in handles:
        handle.remove()
    return before, after, in_float, in_int8


def _num_correct(logits: Tensor, labels: Tensor) -> int:
    """How many rows of logits [n, num_classes] are highest at the label."""
    return int((logits.argmax(1) == labels).sum())


def _place_of_output(layer: nn.Module) -> nn.Module:
    """The module whose forward returns a float layer's output: FloatFunctional itself has methods but no forward."""
    return layer.activation_post_process if isinstance(layer, FloatFunctional) else layer


def _run_with(model: nn.Module, path: str, layer: nn.Module, known: _Outputs, x: Tensor) -> Tensor:
    """The logits [n, num_classes] of x [n, 3, H, W] with one layer replaced by another module.

    Earlier layers replay their outputs from the unchanged model, which saves more than half of the time.
    """
    exchanged = {path: layer}
    for other in known.before(path):
        # FloatFunctional has no forward, and adding is cheap.
        if not isinstance(model.get_submodule(other), FloatFunctional):
            exchanged[other] = _Replay(known.by_layer[other])
    own = {place: model.get_submodule(place) for place in exchanged}
    for place, module in exchanged.items():
        model.set_submodule(place, module)
    logits = model(x)
    for place, module in own.items():
        model.set_submodule(place, module)
    return logits
