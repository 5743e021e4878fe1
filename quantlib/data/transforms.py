"""How an image becomes the square of pixels that a model takes: the tutorial's two transforms, on PIL images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from PIL import Image


# Resizing all of an image so much longer than wide would take unlimited memory for pixels that are then cut off.
_LONG = 8


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `resize` pixels, then crop the central square of `crop` pixels."""

    resize: int
    crop: int

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:  # noqa: ARG002 (nothing is random)
        """A PIL image of crop x crop pixels."""
        # Imported here, as a transform is created long before it is applied, and often is never applied.
        from PIL.Image import Resampling

        shorter = min(image.size)
        width, height = (self.resize * side // shorter for side in image.size)
        left, top = round((width - self.crop) / 2), round((height - self.crop) / 2)
        if max(width, height) > _LONG * self.resize:
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, (left + self.crop) * across, (top + self.crop) * down)
            return image.resize((self.crop, self.crop), Resampling.BILINEAR, box=box)
        resized = image.resize((width, height), Resampling.BILINEAR)
        return resized.crop((left, top, left + self.crop, top + self.crop))


@dataclass(frozen=True)
class TrainTransform:
    """A random part of the image, resized to `crop` pixels, and mirrored with probability `flip`.

    Szegedy et al. 2014 (arXiv:1409.4842), section 6: area drawn from `scale`, aspect ratio from 3/4 to 4/3.
    """

    crop: int
    scale: tuple[float, float]
    flip: float

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A PIL image of crop x crop pixels."""
        from PIL.Image import Resampling, Transpose

        top, left, height, width = self._box(image.width, image.height, rng)
        part = image.crop((left, top, left + width, top + height))
        resized = part.resize((self.crop, self.crop), Resampling.BILINEAR)
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
