"""A first recipe for a folder of images: what the folder and the weights show, each value with its reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np
from PIL import Image
from torchvision.models import get_model_weights

from quantlib import inputs
from quantlib.data import datasets
from quantlib.data.folders import split_folder
from quantlib.data.images import Split
from quantlib.data.transforms import EvalTransform
from quantlib.errors import DataError, ModelError, RecipeError
from quantlib.files import write_atomically
from quantlib.models import exported_file, exported_graph, preprocessing, registry
from quantlib.models.weights import read_weights
from quantlib.recipe.file import parse_text
from quantlib.recipe.schema import Recipe
from quantlib.recipe.sections import FILE, TORCHVISION, CalibrationRecipe

# Enough to see what is typical, even on a slow disk.
_NUM_MEASURED = 200
# What torchvision's ImageNet has beside its images.
_IMAGENET = ("ILSVRC2012_devkit_t12.tar.gz", "meta.bin")
# Most networks halve the image five times.
_STRIDE = 32
_USUAL_CROP = 224
# These take images of one size only.
_OF_ONE_SIZE = ("vit_", "maxvit_")


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What a folder holds."""

    format: str
    root: Path
    reason: str
    """Why this format."""
    train: Split
    val: Split
    size: tuple[int, int]
    """Typical height and width of an image, in pixels."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The architecture of the weights, and how images are prepared for it."""

    lines: tuple[str, ...]
    """The lines below [model]."""
    resize: int | list[int]
    crop: int | list[int]
    interpolation: str = "bilinear"
    reason: str
    """Why this size."""


def write_recipe(folder: Path, weights: Path | None, to: Path) -> None:
    """Write a recipe that quantizes the model of `weights` for the images in `folder`.

    Args:
        folder: train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone; or ImageNet as torchvision keeps it.
        weights: A state_dict of a classifier of torchvision, or a file of torch.export.save; None: a MobileNetV2 is
            trained.
        to: The new file; paths in it are relative to its folder if they are given relative.

    Raises:
        RecipeError: If `to` exists, or there are too few images.
        DataError: If the images are not in such folders, or their class is not known.
        ModelError: If the weights cannot be read, are of no known architecture, or are for other classes.
    """
    if to.exists():
        raise RecipeError(f"{to} exists, and nothing is overwritten: give another file with --to, or remove it.")
    data = _look_at(folder)
    place = to.resolve().parent
    model = _untrained(data) if weights is None else _identify(weights, place, data)
    text = _write(folder, data, model, place)
    recipe = parse_text(text, place)
    inputs.check_train_size(recipe, len(data.train))
    if weights is not None:
        _check_weights(recipe, data)
    write_atomically(to, text.encode())


def _look_at(folder: Path) -> _Data:
    if not folder.is_dir():
        raise DataError(f"No folder {folder}: give the folder that holds your images, in one folder per class.")
    form, root, reason = _layout(folder)
    train, val = (datasets.open_split(form, str(root), split) for split in ("train", "val"))
    if len(train.classes) < 2:
        (only,) = train.classes
        raise DataError(
            f"{root} has one class, {only}: a classifier needs at least two. Give the folder that holds the class "
            f"folders, or train/ and val/; perhaps it is {root / only}."
        )
    inputs.check_classes(train.classes, val.classes)
    return _Data(format=form, root=root, reason=reason, train=train, val=val, size=_typical_size(train))


def _layout(folder: Path) -> tuple[str, Path, str]:
    """Format, root, and why."""
    if any((folder / name).is_file() for name in _IMAGENET):
        return "imagenet", folder, "ImageNet as torchvision keeps it, with its devkit."
    train, val = split_folder(folder, "train"), split_folder(folder, "val")
    if train.is_dir() and val.is_dir():
        return "imagefolder", folder, f"One folder per class in train/; accuracy is measured on {val.name}/."
    if val.is_dir():
        raise DataError(
            f"{folder} has {val.name}/ and no train/: calibration needs training images. Add {train}, or give "
            f"{val} to have its images split."
        )
    return (
        "classfolders",
        train if train.is_dir() else folder,
        "One folder per class and no validation split: a fifth of each class is kept for validation.",
    )


def _untrained(data: _Data) -> _Model:
    resize, crop = _usual_size(data.size)
    return _Model(
        lines=(
            "# No weights were given: a MobileNetV2 is trained on the training images first.",
            'architecture = "mobilenet_v2"',
            *_num_classes(data),
            'weights = "train"',
        ),
        resize=resize,
        crop=crop,
        reason="Fits the images' size.",
    )


def _identify(weights: Path, place: Path, data: _Data) -> _Model:
    if weights.suffix == ".pt2":
        return _exported(weights, place, data)
    state = read_weights(str(weights), "")
    architecture = registry.nearest_architecture(state)
    if architecture is None:
        raise ModelError(
            f"{weights} holds the weights of no classifier of torchvision: export the model with torch.export.save and "
            'give that .pt2 file, or write a recipe with architecture = "timm:NAME" or "package.module:function".'
        )
    lines = (
        f"# Of all classifiers of torchvision, the one that {_line(weights.name)} fits best.",
        f"architecture = {_text(architecture)}",
        *_num_classes(data),
        f"weights = {_text(_relative(weights, place))}",
    )
    known, name = _published(architecture), architecture.removeprefix(TORCHVISION)
    # torchvision's presets are squares.
    resize, crop = known.resize if isinstance(known.resize, int) else known.resize[0], known.crop[0]
    reason = f"As for torchvision's own weights of {name}"
    if min(data.size) < crop and not name.startswith(_OF_ONE_SIZE):
        reason = f"Fits the images, which are smaller than the {crop} pixels of torchvision's own weights"
        resize, crop = _usual_size(data.size)
    return _Model(
        lines=lines,
        resize=resize,
        crop=crop,
        interpolation=known.interpolation,
        reason=f"{reason}; set what yours were trained with.",
    )


def _exported(weights: Path, place: Path, data: _Data) -> _Model:
    height, width = exported_graph.image_size(exported_file.read_program(str(weights)))
    lines = (
        f"# {_line(weights.name)} holds the graph and the weights; for images of {data.num_classes} classes.",
        f"architecture = {_text(FILE + _relative(weights, place))}",
    )
    if height is None or width is None:
        resize, crop = _usual_size(data.size)
        return _Model(lines=lines, resize=resize, crop=crop, reason="Fits the images' size; the model takes any.")
    reason = "The exported model takes no other size"
    if height != width:
        return _Model(lines=lines, resize=[height, width], crop=[height, width], reason=f"{reason}.")
    resize = round(height * 8 / 7)
    return _Model(lines=lines, resize=resize, crop=height, reason=f"{reason}; resize is the usual 8/7 of it.")


def _published(architecture: str) -> EvalTransform:
    """How images are prepared for torchvision's best weights of an architecture."""
    best = get_model_weights(architecture.removeprefix(TORCHVISION)).DEFAULT
    return preprocessing.of_weights(architecture, TORCHVISION + best.name)


def _num_classes(data: _Data) -> tuple[str, str]:
    names = data.train.classes
    shown = ", ".join(_line(name) for name in names[:5]) + (" and others" if len(names) > 5 else "")
    return f"# The classes: {shown}.", f"arguments = {{ num_classes = {data.num_classes} }}"


def _typical_size(split: Split) -> tuple[int, int]:
    """Median height and width of some images, in pixels."""
    chosen = np.unique(np.linspace(0, len(split) - 1, _NUM_MEASURED).astype(int))
    sizes = [_size_of(split.name_of(int(index))) for index in chosen]
    return median_low(height for height, _ in sizes), median_low(width for _, width in sizes)


def _size_of(path: str) -> tuple[int, int]:
    """Height and width of an image file, of which only the header is read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"Image {path} cannot be decoded: {error}. Replace the file, or remove it from the dataset."
        ) from None


def _usual_size(typical: tuple[int, int]) -> tuple[int, int]:
    """Resize and crop for images that nothing else is known about: no larger than they are, and at most ImageNet's."""
    shorter = min(typical)
    crop = min(_USUAL_CROP, max(_STRIDE, shorter // _STRIDE * _STRIDE))
    return min(round(crop * 8 / 7), max(shorter, crop)), crop


def _write(folder: Path, data: _Data, model: _Model, place: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).lstrip("-_.")[:64] or "images"
    height, width = data.size
    found = (
        f"# {len(data.train):,} training and {len(data.val):,} validation images of {data.num_classes} classes, "
        f"typically {height} x {width} pixels (height x width)."
    )
    interpolation = [] if model.interpolation == "bilinear" else [f"interpolation = {_text(model.interpolation)}"]
    return "\n".join(
        [
            "# Written by `quantflow init`: check it, then `quantflow run` it. docs/recipe.md describes every key.",
            found,
            f"name = {_text(name)}",
            "",
            "[model]",
            *model.lines,
            "",
            "[data]",
            f"# {data.reason}",
            f"format = {_text(data.format)}",
            f"root = {_text(_relative(data.root, place))}",
            f"# {model.reason}",
            f"resize = {model.resize}",
            f"crop = {model.crop}",
            *interpolation,
            "# Add mean = [...] and std = [...] if the model was trained with others than its published weights, or"
            " ImageNet's.",
            "",
            *_calibration(len(data.train)),
            "[[ptq]]",
            "# Without other keys: the settings that keep accuracy best. docs/settings.md compares them.",
            'name = "ptq"',
            "",
            "[gate]",
            "# The most top-1 that the winner may lose against float: one point.",
            "max_top1_drop = 0.01",
            "",
        ]
    )


def _calibration(num_train: int) -> Sequence[str]:
    """The section, if there are fewer images than are read by default."""
    default = CalibrationRecipe()
    # As many as are not held out when `evaluation.num_held_out` is left out.
    available = num_train - max(1, num_train // 10)
    if available >= default.batch_size * default.num_batches:
        return ()
    batch_size = min(default.batch_size, available)
    return (
        "[calibration]",
        f"# All of the {available} training images that are not held out, in whole batches.",
        f"batch_size = {batch_size}",
        f"num_batches = {available // batch_size}",
        "",
    )


def _check_weights(recipe: Recipe, data: _Data) -> None:
    """Build the model, fill it and try it, as the run will."""
    crop = recipe.data.crop
    assert crop is not None
    height, width = (crop, crop) if isinstance(crop, int) else crop
    shape = (recipe.data.channels, height, width)
    try:
        model, _ = registry.from_input(inputs.find_model(recipe), data.num_classes, shape, recipe.seed)
        registry.check_logits(model, data.num_classes, shape)
    except ModelError as error:
        raise ModelError(
            f"{error} {data.root} has {data.num_classes} classes: are these weights trained on them?"
        ) from None


def _relative(path: Path, place: Path) -> str:
    """A path as a recipe in `place` names it."""
    return str(path) if path.is_absolute() else os.path.relpath(path, place)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)  # As TOML writes it, too.


def _line(name: str) -> str:
    """A name without what would end a comment."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", name)
