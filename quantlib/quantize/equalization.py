"""Cross-layer equalization: channels rescaled from layer to layer, so that one int8 scale suits all of them.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1. ReLU, pooling and addition pass a positive factor per channel
through unchanged, and so does attention from its values to its output: if a layer's output is divided by the factors
and the next layer's weights are multiplied by them, the model computes the same function.

A norm's output can be divided as well: SmoothQuant, Xiao et al. 2022 (arXiv:2211.10438), section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from quantlib.errors import ModelError
from quantlib.quantize.scale_groups import Producer, ScaleGroup, find_scale_groups

# Rounds continue until no factor in a round is further from 1 than this: MobileNetV2 takes 5.
_CONVERGED = 1e-3
_MAX_ROUNDS = 100
# Float32 rounding of MobileNetV2's logits, rescaled by factors of up to 1000, stays ten times below this.
_MAX_CHANGE = 1e-4


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
            if not groups or max(_equalize(group, 0.5) for group in groups) < _CONVERGED:
                break
    _check_same(model, equal, input_shape, "Set equalize = false")
    return equal.train(model.training)


def smooth(
    model: fx.GraphModule, input_shape: tuple[int, int, int], alpha: float, images: Iterable[Tensor]
) -> fx.GraphModule:
    """Copy a float model with its norms' outputs divided per channel, so that one scale suits all of their channels.

    The layers that read them are multiplied: the copy computes the same function. Norms that anything else reads stay.

    Args:
        model: Float, fused or not.
        input_shape: Channels, height and width of the model's input.
        alpha: In (0, 1]: how much of a channel's range goes over to the weights that read it.
        images: Batches [N, C, H, W] of calibration images, to measure these ranges on.

    Raises:
        ModelError: As for `equalize`.
    """
    smoothed = copy.deepcopy(model).eval()
    groups = [group for group in find_scale_groups(smoothed) if group.can_rescale()]
    groups = [group for group in groups if len(group.norms) == len(group.producers)]
    if groups:
        _find_peaks(smoothed, [norm for group in groups for norm in group.norms], images)
    with torch.no_grad():
        for group in groups:
            _equalize(group, alpha)
    _check_same(model, smoothed, input_shape, "Remove smoothing")
    return smoothed.train(model.training)


def _find_peaks(model: fx.GraphModule, norms: Sequence[Producer], images: Iterable[Tensor]) -> None:
    """Note the largest absolute value of each channel of the norms' outputs."""

    def note(norm: Producer, output: Tensor) -> None:
        dim = 1 if isinstance(norm.layer, nn.GroupNorm) else -1
        peak = output.detach().movedim(dim, -1).flatten(0, -2).abs().amax(0).double()  # (channels,)
        norm.peak = peak if norm.peak is None else torch.maximum(norm.peak, peak)

    handles = [
        norm.layer.register_forward_hook(lambda _module, _inputs, output, norm=norm: note(norm, output))
        for norm in norms
    ]
    with torch.inference_mode():
        for x in images:
            model(x)
    for handle in handles:
        handle.remove()


def _equalize(group: ScaleGroup, share: float) -> float:
    """Rescale a group's channels; returns how far from 1 the furthest factor was, as a natural logarithm.

    Nagel et al. 2019, eq. 11, s_i = sqrt(r1_i r2_i) / r2_i, with the largest range if there are several layers. For
    norms Xiao et al. 2022, eq. 4, which is the same with another share than a half.
    """
    out_range = torch.stack([each.range() for each in group.producers]).amax(0)  # (channels,)
    in_range = torch.stack([each.range(len(out_range)) for each in group.consumers]).amax(0)  # (channels,)
    # A channel with only zero weights on one side has nothing to equalize.
    kept = (out_range == 0) | (in_range == 0) | group.fixed
    factors = out_range.clamp_min(1e-300) ** share / in_range.clamp_min(1e-300) ** (1 - share)
    factors = torch.where(kept, 1.0, factors)
    for producer in group.producers:
        producer.divide(factors)
    for consumer in group.consumers:
        consumer.multiply(factors)
    return float(factors.clamp_min(1e-300).log().abs().max())


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
