"""The images of one split, by number."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError

from quantlib.data.transforms import Transform
from quantlib.errors import DataError


@dataclass(frozen=True)
class Split:
    """The images of one split, by number.

    Attributes:
        labels: [N], int64 class indices.
        classes: Their names, in the order of the indices.
        open: Returns the N-th image as an RGB PIL image.
        name_of: What to call the N-th image in an error.
        num_skipped: Files among the images that are not images, or of a kind that is not read.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    open: Callable[[int], Image.Image] = field(repr=False)
    name_of: Callable[[int], str] = field(repr=False)
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int, transform: Transform, rng: random.Random) -> np.ndarray:
        """One image as [H, W, C] uint8.

        Raises:
            DataError: If it cannot be decoded.
        """
        try:
            pixels = np.asarray(transform(self.open(index), rng), dtype=np.uint8)
        except (
            OSError,
            UnidentifiedImageError,
            Image.DecompressionBombError,
            SyntaxError,
            ValueError,
        ) as error:
            raise DataError(
                f"Image {self.name_of(index)} cannot be decoded: {error}. "
                "Replace the file, or remove it from the dataset."
            ) from None
        return pixels if pixels.ndim == 3 else pixels[:, :, None]  # PIL leaves out the one channel of grey.
