"""How an image becomes the pixels that a model takes: torchvision's two usual transforms, on PIL images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlib.data.normalization import IMAGENET, Normalization

if TYPE_CHECKING:
    import random

    from PIL import Image

    from quantlib.recipe.sections import Interpolation


# Resizing all of an image so much longer than wide would take unlimited memory for pixels that are then cut off.
_LONG = 8

Size = tuple[int, int]
"""Height and width in pixels."""


@dataclass(frozen=True, kw_only=True)
class _Transform:
    """What both transforms end with."""

    crop: Size
    """Size of the model's input."""
    interpolation: Interpolation = "bilinear"
    normalization: Normalization = IMAGENET
    """How the pixels become a model's input; it is left to whoever feeds the model."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return self.normalization.num_channels, *self.crop


@dataclass(frozen=True, kw_only=True)
class EvalTransform(_Transform):
    """Resize, then crop the centre."""

    resize: int | Size
    """The shorter side, or both."""

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:  # noqa: ARG002 (nothing is random)
        """A PIL image of the crop's size."""
        image = _with_channels(image, self.normalization.num_channels)
        if isinstance(self.resize, int):
            shorter = min(image.size)
            width, height = (self.resize * side // shorter for side in image.size)
        else:
            height, width = self.resize
        crop_height, crop_width = self.crop
        left, top = round((width - crop_width) / 2), round((height - crop_height) / 2)
        if isinstance(self.resize, int) and max(width, height) > _LONG * self.resize:
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + crop_width) * across, (top + crop_height) * down)
            return image.resize((crop_width, crop_height), _resampling(self.interpolation), box=box)
        resized = image.resize((width, height), _resampling(self.interpolation))
        return resized.crop((left, top, left + crop_width, top + crop_height))


@dataclass(frozen=True, kw_only=True)
class TrainTransform(_Transform):
    """A random part of the image, resized to `crop` pixels, and mirrored with probability `flip`.

    Szegedy et al. 2014 (arXiv:1409.4842), section 6: area drawn from `scale`, aspect ratio from 3/4 to 4/3.
    """

    scale: tuple[float, float]
    flip: float

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A PIL image of the crop's size."""
        from PIL.Image import Transpose

        image = _with_channels(image, self.normalization.num_channels)
        top, left, height, width = self._box(image.width, image.height, rng)
        part = image.crop((left, top, left + width, top + height))
        resized = part.resize((self.crop[1], self.crop[0]), _resampling(self.interpolation))
        return resized.transpose(Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.flip else resized

    def _box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            # Uniform in the logarithm, so that wide and tall are equally likely.
            ratio = (4 / 3) ** rng.uniform(-1, 1)
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        # No part of that shape fits: take the largest central one whose aspect ratio is allowed.
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w


Transform = EvalTransform | TrainTransform


def _with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    return image.convert("L") if num_channels == 1 else image


def _resampling(interpolation: Interpolation) -> Image.Resampling:
    # Imported here, as a transform is created long before it is applied, and often is never applied.
    from PIL.Image import Resampling

    return Resampling[interpolation.upper()]
