"""The schemes that named qconfigs stand for, on a CPU whose int8 arithmetic does not saturate."""

from quantlib.recipe.branches import PTQRecipe
from quantlib.recipe.scheme import Scheme


def scheme(qconfig: str) -> Scheme:
    """What a branch with this qconfig, and nothing else, puts into a model."""
    return PTQRecipe(name="test", qconfig=qconfig).scheme(8)
