"""The schemes that named qconfigs stand for, on a CPU whose int8 arithmetic does not saturate."""

from quantlib.recipe.branches import PTQRecipe
from quantlib.recipe.scheme import Scheme


def scheme(qconfig: str) -> Scheme:
    """The scheme of a branch that sets only this qconfig."""
    return PTQRecipe(name="test", qconfig=qconfig).scheme(8)
