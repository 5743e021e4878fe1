"""Cross-layer equalization: channels rescaled from layer to layer, so that one int8 scale suits all of them.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1. ReLU, pooling and addition pass a positive factor per channel
through unchanged, and so does attention from its values to its output: if a layer's output is divided by the factors
and the next layer's weights are multiplied by them, the model computes the same function.

Where weights have a scale per output channel, the ranges to make equal are those of the values in between, of a norm's
output too: SmoothQuant, Xiao et al. 2022 (arXiv:2211.10438), section 4, here for every tensor that can be rescaled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError
from quantlib.graph.nodes import module_of
from quantlib.quantize.scale_groups import ScaleGroup, find_scale_groups

# Rounds continue until no factor in a round is further from 1 than this: MobileNetV2 takes 5.
_CONVERGED = 1e-3
_MAX_ROUNDS = 100
# Float32 rounding of MobileNetV2's logits, rescaled by factors of up to 1000, stays ten times below this.
_MAX_CHANGE = 1e-4
# Images at a time when ranges are measured.
_BATCH_SIZE = 32


def equalize(model: fx.GraphModule, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """Copy a float model with the channel ranges of consecutive layers made equal; it computes the same function.

    Args:
        model: Float, fused in mode "eval" or not fused; BatchNorm that is not folded absorbs the factors, so
            the model can still be fused for training.
        input_shape: Channels, height and width of the model's input.

    Raises:
        ModelError: If the copy computes something else, because the model uses its layers differently from what its
            structure shows.
    """
    equal = copy.deepcopy(model).eval()
    groups = [group for group in find_scale_groups(equal) if group.can_rescale() and not group.norms]
    with torch.no_grad():
        for _ in range(_MAX_ROUNDS):
            if (
                not groups
                or max(_rescale(group, _largest(e.range() for e in group.producers), 0.5) for group in groups)
                < _CONVERGED
            ):
                break
    _check_same(model, equal, input_shape, "Set equalize = false")
    return equal.train(model.training)


def smooth(model: fx.GraphModule, input_shape: tuple[int, int, int], alpha: float, x: Tensor) -> fx.GraphModule:
    """Copy a float model with its tensors divided per channel, so that one scale suits the values of all channels.

    The layers that read them are multiplied: the copy computes the same function. It makes `equalize` needless where
    weights have a scale per output channel, as what is divided by then is free.

    Args:
        model: Float, fused or not.
        input_shape: Channels, height and width of the model's input.
        alpha: In (0, 1]: how much of a channel's range goes over to the weights that read it.
        x: Calibration images [N, C, H, W], to measure these ranges on.

    Raises:
        ModelError: As for `equalize`.
    """
    smoothed = copy.deepcopy(model).eval()
    groups = [group for group in find_scale_groups(smoothed) if group.can_rescale()]
    peaks = _Peaks(smoothed, groups)
    if groups:
        with torch.inference_mode():
            for batch in x.split(_BATCH_SIZE):
                peaks.run(batch)
    with torch.no_grad():
        for group in groups:
            _rescale(group, peaks.of[group], alpha, per_channel=True)
    _check_same(model, smoothed, input_shape, "Remove smoothing")
    return smoothed.train(model.training)


class _Peaks(fx.Interpreter):
    """Runs a model and notes the largest absolute value of each channel of each group."""

    def __init__(self, model: fx.GraphModule, groups: Iterable[ScaleGroup]) -> None:
        super().__init__(model)
        self.of = {group: torch.zeros(len(group.fixed), dtype=torch.float64) for group in groups}
        self._seen = {
            node: (group, channels[0])
            for group in self.of
            for node, channels in group.tensors.items()
            # A ReLU is rounded as one with what it reads.
            if not all(isinstance(module_of(model, user), nn.ReLU) for user in node.users)
        }

    def run_node(self, node: fx.Node) -> Any:
        """What the node gives."""
        result = super().run_node(node)
        if node in self._seen:
            group, channels = self._seen[node]
            self.of[group].scatter_reduce_(0, *_largest_values(result, channels), "amax")
        return result


def _largest_values(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Channels and the largest absolute value of each, of a tensor [N, ...] with a channel for each place [...].

    A channel may come more than once.
    """
    # Row by row of [N, H, W] pixels or [N, T] tokens, which is the order in memory: tens of times as fast.
    if x.dim() == 4 and (channels == channels[:, :1, :1]).all():
        x, channels = x.permute(0, 2, 3, 1).flatten(0, 2), channels[:, 0, 0]
    elif x.dim() == 3 and (channels == channels[:1]).all():
        x, channels = x.flatten(0, 1), channels[0]
    return channels.flatten(), torch.maximum(x.amax(0), -x.amin(0)).flatten().double()


def _rescale(group: ScaleGroup, ranges: Tensor, share: float, *, per_channel: bool = False) -> float:
    """Rescale a group's channels, whose values or producers have these ranges [channels].

    Returns how far from 1 the furthest factor was, as a natural logarithm. Nagel et al. 2019, eq. 11,
    s_i = sqrt(r1_i r2_i) / r2_i, with the largest range if there are several layers; Xiao et al. 2022, eq. 4, is the
    same with another share than a half.
    """
    in_ranges = _largest(each.range(len(ranges), per_channel=per_channel) for each in group.consumers)
    # A channel with only zeros on one side has nothing to equalize.
    kept = (ranges == 0) | (in_ranges == 0) | group.fixed
    factors = ranges.clamp_min(1e-300) ** share / in_ranges.clamp_min(1e-300) ** (1 - share)
    factors = torch.where(kept, 1.0, factors)
    for producer in group.producers:
        producer.divide(factors)
    for consumer in group.consumers:
        consumer.multiply(factors)
    return float(factors.clamp_min(1e-300).log().abs().max())


def _largest(ranges: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(ranges)).amax(0)


def _check_same(model: nn.Module, equal: nn.Module, input_shape: tuple[int, int, int], advice: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *input_shape, generator=generator)
    original = copy.deepcopy(model).eval()
    with torch.inference_mode():
        logits = original(x)
        change = float((equal(x) - logits).abs().max() / logits.abs().max().clamp_min(1.0))
    if not change <= _MAX_CHANGE:
        raise ModelError(
            f"Equalization changed the model's logits by {change:.1e} (rounding explains at most {_MAX_CHANGE:.0e}): "
            f"its forward() uses layers in a way that their order does not show. {advice} in the recipe."
        )
