"""The types of a recipe's values: each has bounds, which its JSON schema also states.

A value outside them is refused when a run is requested, by Prefect's server too. The server keeps what it accepted, and
a value that it cannot return keeps every worker from its runs.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema

MAX_INT = 2**31 - 1
MAX_ITEMS = 1000
_MAX_DEPTH = 3
_MAX_TEXT = 1000

# pydantic itself refuses half characters (surrogates), which its regular expressions cannot name.
LINE = r"^[^\x00-\x1f\x7f]*$"
_LINE_IN_SCHEMA = {"pattern": r"^[^\x00-\x1f\x7f\ud800-\udfff]*$"}

# Strict, so that a value is taken as it is or refused: "3" is not 3, 1 is not true, and 2.0 is not 2.
Count = Annotated[int, Field(gt=0, le=MAX_INT, strict=True)]
Pixels = Annotated[int, Field(gt=0, le=16384, strict=True)]
Size = tuple[Pixels, Pixels]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
BranchName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Line = Annotated[str, Field(max_length=_MAX_TEXT, pattern=LINE, json_schema_extra=_LINE_IN_SCHEMA)]
PathName = Annotated[str, Field(max_length=4096, pattern=LINE, json_schema_extra=_LINE_IN_SCHEMA)]


def _check_arguments(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keyword arguments unchanged, if JSON can hold them.

    Raises:
        ValueError: If there are too many, or they are nested too deep or not of a JSON type.
    """
    for num_values, (value, depth) in enumerate(_walk(arguments)):
        if depth > _MAX_DEPTH:
            raise ValueError(f"tables and lists may be nested {_MAX_DEPTH} deep")
        if num_values > MAX_ITEMS:
            raise ValueError(f"at most {MAX_ITEMS} values are allowed")
        if isinstance(value, str) and (len(value) > _MAX_TEXT or not re.fullmatch(_LINE_IN_SCHEMA["pattern"], value)):
            raise ValueError(f"a string must be a single line of {_MAX_TEXT} characters at most")
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise ValueError(f"whole numbers may be from {-MAX_INT} to {MAX_INT}")
        if isinstance(value, float) and not abs(value) <= MAX_INT:
            raise ValueError(f"numbers may be from {-MAX_INT} to {MAX_INT}")
        if value is not None and not isinstance(value, str | int | float | list | tuple | dict):
            raise ValueError(f"{value!r} is neither a string, a number, a boolean, a list nor a table")
    return arguments


def _walk(value: Any, depth: int = 0) -> Iterator[tuple[Any, int]]:
    """Every key and value in a value, itself first, each with its depth; nothing below what is too deep."""
    yield value, depth
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield key, depth
            yield from _walk(below, depth + 1)
    elif isinstance(value, list | tuple):
        for below in value:
            yield from _walk(below, depth + 1)


def _arguments_schema() -> dict[str, Any]:
    """Schema of what `_check_arguments` allows, except for the number of values."""
    text = {"type": "string", "maxLength": _MAX_TEXT, **_LINE_IN_SCHEMA}
    number = {"type": "number", "minimum": -MAX_INT, "maximum": MAX_INT}
    scalars = [text, number, {"type": "boolean"}, {"type": "null"}]
    value: dict[str, Any] = {"anyOf": scalars}
    for _ in range(_MAX_DEPTH - 1):
        array = {"type": "array", "items": value, "maxItems": MAX_ITEMS}
        value = {"anyOf": [*scalars, array, _table(value)]}
    return _table(value)


def _table(value: dict[str, Any]) -> dict[str, Any]:
    keys = {"maxLength": _MAX_TEXT, **_LINE_IN_SCHEMA}
    return {"type": "object", "additionalProperties": value, "propertyNames": keys, "maxProperties": MAX_ITEMS}


Arguments = Annotated[dict[str, Any], AfterValidator(_check_arguments), WithJsonSchema(_arguments_schema())]
"""Keyword arguments, as a recipe file can give them."""
