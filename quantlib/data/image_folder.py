"""Folders of image files, and how one file becomes an image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from quantlib.data.folders import split_folder
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


_NUM_SHARES = 5
"""Without a split of its own, one of so many images of a class is for validation."""


def open_image_folder(root: Path, split: SplitName) -> Split:
    """The split that torchvision's ImageFolder would find; importing torchvision takes more than a second.

    Raises:
        DataError: If there is no such folder, or it has no classes, or one of them has no images.
    """
    folder = split_folder(root, split)
    if not folder.is_dir():
        raise DataError(f"No folder {folder}: data.root must hold train/CLASS/IMAGE and val/CLASS/IMAGE.")
    return _open_classes(folder, lambda paths: paths)


def open_class_folders(root: Path, split: SplitName) -> Split:
    """A split of root/CLASS/IMAGE: a fifth of each class's images is for validation, the rest for training.

    Which ones depends on the hashes of their paths below `root`, so that hardly any image changes sides when others
    are added.

    Raises:
        DataError: If there is no such folder, or it has no classes, or one of them has fewer than two images.
    """
    if not root.is_dir():
        raise DataError(f"No folder {root}: data.root must hold CLASS/IMAGE.")

    def choose(paths: list[str]) -> list[str]:
        if len(paths) < 2:
            raise DataError(f"{Path(paths[0]).parent} has one image: a class needs at least two, one for validation.")
        drawn = sorted(paths, key=lambda path: hashlib.sha256(str(Path(path).relative_to(root)).encode()).digest())
        validation = set(drawn[: max(1, len(paths) // _NUM_SHARES)])
        return [path for path in paths if (path in validation) == (split == "val")]

    return _open_classes(root, choose)


def _open_classes(folder: Path, choose: Callable[[list[str]], list[str]]) -> Split:
    """The images of folder/CLASS that `choose` takes from each class's."""
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_shown(entry.name)))
    if not classes:
        num_images = len(_image_files(folder)[0])
        without = f" The class of the {num_images:,} images in it is not known." if num_images else ""
        raise DataError(
            f"Folder {folder} has no classes: it must hold one folder per class, with its images inside.{without}"
        )
    samples, num_skipped = [], 0
    for label, name in enumerate(classes):
        paths, num_others = _image_files(folder / name)
        num_skipped += num_others
        if not paths:
            raise DataError(
                f"Folder {folder} has a class without images: {name} needs files whose names end in one of "
                f"{', '.join(_IMAGE_SUFFIXES)}. Add some, or remove the class from every split."
            )
        samples += [(path, label) for path in choose(paths)]
    return replace(split_of_files(samples, classes), num_skipped=num_skipped)


def find_images(folder: Path) -> list[str]:
    """The image files below a folder, in order; hidden files and folders are left out.

    Raises:
        DataError: If there are none.
    """
    paths, _ = _image_files(folder)
    if not paths:
        raise DataError(
            f"Folder {folder} has no images: they have names that end in one of {', '.join(_IMAGE_SUFFIXES)}."
        )
    return paths


def _image_files(folder: Path) -> tuple[list[str], int]:
    """The image files below a folder, in order, and the number of other files; neither counts hidden ones."""
    found = _shown_files(folder)
    paths = [path for path in found if path.lower().endswith(_IMAGE_SUFFIXES)]
    return paths, len(found) - len(paths)


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
