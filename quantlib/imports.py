"""The user's own functions, which a recipe names as "package.module:function"."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from quantlib.errors import ModelError, QuantflowError, RecipeError

T = TypeVar("T")
_OWN = {"flows", "tasks", "quantlib", "recipes"}


def import_function(name: str, key: str, known: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that "package.module:function" names.

    Raises:
        RecipeError: If there is no such function; `key` is the recipe's key that holds `name`.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise RecipeError(f'{key} = {name!r} is unknown. Allowed: {", ".join(known)}, or "package.module:function".')
    check_module(module_name, key)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{key} = {name!r} cannot be imported: {error}. Modules are looked up on Python's path, "
            "and in the folder that quantflow is started in."
        ) from None
    except Exception as error:
        raise RecipeError(f"{key} = {name!r} cannot be imported: its module {_raised(error)}.") from None
    if not callable(function):
        raise RecipeError(f"{key} = {name!r} is a {type(function).__name__}: it must be a function or a class.")
    return function


def check_module(module: str, key: str) -> None:
    """Raise an error if a user's module cannot be reached under its name.

    Raises:
        RecipeError: If one of quantflow's own packages has that name.
    """
    package = module.partition(".")[0]
    if package in _OWN:
        raise RecipeError(
            f"{key} names the module {module!r}, but {package!r} is a package of quantflow itself: rename your module."
        )


def call_function(function: Callable[..., T], name: str, *arguments: Any, **named: Any) -> T:
    """Call a function that a recipe names.

    Raises:
        ModelError: If it raises; the message names the place in its own file.
    """
    try:
        return function(*arguments, **named)
    except QuantflowError:
        raise
    except Exception as error:
        raise ModelError(f"{name} {_raised(error)}. Fix it there, or change what the recipe gives it.") from None


def _raised(error: Exception) -> str:
    """What was raised and where, such as "raised ValueError: no such depth (my/net.py, line 12)"."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    return f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}{place}"
