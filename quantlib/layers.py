"""Which layers cost accuracy: each made int8 alone, and all made int8 but it, in float with fake quantization."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib import backend, images, preparation, simulation
from quantlib.backend import FuseMode
from quantlib.progress import Progress, silent

# Of a batch: every layer's float output for it is in memory at once, 150 MB of MobileNetV2's.
_MAX_PIXELS = 2**18


@dataclass(frozen=True)
class _Layer:
    """One layer, twice: what is exchanged to have it in float or in int8."""

    in_float: nn.Module
    in_int8: nn.Module
    grid: backend.FixedFakeQuantize
    """Rounds the output of `in_int8`."""


@dataclass
class LayerSums:
    """What was measured of a layer, as sums over images, so that those of several stages add up."""

    layer: str
    """Its dotted path in the fused model."""
    type: str
    """Its class, as ConvReLU2d."""
    weight_min: float | None = None
    """Of the float weight; None where it has none that is quantized."""
    weight_max: float | None = None
    activation_min: float | None = None
    """Ends of its output's int8 grid; None where its output is not quantized."""
    activation_max: float | None = None
    signal: float = 0.0
    """Squares of its float output."""
    noise: float = 0.0
    """Squares of what its output is off by, where all layers are int8."""
    num_values: int = 0
    """Of its output."""
    num_clipped: int = 0
    """Values of them that lie outside the grid."""
    num_images: int = 0
    num_correct_only: int = 0
    """Images that are right when this layer alone is int8."""
    num_correct_all_but: int = 0
    """Likewise, when every other layer is."""
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
        reference: The float model that was quantized, fused in mode "eval". What a prepared model computes without
            rounding would not do: its corrected biases, or trained weights, make up for rounding that is then not
            there.
        prepared: As `preparation.prepare` makes it; its ranges are found.
        mode: In which it was prepared.
        shard: A file of decoded images.
        start: First image of it.
        stop: One past the last; what the shard does not have is left out.
        progress: Called with (images done, images in all).
    """
    float_model, int8_model = copy.deepcopy(reference).eval(), simulation.simulate(prepared, mode, "both")
    layers = _find_layers(float_model, int8_model)
    found = {path: _describe(path, layer) for path, layer in layers.items()}
    pixels, labels = images.open_shard(shard)
    stop = min(stop, len(labels))
    size = max(1, _MAX_PIXELS // (pixels.shape[1] * pixels.shape[2]))
    with torch.inference_mode():
        for first in range(start, stop, size):
            last = min(first + size, stop)
            x, y = images.to_input(pixels[first:last]), labels[first:last]
            answers = _compare_outputs(float_model, int8_model, x, layers, found)
            for path, layer in layers.items():
                sums = found[path]
                alone = _run_with(float_model, path, layer.in_int8, x)
                all_but = _run_with(int8_model, path, layer.in_float, x)
                divergence = nn.functional.kl_div(alone.log_softmax(1), answers, reduction="sum", log_target=True)
                sums.divergence_only += float(divergence)
                sums.num_correct_only += int((alone.argmax(1) == y).sum())
                sums.num_correct_all_but += int((all_but.argmax(1) == y).sum())
                sums.num_images += len(y)
            progress(last - start, stop - start)
    return list(found.values())


def _find_layers(float_model: nn.Module, int8_model: nn.Module) -> dict[str, _Layer]:
    """Every layer whose output is quantized, by its path; what is kept in float is one with the grid behind it."""
    modules = dict(float_model.named_modules())
    layers: dict[str, _Layer] = {}
    for inner, module in int8_model.named_modules():
        grid = getattr(module, "activation_post_process", None)
        if isinstance(grid, backend.FixedFakeQuantize):
            path = inner
            while path not in modules:
                path = path.rpartition(".")[0]
            layers[path] = _Layer(modules[path], int8_model.get_submodule(path), grid)
    return layers


def _describe(path: str, layer: _Layer) -> LayerSums:
    low, high, _ = layer.grid.grid
    sums = LayerSums(path, type(layer.in_float).__name__, activation_min=low, activation_max=high)
    own = layer.in_float[0] if isinstance(layer.in_float, backend.FusedModule) else layer.in_float
    if isinstance(own, nn.Conv2d | nn.Linear) and not isinstance(layer.in_int8, preparation.KeptInFloat):
        sums.weight_min, sums.weight_max = (float(end) for end in own.weight.detach().aminmax())
    return sums


def _compare_outputs(
    float_model: nn.Module, int8_model: nn.Module, x: Tensor, layers: Mapping[str, _Layer], found: dict[str, LayerSums]
) -> Tensor:
    """Run x [n, 3, H, W] in float and in int8, and add up what differs; float's log-probabilities [n, num_classes]."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in layers}
    seen: Tensor | None = None

    def compare(path: str, grid: backend.FixedFakeQuantize, value: Tensor, rounded: Tensor) -> None:
        nonlocal seen
        again, seen = value is seen, rounded
        if again:
            return  # A fused module is a Sequential: its observer is the last part of it, and hooked behind it, too.
        sums, reference = found[path], outputs[path].pop(0)
        low, high, step = grid.grid
        sums.signal += float(reference.square().sum())
        sums.noise += float((rounded - reference).square().sum())
        sums.num_values += value.numel()
        # What rounds to an end of the grid is inside.
        sums.num_clipped += int(((value < low - step / 2) | (value > high + step / 2)).sum())

    handles = [
        _place_of_output(layer.in_float).register_forward_hook(
            lambda _module, _inputs, output, path=path: outputs[path].append(output)
        )
        for path, layer in layers.items()
    ]
    handles += [
        layer.grid.register_forward_hook(
            lambda grid, inputs, rounded, path=path: compare(path, grid, inputs[0], rounded)
        )
        for path, layer in layers.items()
    ]
    answers = float_model(x).log_softmax(1)
    int8_model(x)
    for handle in handles:
        handle.remove()
    return answers


def _place_of_output(layer: nn.Module) -> nn.Module:
    """The module whose forward gives a float layer's output: FloatFunctional has methods for that, and no forward."""
    return layer.activation_post_process if isinstance(layer, backend.FloatFunctional) else layer


def _run_with(model: nn.Module, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    """The logits [n, num_classes] of x [n, 3, H, W] with another module in the place of one layer."""
    own = model.get_submodule(path)
    model.set_submodule(path, layer)
    logits = model(x)
    model.set_submodule(path, own)
    return logits
