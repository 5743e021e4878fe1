"""The arguments of stages as JSON: our own dataclasses and pydantic models by name, and nothing that runs."""

import dataclasses
import importlib
from typing import Any

from pydantic import BaseModel

_OWN = ("quantlib.", "tasks.")


def encode(value: Any) -> Any:
    """A value as JSON can write it.

    Raises:
        TypeError: If it is of a type that does not travel.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if isinstance(value, BaseModel):
        return {"type": kind, "fields": value.model_dump(mode="json")}
    if dataclasses.is_dataclass(value):
        return {"type": kind, "fields": {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    raise TypeError(f"An argument of a stage is a {type(value).__name__}, which cannot be sent to another machine.")


def decode(value: Any) -> Any:
    """What `encode` was given.

    Raises:
        ValueError: If it names a class that is not one of ours.
    """
    if isinstance(value, list):
        return tuple(map(decode, value))
    if not isinstance(value, dict):
        return value
    kind, fields = _class_named(value["type"]), value["fields"]
    if issubclass(kind, BaseModel):
        return kind.model_validate(fields)
    return kind(**{name: decode(part) for name, part in fields.items()})


def _class_named(name: str) -> type:
    module, _, qualified = name.partition(":")
    found = getattr(importlib.import_module(module), qualified, None) if module.startswith(_OWN) else None
    if not (isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, BaseModel))):
        raise ValueError(f"{name} is no class of quantflow's that stages take.")
    return found
