"""Parameters in a deployment's form: a recipe by name, by file or field by field, and changes to it."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from flows.hosting.cluster import ENGINE
from quantlib.errors import RecipeError, suggest
from quantlib.recipe.fields import MAX_ITEMS, PathName
from quantlib.recipe.file import load_recipe
from quantlib.recipe.schema import Recipe


def find_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in a file, or with a name that `quantflow recipes` lists.

    Raises:
        RecipeError: If it does not exist or is wrong.
    """
    packaged = packaged_recipes()
    path = packaged.get(name, Path(name).expanduser())
    if not path.exists():
        raise RecipeError(
            f"No recipe {name!r}{suggest(name, packaged)} "
            f"Give the path of a TOML file, or one of: {', '.join(packaged)}."
        )
    return load_recipe(path, overrides)


def find_recipes(names: tuple[str, ...], overrides: tuple[str, ...] = ()) -> tuple[Recipe, ...]:
    """The recipes with these names, in these files, and in the files NAME.toml of these folders.

    Raises:
        RecipeError: If one does not exist or is wrong, a folder has none, or two have the same name.
    """
    found: dict[str, Recipe] = {}
    for given in names:
        folder = Path(given).expanduser()
        is_folder = given not in packaged_recipes() and folder.is_dir()
        files = sorted(map(str, folder.glob("*.toml"))) if is_folder else [given]
        if not files:
            raise RecipeError(f"The folder {given!r} has no recipe: put files NAME.toml in it, or name a file.")
        for name in files:
            recipe = find_recipe(name, overrides)
            if recipe.name in found:
                raise RecipeError(
                    f"Two of the recipes are named {recipe.name!r}, the second in {name}: give each its own `name`."
                )
            found[recipe.name] = recipe
    return tuple(found.values())


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with quantflow, by name."""
    folder = Path(str(files("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _load_where_named(value: Any) -> Any:
    return find_recipe(value) if isinstance(value, str) else value


RecipeParameter = Annotated[Recipe, BeforeValidator(_load_where_named, json_schema_input_type=PathName | Recipe)]
"""The flow gets a Recipe; who starts it may give the name or file of one, which is read again for each run."""

EngineParameter = Annotated[str, Field(max_length=300, pattern=ENGINE)]
"""What computes the stages, in the form of `--engine`."""

Changes = Annotated[tuple[PathName, ...], Field(max_length=MAX_ITEMS)]
"""Changes to a recipe, each in the form "KEY=VALUE", like those of `--set`."""
