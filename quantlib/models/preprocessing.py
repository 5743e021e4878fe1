"""How images are prepared for published weights, as their publisher says."""

from __future__ import annotations

from quantlib.data.normalization import Normalization
from quantlib.data.transforms import EvalTransform
from quantlib.recipe.sections import TORCHVISION

_DEFAULT = EvalTransform(resize=256, crop=(224, 224))


def of_weights(architecture: str, weights: str) -> EvalTransform:
    """The preprocessing that belongs to a recipe's `weights`; torchvision's usual one if the weights do not say.

    Raises:
        ModelError: If torchvision has no such weights.
    """
    if not weights.startswith(TORCHVISION):
        return _DEFAULT
    from quantlib.models.weights import find_torchvision_weights  # It imports torch.

    preset = find_torchvision_weights(architecture, weights).transforms()
    return EvalTransform(
        resize=preset.resize_size[0],
        crop=(preset.crop_size[0], preset.crop_size[0]),
        interpolation=preset.interpolation.value,
        normalization=Normalization(tuple(preset.mean), tuple(preset.std)),
    )
