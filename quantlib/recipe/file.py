"""The recipe file: TOML, with paths relative to it, and changes from the command line."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantlib.errors import RecipeError
from quantlib.recipe.schema import Recipe, parse_recipe
from quantlib.recipe.sections import FILE, is_weights_file


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: A TOML file. Relative paths in it are relative to its folder.
        overrides: Each is "KEY=VALUE", such as `qat.0.epochs=2`. The value is TOML or else a plain string; a path in it
            is relative to the working directory.

    Raises:
        RecipeError: If the file is missing or not TOML, or a key or value is not allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return parse_text(text, path.resolve().parent, overrides)
    except FileNotFoundError:
        raise RecipeError(
            f"No recipe {str(path)!r}: give the path of a TOML file, or a name that `quantflow recipes` lists."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"Recipe {str(path)!r} cannot be read as TOML: {error}.") from None


def parse_text(text: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe file's text, as `load_recipe` would read it from a file in `folder`, an absolute path.

    Raises:
        TOMLDecodeError: If it is not TOML.
        RecipeError: If a key or value is not allowed.
    """
    tables = tomllib.loads(text)
    _resolve_paths(tables, folder)
    for override in overrides:
        _override(tables, override)
    _resolve_paths(tables, Path.cwd())
    return parse_recipe(tables)


def override_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with some values changed, in the same way as by `load_recipe`.

    Raises:
        RecipeError: If a key or value is not allowed.
    """
    if not overrides:
        return recipe
    tables = recipe.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    if recipe.search is not None:
        # The search holds the budget: with a copy here, a new one could not be set in one place.
        tables["gate"].pop("max_top1_drop")
    for override in overrides:
        _override(tables, override)
    _resolve_paths(tables, Path.cwd())
    return parse_recipe(tables)


def _resolve_paths(tables: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe absolute; those that already are stay as they are."""
    model, data = tables.get("model"), tables.get("data")
    if isinstance(model, dict) and isinstance(model.get("weights"), str) and is_weights_file(model["weights"]):
        model["weights"] = str(folder / Path(model["weights"]).expanduser())
    if isinstance(model, dict) and str(model.get("architecture")).startswith(FILE):
        model["architecture"] = FILE + str(folder / Path(model["architecture"].removeprefix(FILE)).expanduser())
    if isinstance(data, dict) and isinstance(data.get("root"), str):
        data["root"] = str(folder / Path(data["root"]).expanduser())


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override!r} has no value: write KEY=VALUE, as in --set qat.0.epochs=2.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    *parents, last = key.split(".")
    place: Any = tables
    for part in parents:
        place = _step(place, part, override)
    if isinstance(place, list):
        place[_index(place, last, override)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise RecipeError(f"--set {override!r}: {'.'.join(parents)!r} is a value, not a table, in this recipe.")


def _step(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, override)]
    if isinstance(place, dict):
        return place.setdefault(part, {})
    raise RecipeError(f"--set {override!r}: {part!r} lies below a value, not a table, in this recipe.")


def _index(place: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise RecipeError(
            f"--set {override!r}: {part!r} is no branch of this recipe; it has {len(place)}, counted from 0."
        )
    return int(part)
