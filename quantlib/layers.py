"""Which layers cost accuracy: each made int8 alone, and all made int8 but it, in float with fake quantization."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlib import backend, images
from quantlib.backend import Switch
from quantlib.progress import Progress, silent

# Of a batch: every layer's float output for it is in memory at once, 150 MB of MobileNetV2's.
_MAX_PIXELS = 2**18


@dataclass
class LayerSums:
    """What was measured of a layer, as sums over images, so that those of several stages add up."""

    layer: str
    """Its dotted path in the fused model."""
    type: str
    """Its class, as ConvReLU2d."""
    weight_min: float | None = None
    """Of the float weight; None where it has none."""
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
    prepared: nn.Module, shard: Path, start: int, stop: int, progress: Progress = silent
) -> list[LayerSums]:
    """Measure each layer of a calibrated or quantization-aware trained model.

    Args:
        prepared: As `preparation.prepare` makes it, in either mode; its ranges are found.
        shard: A file of decoded images.
        start: First image of it.
        stop: One past the last; what the shard does not have is left out.
        progress: Called with (images done, images in all).
    """
    model = copy.deepcopy(prepared).eval()
    switches = backend.put_switches(model)
    found = {path: LayerSums(path, kind) for path, (kind, _) in switches.items()}
    layers = {path: own for path, (_, own) in switches.items()}
    pixels, labels = images.open_shard(shard)
    stop = min(stop, len(labels))
    size = max(1, _MAX_PIXELS // (pixels.shape[1] * pixels.shape[2]))
    with torch.inference_mode():
        for first in range(start, stop, size):
            last = min(first + size, stop)
            x, y = images.to_input(pixels[first:last]), labels[first:last]
            answers = _compare_outputs(model, x, layers, found)
            _quantize_in_turn(model, x, y, layers, found, answers)
            progress(last - start, stop - start)
    return list(found.values())


def _compare_outputs(
    model: nn.Module, x: Tensor, layers: dict[str, list[Switch]], found: dict[str, LayerSums]
) -> Tensor:
    """Run x [n, 3, H, W] in float and in int8, and add up what differs; float's log-probabilities [n, num_classes]."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in layers}

    def keep(path: str, switch: Switch, value: Tensor) -> None:
        if not switch.of_weight:
            outputs[path].append(value)
        else:
            found[path].weight_min, found[path].weight_max = (float(end) for end in value.aminmax())

    def compare(path: str, switch: Switch, value: Tensor, rounded: Tensor) -> None:
        if switch.of_weight:
            return
        sums, reference = found[path], outputs[path].pop(0)
        low, high, step = switch.grid
        sums.activation_min, sums.activation_max = low, high
        sums.signal += float(reference.square().sum())
        sums.noise += float((rounded - reference).square().sum())
        sums.num_values += value.numel()
        # What rounds to an end of the grid is inside.
        sums.num_clipped += int(((value < low - step / 2) | (value > high + step / 2)).sum())

    _switch(layers, on=False)
    handles = [
        switch.register_forward_hook(lambda s, args, _, path=path: keep(path, s, args[0]))
        for path, own in layers.items()
        for switch in own
    ]
    answers = model(x).log_softmax(1)
    for handle in handles:
        handle.remove()
    _switch(layers, on=True)
    handles = [
        switch.register_forward_hook(lambda s, args, rounded, path=path: compare(path, s, args[0], rounded))
        for path, own in layers.items()
        for switch in own
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return answers


def _quantize_in_turn(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    layers: dict[str, list[Switch]],
    found: dict[str, LayerSums],
    answers: Tensor,
) -> None:
    """Run x [n, 3, H, W] with each layer int8 alone, then with all but it; `answers` are float's."""
    for alone in (True, False):
        _switch(layers, on=not alone)
        for path, own in layers.items():
            _switch({path: own}, on=alone)
            logits = model(x)
            _switch({path: own}, on=not alone)
            num_correct = int((logits.argmax(1) == labels).sum())
            sums = found[path]
            if alone:
                divergence = nn.functional.kl_div(logits.log_softmax(1), answers, reduction="sum", log_target=True)
                sums.divergence_only += float(divergence)
                sums.num_correct_only += num_correct
                sums.num_images += len(labels)
            else:
                sums.num_correct_all_but += num_correct


def _switch(layers: dict[str, list[Switch]], *, on: bool) -> None:
    for own in layers.values():
        for switch in own:
            switch.on = on
