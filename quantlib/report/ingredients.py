"""What a run was made from, and what changed from one run to another: recipe, data, code, libraries, CPU."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.report.results import Report
from quantlib.report.rows import StageRow
from quantlib.store.artifacts import Record
from quantlib.store.local import Store


@dataclass(frozen=True)
class Change:
    """A value that differs between two runs; None: absent."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class CodeChange:
    """A stage whose code differs between two runs."""

    stage: str
    modules: tuple[str, ...]
    """The modules that differ, as far as the stage's result depends on them; the stage's own code has its name."""


@dataclass(frozen=True)
class Ingredients:
    """What a run was made from, as far as the store's records still say."""

    data: Mapping[str, str]
    """Fingerprints: of the training and validation images, and of the float model's weights."""
    code: Mapping[str, Mapping[str, str]]
    """For each stage, the hash of each module."""
    environment: Mapping[str, str]
    """Versions of libraries and runtimes, and the CPU."""
    num_missing: int
    """Stages of the run whose records were deleted."""


def find_ingredients(store: Store, report: Report) -> Ingredients:
    """What a finished run was made from.

    Args:
        store: Holds the records of its stages.
        report: Its results.
    """
    records = [store.read_record(row.key) for row in report.stages]
    kept = [record for record in records if record is not None]
    first = report.variants[0]
    return Ingredients(
        data={name: value for record in kept for name, value in _fingerprints(record.ingredients)},
        code=_code(kept),
        environment={"CPU": first.cpu_model, "torch": first.torch_version}
        | {name: value for record in kept for name, value in _versions(record.ingredients)},
        num_missing=len(records) - len(kept),
    )


def validation_fingerprint(store: Store, stages: Iterable[StageRow]) -> str | None:
    """The fingerprint of the validation split that the stages read; None if no record says."""
    for row in stages:
        record = store.read_record(row.key)
        for name, value in _fingerprints(record.ingredients) if record else ():
            if name == _IMAGES["val"]:
                return value
    return None


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Change, ...]:
    """The names whose values differ, in the order of the second mapping."""
    names = dict.fromkeys([*after, *before])
    found = (Change(name, before.get(name), after.get(name)) for name in names)
    return tuple(change for change in found if change.before != change.after)


def code_changes(before: Ingredients, after: Ingredients) -> tuple[CodeChange, ...]:
    """The stages of both runs whose code differs."""
    found = (
        CodeChange(stage, tuple(sorted(change.name for change in changes(before.code[stage], after.code[stage]))))
        for stage in after.code
        if stage in before.code
    )
    return tuple(change for change in found if change.modules)


def flatten_recipe(tables: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's keys and values, such as {"gate.max_top1_drop": 0.01}; "ptq.minmax.observer" is of branch minmax."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": part for name, part in flatten_recipe(value).items()}
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) and "name" in part for part in value):
            found |= flatten_recipe({f"{key}.{part['name']}": part for part in value})
        else:
            found[key] = value
    return found


_IMAGES = {"train": "training images", "val": "validation images"}


def _fingerprints(ingredients: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for name, value in ingredients.items():
        if name.endswith("split.fingerprint"):
            yield _IMAGES[json.loads(ingredients[name.replace(".fingerprint", ".name")])], json.loads(value)
        elif name == "model.fingerprint":
            yield "float model", json.loads(value)


def _versions(ingredients: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    for name, value in ingredients.items():
        if name.startswith("library."):
            yield name.removeprefix("library."), value
        elif name == "exporter":
            yield "ONNX exporter", json.loads(value)
        elif name.endswith("runtime.name") and not json.loads(value).startswith("torchscript"):
            yield json.loads(value), json.loads(ingredients[name.replace(".name", ".version")])


def _code(records: Iterable[Record]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for record in records:
        hashes = {
            name.removeprefix("code."): value
            for name, value in record.ingredients.items()
            if name.startswith("code.") or name == "model.code"
        }
        found.setdefault(record.stage, {}).update(hashes)
    return found
