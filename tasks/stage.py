"""Stages: functions whose outputs are stored under a key made from everything that decides them.

Prefect's own result cache is not used: its records are pickled or unverified, are not written atomically, and do
not say what their key was made from.
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

from pydantic import BaseModel

from quantlib.progress import Progress
from quantlib.store import codehash
from quantlib.store.artifacts import Record, Ref
from quantlib.store.local import Store

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Ref | tuple[Ref, ...])

# Arguments that name a task run, or say how to compute rather than what.
_NOT_IN_KEY = {"branch"}
_LIBRARIES = ("torch", "torchvision", "pillow")
_PARSING = threading.Lock()


@dataclass(frozen=True)
class Job:
    """What a stage's work gets besides its inputs."""

    store: Store
    """Holds the inputs, and takes the outputs."""
    progress: Progress
    """Called with (steps done, total steps)."""


class Stage(Generic[P, R]):
    """A function of artifacts and settings, with a label.

    The code in a key is every module that the stage's function imports from quantlib in its own body, and what those
    modules import. So a stage imports the code that computes in its body; modules imported at the top of its file
    must not compute.
    """

    def __init__(self, work: Callable[Concatenate[Job, P], R], label: str, *, alone: bool = False) -> None:
        self.work = work
        self.label = label
        self.alone = alone
        self.name = work.__name__
        signature = inspect.signature(work)
        self._signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.num_outputs = len(getattr(signature.return_annotation, "__args__", (Ref,)))

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name."""
        return dict(self._signature.bind(*args, **kwargs).arguments)

    def label_for(self, arguments: Mapping[str, Any]) -> str:
        """The task run's name, such as `calibrate-per_channel`."""
        return self.label.format(**arguments)

    def ingredients(self, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Everything that decides the outputs, by name: inputs, recipe fields, code, libraries."""
        found = {"stage": self.name, **self._code()}
        for library in _LIBRARIES:
            found[f"library.{library}"] = importlib.metadata.version(library)
        for name, value in arguments.items():
            if name not in _NOT_IN_KEY:
                found.update(_flatten(name, value))
        return found

    def outputs_of(self, record: Record) -> R:
        """A record's outputs in the shape that the stage returns."""
        outputs = record.outputs if self.num_outputs > 1 else record.outputs[0]
        return cast("R", outputs)

    def _code(self) -> dict[str, str]:
        # Python 3.11 miscounts when two threads parse at once, and fails (python/cpython issue 106905).
        with _PARSING:
            try:
                return self._hash_code()
            except SystemError:  # A library parsed meanwhile; this lock does not stop it.
                return self._hash_code()

    @functools.cache  # noqa: B019 (stages live as long as the process)
    def _hash_code(self) -> dict[str, str]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.work)))
        function = tree.body[0]
        assert isinstance(function, ast.FunctionDef)
        modules = {name for name in codehash.imported_modules(function) if name.startswith("quantlib")}
        function.decorator_list = []  # Names and labels decide nothing.
        found = {f"code.{self.name}": codehash.hash_tree(tree)}
        for module in modules:
            try:
                hashes = codehash.module_hashes(module)
            except ModuleNotFoundError:
                continue  # `from quantlib.store import Ref` names a class, not a module.
            found.update({f"code.{name}": sha256 for name, sha256 in hashes.items()})
        return found


def stage(label: str, *, alone: bool = False) -> Callable[[Callable[Concatenate[Job, P], R]], Stage[P, R]]:
    """Turn a function into a stage.

    Args:
        label: Names its task runs; may contain the function's arguments, as in "calibrate-{branch}".
        alone: Nothing else may run on the machine meanwhile.
    """
    return lambda work: Stage(work, label, alone=alone)


def key_of(ingredients: Mapping[str, str]) -> str:
    """The key that a stage's outputs are stored under, in hex."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def find_inside(value: Any, kind: type[T]) -> Iterator[T]:
    """Every object of a type inside a value: in its mappings, sequences and dataclasses."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        yield from find_inside(list(value.values()), kind)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from find_inside(part, kind)
    elif dataclasses.is_dataclass(value):
        yield from find_inside([getattr(value, field.name) for field in dataclasses.fields(value)], kind)


def _flatten(name: str, value: Any) -> dict[str, str]:
    """A value flattened to dotted names, down to what JSON can write."""
    if isinstance(value, Ref):
        return {name: value.sha256}
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.metadata.get("in_key", True)}
    if isinstance(value, Mapping):
        return {k: v for field, part in value.items() for k, v in _flatten(f"{name}.{field}", part).items()}
    if isinstance(value, tuple | list):
        return {k: v for place, part in enumerate(value) for k, v in _flatten(f"{name}.{place}", part).items()}
    return {name: json.dumps(value)}
