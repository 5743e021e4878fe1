"""The schemes that named qconfigs stand for, on a CPU whose int8 arithmetic does not saturate."""

from dataclasses import asdict
from typing import Any

from quantlib.recipe.branches import PTQRecipe
from quantlib.recipe.scheme import Scheme


def scheme(qconfig: str) -> Scheme:
    """What a branch with this qconfig, and nothing else, puts into a model."""
    return PTQRecipe(name="test", qconfig=qconfig).scheme(8)


def header_of(qconfig: str) -> dict[str, Any]:
    """The part of a stored model's header that says how it was prepared."""
    return {"scheme": asdict(scheme(qconfig))}
