"""What a deployment's form asks for: a recipe by name or file, or filled in field by field, and changes to it."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from quantlib.errors import RecipeError, suggest
from quantlib.recipe.fields import MAX_ITEMS, PathName
from quantlib.recipe.file import load_recipe
from quantlib.recipe.schema import Recipe


def find_recipe(name: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe of a file, or of a name that `quantflow recipes` lists.

    Raises:
        RecipeError: If there is none, or it is wrong.
    """
    packaged = packaged_recipes()
    path = packaged.get(name, Path(name).expanduser())
    if not path.exists():
        raise RecipeError(
            f"No recipe {name!r}{suggest(name, packaged)} "
            f"Give the path of a TOML file, or one of: {', '.join(packaged)}."
        )
    return load_recipe(path, overrides)


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with quantflow, by name."""
    folder = Path(str(files("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _load_where_named(value: Any) -> Any:
    return find_recipe(value) if isinstance(value, str) else value


RecipeParameter = Annotated[Recipe, BeforeValidator(_load_where_named, json_schema_input_type=PathName | Recipe)]
"""A Recipe to the flow; to whoever starts it also the name or the file of one, read again at the start of each run."""

Changes = Annotated[tuple[PathName, ...], Field(max_length=MAX_ITEMS)]
"""Changes to a recipe, each as "KEY=VALUE", like those of `--set`."""
