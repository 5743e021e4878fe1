"""Datasets: where the images of a split are, and how each becomes pixels.

Nothing here depends on the number of threads: each random crop is drawn from the seed and the image's position.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from quantlib.data.image_folder import open_class_folders, open_image_folder, split_of_files
from quantlib.data.images import Split
from quantlib.errors import DataError, RecipeError, reason_of

if TYPE_CHECKING:
    from quantlib.data.split import SplitName

FORMATS = ("digits", "imagefolder", "classfolders", "imagenet", "cifar10")


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
        openers = {
            "imagefolder": open_image_folder,
            "classfolders": open_class_folders,
            "imagenet": _imagenet,
            "cifar10": _cifar10,
        }
        opened = openers[data_format](Path(root), split)
    else:
        opened = _user_dataset(data_format, root, split)
    if len(opened) == 0:
        raise DataError(f"The {split} split of {root or data_format} has no images: at least one is needed.")
    return opened


def _digits(split: SplitName) -> Split:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every third one is for validation."""
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


def _imagenet(root: Path, split: SplitName) -> Split:
    from torchvision.datasets import ImageNet

    if not root.is_dir():
        raise DataError(f"No folder {root}: data.root must be torchvision's ImageNet folder.")
    try:
        dataset = ImageNet(str(root), split=split)
    except (RuntimeError, OSError, EOFError, KeyError, UnpicklingError) as error:
        raise DataError(
            f"Folder {root} is not torchvision's ImageNet: {reason_of(error)} It needs "
            "ILSVRC2012_devkit_t12.tar.gz and the archives of both splits (or what torchvision unpacks from them). "
            'For plain folders of images, use format = "imagefolder".'
        ) from None
    return split_of_files(dataset.samples, tuple(names[0] for names in dataset.classes))


def _cifar10(root: Path, split: SplitName) -> Split:
    from torchvision.datasets import CIFAR10

    try:
        # torchvision unpickles these files only after checking that their MD5 sums are the published ones.
        dataset = CIFAR10(str(root), train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"Folder {root} does not hold CIFAR-10 as torchvision keeps it (cifar-10-batches-py/): {reason_of(error)} "
            "Unpack cifar-10-python.tar.gz there."
        ) from None
    return Split(
        labels=np.asarray(dataset.targets, dtype=np.int64),
        classes=tuple(dataset.classes),
        open=lambda index: Image.fromarray(dataset.data[index]),
        name_of=lambda index: f"{index} of CIFAR-10's {split} split",
    )


def _user_dataset(data_format: str, root: str | None, split: SplitName) -> Split:
    from quantlib.imports import call_function, import_function

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
            "a label is an index into `classes`, counted from 0."
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
            f"{data_format} gives a {type(image).__name__} as image: it must be a PIL image, before any transform."
        )
    return image
