"""How images are prepared for published weights, as their publisher says."""

from __future__ import annotations

import math
from typing import cast

from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform
from quantlib.errors import ModelError
from quantlib.recipe.sections import TIMM, TORCHVISION, Interpolation

_DEFAULT = EvalTransform(resize=256, crop=(224, 224))


def of_weights(architecture: str, weights: str | None) -> EvalTransform:
    """The preprocessing that belongs to a recipe's `weights`; torchvision's usual one if the weights do not say.

    Raises:
        ModelError: If torchvision or timm has no such weights, or images would need a border.
        MachineError: If timm is needed, and not installed.
    """
    if weights is None or not weights.startswith((TIMM, TORCHVISION)):
        return _DEFAULT
    if weights.startswith(TIMM):
        return _of_timm(architecture, weights)
    from quantlib.models.weights import find_torchvision_weights  # It imports torch.

    preset = find_torchvision_weights(architecture, weights).transforms()
    return EvalTransform(
        resize=preset.resize_size[0],
        crop=(preset.crop_size[0], preset.crop_size[0]),
        interpolation=preset.interpolation.value,
        normalization=Normalization(tuple(preset.mean), tuple(preset.std)),
    )


def _of_timm(architecture: str, weights: str) -> EvalTransform:
    from quantlib.models.weights import find_timm_weights

    published = find_timm_weights(architecture, weights)
    size = published.test_input_size or published.input_size
    _, height, width = size
    # As timm's own evaluation: the crop is this share of the resized image.
    share = published.test_crop_pct or published.crop_pct
    if published.crop_mode == "border":
        raise ModelError(
            f"model.weights = {weights!r} takes images with a border around them, which quantflow does not do: take "
            'other weights, or give them as a file (.pth or .safetensors) with your own "resize" and "crop".'
        )
    both_sides = math.floor(height / share), math.floor(width / share)
    return EvalTransform(
        resize=both_sides if published.crop_mode == "squash" else math.floor(min(height, width) / share),
        crop=(height, width),
        interpolation=cast("Interpolation", published.interpolation),
        normalization=Normalization(tuple(published.mean), tuple(published.std)),
    )
