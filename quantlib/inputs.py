"""A run's inputs from outside: found, checked and identified by content before any stage starts.

A dataset's files are hashed once; afterwards their names, sizes and times show that nothing has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from quantlib.data.folders import split_folder
from quantlib.data.normalization import Normalization
from quantlib.data.split import SplitInput, SplitName, Subset
from quantlib.data.transforms import EvalTransform, Size
from quantlib.errors import DataError, ModelError, RecipeError, suggest
from quantlib.files import read_file, seal, unseal, write_atomically
from quantlib.imports import check_module
from quantlib.models import preprocessing
from quantlib.models.source import ModelInput
from quantlib.progress import Progress, silent
from quantlib.recipe.schema import Recipe
from quantlib.recipe.sections import FILE, TIMM, TORCHVISION, DataRecipe, is_import_path, is_model_name, is_weights_file
from quantlib.store import codehash

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
    train, val = (_find_split(recipe.data, name, cache, progress) for name in ("train", "val"))
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
    wanted = recipe.evaluation.max_images
    if wanted is None or wanted >= val.num_images:
        return Subset(val, None, 0, val.num_images)
    # The first images of a folder would all be of its first classes.
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
        fingerprint = _hash_model_file(
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
        code=_hash_model_file(exported, f"No file {exported!r}: set model.architecture to {FILE!r} and its path.")
        if exported
        else _user_code(section.architecture, "model.architecture"),
        file=exported,
    )


def _hash_model_file(name: str, missing: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise ModelError(missing)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def _find_split(recipe: DataRecipe, name: SplitName, cache: Path, progress: Progress) -> SplitInput:
    """Identify a split; it is opened and hashed only if its files have changed since the last time."""
    code = _user_code(recipe.format, "data.format")
    _, state = _look(recipe, name, code)
    try:
        found = unseal(read_file(cache / f"{state}.json"), unsealed_too=False)
        return SplitInput(root=recipe.root, **(found | {"classes": tuple(found["classes"])}))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # Not seen before, or its note is damaged: read the files themselves.

    from quantlib.data import datasets

    split = datasets.open_split(recipe.format, recipe.root, name)
    # Look again: opening may create the files, as when torchvision unpacks ImageNet's archives.
    paths, state = _look(recipe, name, code)
    content = hashlib.sha256(repr((recipe.format, code, "" if paths else state)).encode())
    root = Path(recipe.root or "")
    with ThreadPoolExecutor(2) as pool:
        for done, (path, sha256) in enumerate(zip(paths, pool.map(_hash_file, paths), strict=True), start=1):
            content.update(f"{Path(path).relative_to(root)}\0{sha256}\n".encode())
            if done % 256 == 0 or done == len(paths):
                progress(done, len(paths))
    found_input = SplitInput(
        recipe.format, name, recipe.root, content.hexdigest(), len(split), split.classes, split.num_skipped
    )
    kept = {key: value for key, value in asdict(found_input).items() if key != "root"}
    write_atomically(cache / f"{state}.json", seal(kept))
    return found_input


def _look(recipe: DataRecipe, name: SplitName, code: str) -> tuple[list[str], str]:
    """A split's files, and a hash that shows whether they have changed, without reading them."""
    files = sorted(_files(recipe, name))
    state = hashlib.sha256(repr((recipe.format, name, code, _library(recipe.format))).encode())
    for path, status in files:
        state.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return [path for path, _ in files], state.hexdigest()


def _files(recipe: DataRecipe, name: SplitName) -> Iterator[tuple[str, os.stat_result]]:
    """The files that a split is made of; none for data that ships with a library."""
    if recipe.root is None or recipe.format == "digits":
        return
    folder = Path(recipe.root)
    if recipe.format == "imagefolder":
        folder = split_folder(folder, name)
    elif recipe.format == "imagenet":
        folder = folder / name
    elif recipe.format == "cifar10":
        folder = folder / "cifar-10-batches-py"
    if folder.is_dir():  # Otherwise `open_split` says what is missing.
        yield from _walk(str(folder))


def _walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(entry.path)
            else:
                try:
                    yield entry.path, entry.stat()
                except OSError as error:  # A broken link, for example.
                    raise _unreadable(entry.path, error) from None


def _library(data_format: str) -> str:
    return importlib.metadata.version("scikit-learn") if data_format == "digits" else ""


def _user_code(name: str, key: str) -> str:
    """A hash of the user's module that "package.module:function" names; "" for a registered name."""
    if name.startswith(TIMM):
        return f"timm {importlib.metadata.version('timm')}" if importlib.util.find_spec("timm") else ""
    if name.startswith(TORCHVISION) or not is_import_path(name):
        return ""
    module = name.partition(":")[0]
    check_module(module, key)
    try:
        return hashlib.sha256(repr(sorted(codehash.module_hashes(module).items())).encode()).hexdigest()
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"{key} = {name!r} cannot be imported: {error}. Modules are looked up on Python's path, "
            "and in the folder that quantflow is started in."
        ) from None


def _hash_file(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"Image file {path} cannot be read: {error.strerror}. Fix it, or remove it from the dataset.")
