"""A run's inputs from outside: found, checked and identified by content before any stage starts."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlib.data.normalization import Normalization
from quantlib.data.split import SplitInput, Subset
from quantlib.data.transforms import EvalTransform, Size
from quantlib.errors import DataError, ModelError, RecipeError, suggest
from quantlib.identity import find_split, hash_model_file, user_code
from quantlib.models import preprocessing
from quantlib.models.source import ModelInput
from quantlib.progress import Progress, silent
from quantlib.recipe.schema import Recipe
from quantlib.recipe.sections import FILE, is_model_name, is_weights_file

ARCHITECTURES = ("mobilenet_v2",)
"""Registered names; quantlib.models builds the models, which needs torch."""


@dataclass(frozen=True)
class Inputs:
    """Everything that a recipe names, found and checked."""

    model: ModelInput
    transform: EvalTransform
    """How an image becomes the model's input when accuracy is measured."""
    train: SplitInput
    val: SplitInput
    validation: Subset
    """Images that accuracy is reported on."""
    held_out: Subset
    """Training images held out for selection; empty if the recipe selects on validation."""
    training: Subset
    """All other training images, shuffled once; calibration takes the first of them."""

    @property
    def remarks(self) -> list[str]:
        """Notes on the dataset, one sentence each."""
        return [
            f"{split.num_skipped:,} files in the {split.name} split's folders are not images, or of a kind that is "
            "not read: they were skipped."
            for split in (self.train, self.val)
            if split.num_skipped > 0
        ]


def find_inputs(recipe: Recipe, cache: Path, progress: Progress = silent) -> Inputs:
    """Find and check what a recipe names.

    Args:
        recipe: Paths in it are absolute.
        cache: Folder that remembers the hashes.
        progress: Called with (files hashed, files in the split) while a split is hashed.

    Raises:
        RecipeError: If the recipe asks for more images than there are, or for an unknown format, or if the crop is
            larger than the resized image.
        DataError: If the dataset is missing, empty or inconsistent.
        ModelError: If the weights file is missing, `num_classes` is not the data's, or the model lacks a layer that
            should stay float.
    """
    model = find_model(recipe)
    transform = _find_transform(recipe)
    train, val = (find_split(recipe.data, name, cache, progress) for name in ("train", "val"))
    check_classes(train.classes, val.classes)
    wanted = recipe.model.arguments.get("num_classes")
    if wanted is not None and wanted != val.num_classes:
        raise ModelError(
            f"model.arguments.num_classes = {wanted}, and the data has {val.num_classes} classes. "
            "Set it to the data's number, or leave it out; or use the dataset the weights were trained on."
        )
    float_layers = dict.fromkeys(name for branch in (*recipe.ptq, *recipe.qat) for name in branch.float_layers)
    if float_layers:
        _check_float_layers(model, val.num_classes, transform.input_shape, tuple(float_layers))
    num_held_out = check_train_size(recipe, train.num_images)
    return Inputs(
        model=model,
        transform=transform,
        train=train,
        val=val,
        validation=_validation(val, recipe),
        held_out=Subset(train, recipe.seed, 0, num_held_out),
        training=Subset(train, recipe.seed, num_held_out, train.num_images),
    )


def _validation(val: SplitInput, recipe: Recipe) -> Subset:
    wanted = min(recipe.evaluation.max_images or val.num_images, val.num_images)
    if wanted == val.num_images and not recipe.may_stop:
        return Subset(val, None, 0, val.num_images)
    # The first images of a folder, be they shards or all, would be of its first classes.
    return Subset(val, recipe.seed, 0, wanted)


@functools.lru_cache(maxsize=1)
def _check_float_layers(
    model: ModelInput, num_classes: int, input_shape: tuple[int, int, int], float_layers: tuple[str, ...]
) -> None:
    """Build the model and find them in it: otherwise a misspelt one would only be noticed after minutes."""
    from quantlib.graph import fusion
    from quantlib.graph.tracing import trace
    from quantlib.models import registry
    from quantlib.quantize import preparation  # They import torch.

    built = registry.build(model.architecture, registry.arguments_of(model, num_classes))
    traced = trace(built.eval(), input_shape)
    preparation.find_layers(fusion.fuse_model(traced, "eval", inplace=True), float_layers)


def _num_held_out(recipe: Recipe, num_train: int) -> int:
    if recipe.evaluation.select_on == "validation":
        return 0
    return recipe.evaluation.num_held_out or max(1, min(1000, num_train // 10))


def check_classes(train: Sequence[str], val: Sequence[str]) -> None:
    """Raise an error if the splits' classes differ.

    Raises:
        DataError: With some classes that only one of them has.
    """
    if tuple(train) != tuple(val):
        different = sorted(set(train) ^ set(val))[:5]
        raise DataError(
            f"train has {len(train)} classes and val has {len(val)}; they differ in {', '.join(different)}. "
            "Both must have the same class folders: a class's number is its place in the list."
        )


def check_train_size(recipe: Recipe, num_train: int) -> int:
    """The number of training images to hold out.

    Raises:
        RecipeError: If the recipe asks for more training images than there are.
    """
    num_held_out = _num_held_out(recipe, num_train)
    if num_train < 2 and num_held_out > 0:
        raise RecipeError(
            f"The training split has {num_train} image, and at least two are needed, one of them held out. Add some, "
            'or set evaluation.select_on = "validation".'
        )
    if 2 * num_held_out > num_train:
        raise RecipeError(
            f"evaluation.num_held_out = {num_held_out} of {num_train} training images: "
            "at most half may be held out. "
            f'Set it to {num_train // 2} or less, or evaluation.select_on = "validation".'
        )
    available = num_train - num_held_out
    calibration = recipe.calibration.batch_size * recipe.calibration.num_batches
    calibrates = (
        bool(recipe.ptq) or recipe.search is not None or any(branch.start == "calibrated" for branch in recipe.qat)
    )
    if calibrates and calibration > available:
        raise RecipeError(
            f"calibration asks for {recipe.calibration.num_batches} batches of {recipe.calibration.batch_size} = "
            f"{calibration} images, and the training split has {available} that are not held out. "
            "Lower calibration.num_batches, or evaluation.num_held_out."
        )
    for number, branch in enumerate(recipe.qat):
        needed = branch.batch_size * (branch.batches_per_epoch or 1)
        if needed > available:
            raise RecipeError(
                f"qat.{number} asks for {needed} images per epoch, and the training split has {available} that are "
                f"not held out. Lower qat.{number}.batches_per_epoch or batch_size, or evaluation.num_held_out."
            )
    return num_held_out


def find_model(recipe: Recipe) -> ModelInput:
    """The model that a recipe names, identified by content; paths in the recipe are absolute.

    Raises:
        RecipeError: If its architecture is unknown.
        ModelError: If a file is missing.
    """
    section = recipe.model
    if section.architecture not in ARCHITECTURES and not is_model_name(section.architecture):
        raise RecipeError(
            f"model.architecture = {section.architecture!r} is unknown{suggest(section.architecture, ARCHITECTURES)} "
            f'Allowed: {", ".join(ARCHITECTURES)}, "torchvision:NAME", "timm:NAME", "file:MODEL.pt2", or '
            '"package.module:function".'
        )
    weights = section.weights or ""
    fingerprint = weights
    if weights and is_weights_file(weights):
        fingerprint = hash_model_file(
            weights,
            f"No weights file {weights!r}: set model.weights to a state_dict file (.pth or .safetensors), "
            'to "torchvision:NAME", "timm:TAG", or "train".',
        )
    exported = section.architecture.removeprefix(FILE) if section.architecture.startswith(FILE) else ""
    return ModelInput(
        # Where the file is must not be in a key: what it holds is, as `code`.
        architecture=FILE if exported else section.architecture,
        arguments=json.dumps(section.arguments, sort_keys=True),
        weights=weights,
        fingerprint=fingerprint,
        code=hash_model_file(exported, f"No file {exported!r}: set model.architecture to {FILE!r} and its path.")
        if exported
        else user_code(section.architecture, "model.architecture"),
        file=exported,
    )


def _find_transform(recipe: Recipe) -> EvalTransform:
    """The recipe's own settings; where it has none, those of the weights, else ImageNet's."""
    data, known = recipe.data, preprocessing.of_weights(recipe.model.architecture, recipe.model.weights)
    resize, crop = data.resize or known.resize, _both_sides(data.crop or known.crop)
    normalization = known.normalization
    if data.mean is not None and data.std is not None:
        normalization = Normalization(data.mean, data.std)
    for least, most in zip(_both_sides(resize), crop, strict=True):
        if most > least:
            raise RecipeError(
                f"data.crop = {list(crop)} does not fit into data.resize = "
                f"{resize if isinstance(resize, int) else list(resize)}: lower crop, or raise resize."
            )
    return EvalTransform(
        resize=resize, crop=crop, interpolation=data.interpolation or known.interpolation, normalization=normalization
    )


def _both_sides(size: int | Size) -> Size:
    return (size, size) if isinstance(size, int) else size
