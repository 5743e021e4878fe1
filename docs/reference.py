"""Writes docs/recipe.md and docs/report.md: every key of a recipe, and every column of a run's tables.

    python docs/reference.py

Both come from the schema and its docstrings alone. A test compares the pages with what this would write.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from quantlib.recipe.fields import MAX_INT
from quantlib.recipe.schema import Recipe
from quantlib.report.tables import ROWS

FOLDER = Path(__file__).parent
_WRITTEN = "Written by `make docs` from the code's own descriptions: change them there.\n"
_COLUMN_TYPES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    bytes: "bytes",
    datetime: "timestamp (UTC)",
    list[int]: "list of integers",
    list[float]: "list of numbers",
    list[str]: "list of strings",
}


def pages() -> dict[str, str]:
    """The text of both pages, by file name.

    Raises:
        ValueError: If a key or a column has no docstring.
    """
    return {"recipe.md": _recipe_page(), "report.md": _report_page()}


def _recipe_page() -> str:
    schema = Recipe.model_json_schema()
    keys, sections = [], []
    for name, key in schema["properties"].items():
        section = _section_of(key, schema)
        if section is None:
            keys.append(_key_row(name, key, schema["required"]))
        else:
            sections += _sections(name, key, section, schema)
    return "\n".join(
        [
            "# The recipe, key by key",
            "",
            _WRITTEN,
            "A recipe is a TOML file. An unknown key is an error that names the nearest valid one, and a value out of",
            "bounds is an error, too. Paths are relative to the recipe's file. `quantflow run RECIPE --set KEY=VALUE`",
            "changes a value, such as `--set qat.0.epochs=2`.",
            "",
            "## At the top",
            "",
            *_table(("key", "type", "default", "what it is"), keys),
            *sections,
        ]
    )


def _sections(name: str, key: Mapping[str, Any], section: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    """A table of the recipe, and those inside it."""
    heading = f"[[{name}]]" if key.get("type") == "array" else f"[{name}]"
    lines = ["", f"## `{heading}`", "", _described(section, name)]
    known = schema["$defs"]["PTQRecipe"]["properties"]
    shared = known if name == "qat" else {}
    if shared:
        lines[-1] += " It takes all keys of `[[ptq]]`, and these:"
    rows, inner = [], []
    for each, value in section["properties"].items():
        below = _section_of(value, schema)
        if below is not None:
            inner += _sections(f"{name}.{each}", value, below, schema)
        elif value != shared.get(each):
            rows.append(_key_row(each, value, section.get("required", ())))
    return [*lines, "", *_table(("key", "type", "default", "what it is"), rows), *inner]


def _section_of(key: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of the table that a key is; None if it is a value."""
    for each in (key, key.get("items", {}), *key.get("anyOf", ())):
        if "$ref" in each:
            found: Mapping[str, Any] = schema["$defs"][each["$ref"].rpartition("/")[2]]
            return found
    return None


def _key_row(name: str, key: Mapping[str, Any], required: Iterable[str]) -> tuple[str, ...]:
    absent = key.get("default") is None or key["default"] == ""
    default = "required" if name in required else "absent" if absent else f"`{json.dumps(key['default'])}`"
    return f"`{name}`", _type_of(key), default, _described(key, name)


def _type_of(key: Mapping[str, Any]) -> str:
    """What a value may be, in words."""
    if "anyOf" in key:
        return " or ".join(_type_of(each) for each in key["anyOf"] if each.get("type") != "null")
    if "enum" in key or "const" in key:
        return ", ".join(f"`{json.dumps(value)}`" for value in key.get("enum", [key.get("const")]))
    if key["type"] == "array":
        if "prefixItems" in key:
            return f"list: {', '.join(_type_of(each) for each in key['prefixItems'])}"
        return f"list of: {_type_of(key['items'])}"
    kind = {"object": "table"}.get(key["type"], str(key["type"]))
    return " ".join([kind, *_bounds_of(key)])


def _bounds_of(key: Mapping[str, Any]) -> list[str]:
    """The bounds of a number, without those that only keep it within 32 bits."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return [f"{word} {key[name]:,.10g}" for name, word in words.items() if name in key and key[name] < MAX_INT]


def _report_page() -> str:
    lines = [
        "# The report, column by column",
        "",
        _WRITTEN,
        "A run writes one Parquet file per table, `HOME/reports/TABLE/run_id=RUN/part-0.parquet`. If you read a whole",
        "folder, the run's name is the column `run_id`. Columns are added, never renamed; one that was added later is",
        "null in runs from before. Accuracies are fractions; units are in the names, or said below.",
    ]
    for name, row in ROWS.items():
        described = _docstrings(row)
        rows = [(f"`{column}`", _column_type(kind), described[column]) for column, kind in get_type_hints(row).items()]
        about = _one_line(inspect.getdoc(row) or "")
        lines += ["", f"## `{name}`", "", about, "", *_table(("column", "type", "what it is"), rows)]
    return "\n".join(lines)


def _column_type(kind: Any) -> str:
    if kind in _COLUMN_TYPES:
        return _COLUMN_TYPES[kind]
    (known,) = (each for each in get_args(kind) if each is not NoneType)
    return f"{_COLUMN_TYPES[known]} or null"


def _docstrings(row: type) -> dict[str, str]:
    """The strings below a dataclass's fields, which Python itself does not keep."""
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(row))).body
    assert isinstance(defined, ast.ClassDef)
    found = {}
    for field, below in zip(defined.body, [*defined.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        name = ast.unparse(field.target)
        match below:
            case ast.Expr(ast.Constant(str(text))):
                found[name] = _one_line(text)
            case _:
                raise ValueError(f"{row.__name__}.{name} has no docstring: add one below it.")
    return found


def _described(key: Mapping[str, Any], name: str) -> str:
    if not key.get("description"):
        raise ValueError(f"The recipe's key {name!r} has no docstring: add one below it.")
    return _one_line(key["description"])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    for file, text in pages().items():
        (FOLDER / file).write_text(text + "\n")
