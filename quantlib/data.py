"""Datasets: where the images of a split are, and how one of them becomes pixels.

Nothing here depends on the number of threads: each random crop is drawn from the seed and the image's place.
"""

from __future__ import annotations

import functools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from quantlib.errors import DataError, RecipeError
from quantlib.progress import Progress, silent
from quantlib.transforms import Transform

if TYPE_CHECKING:
    from quantlib.inputs import Selection, SplitInput, SplitName

FORMATS = ("digits", "imagefolder", "imagenet", "cifar10")

# Those of torchvision's ImageFolder, and two that it passes over.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif")
# What editors and archivers leave beside the data.
_NO_CLASSES = ("__MACOSX",)

_ORIENTATION = 0x0112  # EXIF's.
_MAX_16_BITS = 2**16 - 1

# One decoding thread a core keeps two cores busy: PIL releases the interpreter's lock while it works.
_NUM_THREADS = 2


@dataclass(frozen=True)
class Split:
    """The images of one split, by number.

    Attributes:
        labels: [N], int64 class indices.
        classes: Their names, in the order of the indices.
        open: The N-th image, as an RGB PIL image.
        name_of: What to call the N-th image in an error.
        num_skipped: Files among the images that are none, or of a kind that is not read.
    """

    labels: np.ndarray
    classes: tuple[str, ...]
    open: Callable[[int], Image.Image] = field(repr=False)
    name_of: Callable[[int], str] = field(repr=False)
    num_skipped: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int, transform: Transform, rng: random.Random) -> np.ndarray:
        """One image as [crop, crop, 3] uint8.

        Raises:
            DataError: If it cannot be decoded.
        """
        try:
            return np.asarray(transform(self.open(index), rng), dtype=np.uint8)
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


def open_split(data_format: str, root: str | None, split: SplitName) -> Split:
    """List the images of a split.

    Raises:
        DataError: If the data is missing, or has no classes or no images.
        RecipeError: If the format is unknown, or needs a root and has none.
    """
    if data_format == "digits":
        opened = _digits(split)
    elif data_format in FORMATS:
        if root is None:
            raise RecipeError(f"data.format = {data_format!r} needs data.root: the folder that holds the dataset.")
        opened = {"imagefolder": _image_folder, "imagenet": _imagenet, "cifar10": _cifar10}[data_format](
            Path(root), split
        )
    else:
        opened = _user_dataset(data_format, root, split)
    if len(opened) == 0:
        raise DataError(f"The {split} split of {root or data_format} has no images: at least one is needed.")
    return opened


def select(selection: Selection) -> tuple[Split, np.ndarray]:
    """A selection's split, and the numbers of its images, [n] int64.

    Raises:
        DataError: If the split has changed since it was identified.
    """
    source = selection.split
    split = _open_identified(source)
    if len(split) != source.num_images or split.classes != source.classes:
        raise DataError(f"The {source.name} split of {source.root} has changed since the run began: run again.")
    order = np.arange(len(split)) if selection.seed is None else shuffled(len(split), selection.seed)
    return split, order[selection.start : selection.stop]


def find_names(selection: Selection) -> list[str] | None:
    """What the images of a selection are called: files by their path below the dataset's folder.

    None where the dataset has changed since it was identified.
    """
    try:
        split, indices = select(selection)
    except DataError:
        return None
    below = f"{selection.split.root}/"
    return [split.name_of(index).removeprefix(below) for index in indices]


@functools.lru_cache(maxsize=2)
def _open_identified(source: SplitInput) -> Split:
    """Listed once in a process: a million files take as long as some stages."""
    return open_split(source.format, source.root, source.name)


def shuffled(num_images: int, seed: int) -> np.ndarray:
    """The numbers 0 … num_images - 1 in an order that the seed alone decides, [num_images] int64."""
    return np.random.default_rng(seed).permutation(num_images)


def decode(
    split: Split,
    indices: np.ndarray,
    transform: Transform,
    seed: int,
    progress: Progress = silent,
) -> Iterator[np.ndarray]:
    """Images in the order of `indices`, some at a time: pixels [k, crop, crop, 3] uint8.

    Args:
        split: Where they are.
        indices: Numbers of images, [n] int64.
        transform: Applied to each.
        seed: Of the transform's random choices.
        progress: Called with (images done, n).

    Raises:
        DataError: If an image cannot be decoded.
    """
    done = 0
    for pixels, _ in batches(split, indices, transform, seed, batch_size=64):
        yield pixels
        done += len(pixels)
        progress(done, len(indices))


def batches(
    split: Split, indices: np.ndarray, transform: Transform, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decoded batches of pixels [n, crop, crop, 3] and labels [n], the next ones decoded while one is used.

    Raises:
        DataError: If an image cannot be decoded.
    """

    def decode_batch(start: int) -> np.ndarray:
        chunk = indices[start : start + batch_size]
        # A generator an image, seeded by its place: the batch size and the thread change nothing.
        return np.stack(
            [
                split.pixels(int(index), transform, random.Random(f"{seed}-{place}"))
                for place, index in enumerate(chunk, start=start)
            ]
        )

    starts = range(0, len(indices), batch_size)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting = deque(pool.submit(decode_batch, start) for start in starts[:_NUM_THREADS])
        for position, start in enumerate(starts):
            batch = waiting.popleft().result()
            # No more are decoded ahead than there are threads, so memory stays flat.
            if position + _NUM_THREADS < len(starts):
                waiting.append(pool.submit(decode_batch, starts[position + _NUM_THREADS]))
            yield batch, split.labels[indices[start : start + batch_size]]


def _digits(split: SplitName) -> Split:
    """The 1,797 handwritten digits, 8 x 8 pixels, that scikit-learn carries; every third one validates."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    numbers = np.arange(len(digits.target))
    chosen = numbers[numbers % 3 == 0] if split == "val" else numbers[numbers % 3 != 0]
    # Sixteen grey levels to 0 … 255.
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # (N, 8, 8)
    return Split(
        labels=digits.target[chosen].astype(np.int64),
        classes=tuple(str(name) for name in digits.target_names),
        open=lambda index: Image.fromarray(pixels[index]).convert("RGB"),
        name_of=lambda index: f"{chosen[index]} of scikit-learn's digits",
    )


def _image_folder(root: Path, split: SplitName) -> Split:
    """As torchvision's ImageFolder, whose import takes longer than a second for what it has beside."""
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"No folder {folder}: data.root must hold train/CLASS/IMAGE and val/CLASS/IMAGE.")
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _is_shown(entry.name)))
    if not classes:
        raise DataError(f"Folder {folder} has no classes: it must hold one folder a class, with its images inside.")
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
    return replace(_of_samples(samples, classes), num_skipped=num_skipped)


def _shown_files(folder: Path) -> list[str]:
    """All files below a folder, in order, but for hidden ones and what lies in hidden folders."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = filter(_is_shown, folders)
        found.append((place, sorted(filter(_is_shown, files))))
    return [f"{place}/{file}" for place, files in sorted(found) for file in files]


def _is_shown(name: str) -> bool:
    """Whether a file or folder is part of the data: hidden ones, as .ipynb_checkpoints, are not."""
    return not name.startswith(".") and name not in _NO_CLASSES


def _imagenet(root: Path, split: SplitName) -> Split:
    from torchvision.datasets import ImageNet

    if not root.is_dir():
        raise DataError(f"No folder {root}: data.root must be torchvision's ImageNet folder.")
    try:
        dataset = ImageNet(str(root), split=split)
    except (RuntimeError, OSError, EOFError, KeyError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"Folder {root} is not torchvision's ImageNet: {reason} It needs ILSVRC2012_devkit_t12.tar.gz and the "
            "archives of both splits (or what torchvision unpacks from them). For plain folders of images, "
            'use format = "imagefolder".'
        ) from None
    return _of_samples(dataset.samples, tuple(names[0] for names in dataset.classes))


def _cifar10(root: Path, split: SplitName) -> Split:
    from torchvision.datasets import CIFAR10

    try:
        # torchvision unpickles these files only after their MD5 sums were found to be the published ones.
        dataset = CIFAR10(str(root), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Folder {root} does not hold CIFAR-10 as torchvision keeps it (cifar-10-batches-py/): {error} "
            "Unpack cifar-10-python.tar.gz there."
        ) from None
    return Split(
        labels=np.asarray(dataset.targets, dtype=np.int64),
        classes=tuple(dataset.classes),
        open=lambda index: Image.fromarray(dataset.data[index]),
        name_of=lambda index: f"{index} of CIFAR-10's {split} split",
    )


def _user_dataset(data_format: str, root: str | None, split: SplitName) -> Split:
    from quantlib.models import call_function, import_function

    function = import_function(data_format, "data.format", dict.fromkeys(FORMATS))
    dataset: Any = call_function(function, data_format, root, split)
    classes, labels = getattr(dataset, "classes", None), getattr(dataset, "targets", None)
    if classes is None or labels is None or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{data_format} returned a {type(dataset).__name__}: it must have `classes`, `targets` and give "
            "(PIL image, label) for dataset[i], as torchvision's datasets do."
        )
    labels = np.asarray(labels, dtype=np.int64)
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside) > 0:
        raise DataError(
            f"{data_format} gives the label {outside[0]}, and has {len(classes)} classes: "
            "a label is a place in `classes`, counted from 0."
        )
    return Split(
        labels=labels,
        classes=tuple(str(name) for name in classes),
        open=lambda index: _pil_image(dataset[index][0], data_format).convert("RGB"),
        name_of=lambda index: f"{index} of {data_format}'s {split} split",
    )


def _pil_image(image: Any, data_format: str) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise DataError(
            f"{data_format} gives a {type(image).__name__} as image: it must be a PIL image, as it is before any "
            "transform."
        )
    return image


def _of_samples(samples: Sequence[tuple[str, int]], classes: tuple[str, ...]) -> Split:
    paths = [path for path, _ in samples]
    return Split(
        labels=np.array([label for _, label in samples], dtype=np.int64),
        classes=classes,
        open=lambda index: _read_image(paths[index]),
        name_of=lambda index: paths[index],
    )


def _read_image(path: str) -> Image.Image:
    """The file as RGB, turned as its camera was held; of an animation the first picture."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
        return _to_rgb(upright)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue.

    Raises:
        ValueError: If its pixels are numbers of no known scale.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > _MAX_16_BITS:
            raise ValueError(
                f"its pixels are 32-bit numbers from {values.min()} to {values.max()}, and 8 or 16 bits are read"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and 8 or 16 bits are read")
    return image.convert("RGB")
