"""What a dataset or a model is, by its content: on the machine that begins a run, and on each that computes for it.

A dataset's files are hashed once; afterwards their names, sizes and times show that nothing has changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from quantlib.data.folders import split_folder
from quantlib.data.split import SplitInput, SplitName
from quantlib.errors import DataError, MachineError, ModelError, RecipeError
from quantlib.files import read_file, seal, unseal, write_atomically
from quantlib.imports import check_module
from quantlib.models.source import ModelInput
from quantlib.progress import Progress, silent
from quantlib.recipe.sections import TIMM, TORCHVISION, DataRecipe, is_import_path, is_weights_file
from quantlib.store import codehash

_CHUNK = 256
"""Files that a thread hashes at a time: one would cost more for the hand-over than for the hash."""


def find_split(data: DataRecipe, name: SplitName, cache: Path, progress: Progress = silent) -> SplitInput:
    """Identify a split; it is opened and hashed only if its files have changed since the last time.

    Args:
        data: Its format and folder.
        name: Which split.
        cache: Folder that remembers the hashes.
        progress: Called with (files hashed, files in the split).

    Raises:
        RecipeError: If the format is unknown.
        DataError: If the dataset is missing, empty or unreadable.
    """
    code = user_code(data.format, "data.format")
    state = _look(data, name, code)
    try:
        found = unseal(read_file(cache / f"{state}.json"), unsealed_too=False)
        return SplitInput(root=data.root, **(found | {"classes": tuple(found["classes"])}))
    except (OSError, ValueError, TypeError, KeyError):
        pass  # Not seen before, or its note is damaged: read the files themselves.

    from quantlib.data import datasets

    split = datasets.open_split(data.format, data.root, name)
    # Look again: opening may create the files, as when torchvision unpacks ImageNet's archives.
    paths: list[str] = []
    state = _look(data, name, code, paths)
    content = hashlib.sha256(repr((data.format, code, "" if paths else state)).encode())
    above = f"{Path(data.root or '')}".rstrip("/") + "/"
    for done, (path, sha256) in enumerate(_hash_files(paths), start=1):
        content.update(f"{path.removeprefix(above)}\0{sha256}\n".encode())
        if done % _CHUNK == 0 or done == len(paths):
            progress(done, len(paths))
    found_input = SplitInput(
        data.format, name, data.root, content.hexdigest(), len(split), split.classes, split.num_skipped
    )
    kept = {key: value for key, value in asdict(found_input).items() if key != "root"}
    write_atomically(cache / f"{state}.json", seal(kept))
    return found_input


def check_split(split: SplitInput, cache: Path) -> None:
    """Raise an error if a split on this machine is not the one that was identified, maybe on another.

    Args:
        split: As it was identified.
        cache: Folder that remembers the hashes.

    Raises:
        MachineError: If it has other files, or the user's code that reads them is other code.
        DataError: If it is missing or unreadable.
    """
    found = find_split(DataRecipe(format=split.format, root=split.root), split.name, cache)
    if found.fingerprint != split.fingerprint:
        raise MachineError(
            f"The {split.name} split in {split.root or split.format} is not the one that the run began with: its "
            "files, or the code that reads them, differ. Copy the same files here, or start the run again."
        )


def check_model(model: ModelInput) -> None:
    """Raise an error if a model on this machine is not the one that was identified, maybe on another.

    Raises:
        MachineError: If its weights, its file or the user's code that builds it differ.
        ModelError: If one of them is missing.
    """
    code, fingerprint = model.code, model.fingerprint
    if model.file:
        code = hash_model_file(model.file, f"No file {model.file!r}.")
    elif is_import_path(model.architecture) or model.architecture.startswith(TIMM):
        code = user_code(model.architecture, "model.architecture")
    if model.weights and is_weights_file(model.weights):
        fingerprint = hash_model_file(model.weights, f"No weights file {model.weights!r}.")
    if (code, fingerprint) != (model.code, model.fingerprint):
        what = "the code of its architecture differs" if code != model.code else f"{model.weights} has other weights"
        raise MachineError(f"The model is not the one that the run began with: {what}. Copy the same files here.")


def hash_model_file(name: str, missing: str) -> str:
    """The SHA-256 of a file that a model is made from.

    Raises:
        ModelError: With the message `missing`, if there is none.
    """
    path = Path(name)
    if not path.is_file():
        raise ModelError(missing)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _look(data: DataRecipe, name: SplitName, code: str, paths: list[str] | None = None) -> str:
    """A hash that shows whether a split's files have changed, without reading them; `paths` receives their paths."""
    state = hashlib.sha256(repr((data.format, name, code, _library(data.format))).encode())
    for path, status in _files(data, name):
        try:
            state.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except UnicodeEncodeError:
            raise DataError(f"Image file {path!r} has a name that is not UTF-8. Rename it.") from None
        if paths is not None:
            paths.append(path)
    return state.hexdigest()


def _files(data: DataRecipe, name: SplitName) -> Iterator[tuple[str, os.stat_result]]:
    """The files that a split is made of, in the order of their paths; none for data that ships with a library."""
    if data.root is None or data.format == "digits":
        return
    folder = Path(data.root)
    if data.format == "imagefolder":
        folder = split_folder(folder, name)
    elif data.format == "imagenet":
        folder = folder / name
    elif data.format == "cifar10":
        folder = folder / "cifar-10-batches-py"
    if folder.is_dir():  # Otherwise `open_split` says what is missing.
        yield from _walk(str(folder))


def _walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """One folder's at a time, so that a million files take little memory."""
    with os.scandir(folder) as entries:
        # "a-b.png" sorts before "a/c.png", and after it if the slash were missing.
        found = sorted(entries, key=lambda entry: f"{entry.name}/" if entry.is_dir() else entry.name)
    for entry in found:
        if entry.is_dir():
            yield from _walk(entry.path)
        else:
            try:
                yield entry.path, entry.stat()
            except OSError as error:  # A broken link, for example.
                raise _unreadable(entry.path, error) from None


def _library(data_format: str) -> str:
    return importlib.metadata.version("scikit-learn") if data_format == "digits" else ""


def user_code(name: str, key: str) -> str:
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


def _hash_files(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each path with its file's hash."""
    chunks = (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
    with ThreadPoolExecutor(2) as pool:
        for chunk, hashes in pool.map(lambda chunk: (chunk, [_hash_file(path) for path in chunk]), chunks):
            yield from zip(chunk, hashes, strict=True)


def _hash_file(path: str) -> str:
    try:
        # Unbuffered: a buffer costs more than the hash of a small file.
        with Path(path).open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"Image file {path} cannot be read: {error.strerror}. Fix it, or remove it from the dataset.")
