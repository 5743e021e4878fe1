"""Reads a file of `torch.export.save`, without running any code that it may hold.

`torch.export.load` unpickles, and evaluates expressions. Here, the JSON and the raw tensors of the archive are read,
and nothing else: https://docs.pytorch.org/docs/stable/export/pt2_archive.html
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantlib.errors import ModelError, reason_of
from quantlib.models.exported_graph import DTYPES

T = TypeVar("T")
# The format's major version: a reader of one cannot read another.
_FORMAT = 8
_SAVE_AGAIN = "Save it again: torch.export.save(torch.export.export(model, (images,)), FILE)."


def read_program(path: str) -> str:
    """The graph in a file, as JSON that `exported_graph.build` makes a model of.

    Raises:
        ModelError: If there is no such file, it is damaged, or this version of torch does not write such files.
    """
    return _read(path, _program)


def read_state(path: str) -> dict[str, Tensor]:
    """The parameters, buffers and constants in a file, by name.

    Raises:
        ModelError: As for `read_program`, or if one is stored as a pickle.
    """
    return _read(path, _state)


def _read(path: str, part: Callable[[_Archive], T]) -> T:
    if not Path(path).is_file():
        raise ModelError(f'No file {path!r}: set model.architecture to "file:" and a file of torch.export.save.')
    try:
        with zipfile.ZipFile(path) as opened:
            return part(_Archive(path, opened))
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RecursionError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ModelError(f"{path!r} is damaged, or no file of torch.export.save ({reason}). {_SAVE_AGAIN}") from None


class _Archive:
    """An open file."""

    def __init__(self, path: str, opened: zipfile.ZipFile) -> None:
        self.path, self._opened = path, opened
        names = opened.namelist()
        # Everything is below one folder, whose name is the file's when it was saved.
        self._root = names[0].partition("/")[0] if names else ""
        if "serialized_exported_program.json" in names:
            raise ModelError(
                f"{path!r} was saved by another version of torch, which this one cannot read. {_SAVE_AGAIN}"
            )
        models = [name for name in names if name.startswith(f"{self._root}/models/") and name.endswith(".json")]
        if len(models) != 1:
            raise ModelError(f"{path!r} holds {len(models)} exported models, and must hold one. {_SAVE_AGAIN}")
        self.model = models[0].removeprefix(f"{self._root}/models/").removesuffix(".json")

    def read(self, name: str) -> bytes:
        """The content of a file in it."""
        return self._opened.read(f"{self._root}/{name}")

    def has(self, name: str) -> bool:
        """Whether it holds a file."""
        return f"{self._root}/{name}" in self._opened.namelist()


def _program(archive: _Archive) -> str:
    saved = json.loads(archive.read(f"models/{archive.model}.json"))
    version = saved["schema_version"]["major"]
    if version != _FORMAT:
        raise ModelError(
            f"{archive.path!r} was saved by torch {saved.get('torch_version')} in format {version}, and torch "
            f"{torch.__version__} reads format {_FORMAT}. {_SAVE_AGAIN}"
        )
    module = saved["graph_module"]
    for node in module["graph"]["nodes"]:
        del node["metadata"]  # Stack traces: they would change with the folder that the model was exported in.
    return json.dumps({name: module[name] for name in ("graph", "signature")}, separators=(",", ":"))


def _state(archive: _Archive) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for kind in ("weights", "constants"):
        folder = f"data/{kind}"
        if archive.has(f"{folder}/{archive.model}.pt"):
            raise ModelError(
                f"{archive.path!r} was saved by an older torch, as pickles, which are not read. {_SAVE_AGAIN}"
            )
        for name, meta in json.loads(archive.read(f"{folder}/{archive.model}_{kind}_config.json"))["config"].items():
            if meta["use_pickle"] or meta["tensor_meta"] is None:
                raise ModelError(
                    f"{archive.path!r} stores {name} as a pickle, which could run code and is not read: export a model "
                    "whose parameters and constants are plain tensors."
                )
            state[name] = _tensor(archive.read(f"{folder}/{meta['path_name']}"), meta["tensor_meta"])
    return state


def _tensor(content: bytes, meta: dict[str, Any]) -> Tensor:
    sizes, strides = ([int(number["as_int"]) for number in meta[name]] for name in ("sizes", "strides"))
    dtype = DTYPES[meta["dtype"]]
    if math.prod(sizes) == 0:
        return torch.zeros(sizes, dtype=dtype)
    # Several tensors can share what is stored; each gets its own.
    stored = torch.frombuffer(bytearray(content), dtype=dtype)
    return stored.as_strided(sizes, strides, int(meta["storage_offset"]["as_int"])).clone()
