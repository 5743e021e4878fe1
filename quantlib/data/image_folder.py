"""Folders of image files, and how one file becomes an image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from quantlib.data.images import Split
from quantlib.errors import DataError

if TYPE_CHECKING:
    from quantlib.data.split import SplitName

# Those of torchvision's ImageFolder, and two that it ignores.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif")


# What editors and archivers leave beside the data.
_NO_CLASSES = ("__MACOSX",)


_ORIENTATION = 0x0112  # EXIF's tag.


_MAX_16_BITS = 2**16 - 1


def open_image_folder(root: Path, split: SplitName) -> Split:
    """The split that torchvision's ImageFolder would find; importing torchvision takes more than a second."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"No folder {folder}: data.root must hold train/CLASS/IMAGE and val/CLASS/IMAGE.")
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_shown(entry.name)))
    if not classes:
        raise DataError(f"Folder {folder} has no classes: it must hold one folder per class, with its images inside.")
    samples, num_skipped = [], 0
    for label, name in enumerate(classes):
        found = _shown_files(folder / name)
        paths = [path for path in found if path.lower().endswith(_IMAGE_SUFFIXES)]
        num_skipped += len(found) - len(paths)
        if not paths:
            raise DataError(
                f"Folder {folder} has a class without images: {name} needs files whose names end in one of "
                f"{', '.join(_IMAGE_SUFFIXES)}. Add some, or remove the class from train and val."
            )
        samples += [(path, label) for path in paths]
    return replace(split_of_files(samples, classes), num_skipped=num_skipped)


def find_images(folder: Path) -> list[str]:
    """The image files below a folder, in order; hidden files and folders are left out.

    Raises:
        DataError: If there are none.
    """
    paths = [path for path in _shown_files(folder) if path.lower().endswith(_IMAGE_SUFFIXES)]
    if not paths:
        raise DataError(
            f"Folder {folder} has no images: they have names that end in one of {', '.join(_IMAGE_SUFFIXES)}."
        )
    return paths


def _shown_files(folder: Path) -> list[str]:
    """All files below a folder, in order, except hidden ones and those in hidden folders."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = filter(_is_shown, folders)
        found.append((place, sorted(filter(_is_shown, files))))
    return [f"{place}/{file}" for place, files in sorted(found) for file in files]


def _is_shown(name: str) -> bool:
    """Whether a file or folder is part of the data: hidden ones, such as .ipynb_checkpoints, are not."""
    return not name.startswith(".") and name not in _NO_CLASSES


def split_of_files(samples: Sequence[tuple[str, int]], classes: tuple[str, ...]) -> Split:
    """A split of image files.

    Args:
        samples: Path and class index of each image.
        classes: Names, by class index.
    """
    paths = [path for path, _ in samples]
    return Split(
        labels=np.array([label for _, label in samples], dtype=np.int64),
        classes=classes,
        open=lambda index: _read_image(paths[index]),
        name_of=lambda index: paths[index],
    )


def _read_image(path: str) -> Image.Image:
    """The file as RGB, turned upright by its EXIF orientation; for an animation, the first picture."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
        return _to_rgb(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to eight bits each of red, green and blue.

    Raises:
        ValueError: If its pixels are numbers on an unknown scale.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_16_BITS:
            raise ValueError(
                f"its pixels are 32-bit numbers from {values.min()} to {values.max()}, but only 8 or 16 bits are read"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, but only 8 or 16 bits are read")
    return image.convert("RGB")
