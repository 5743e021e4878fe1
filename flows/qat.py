"""Quantization-aware training alone, as a flow of its own."""

from prefect import flow

from flows.quantize import only, run_branches
from quantlib.recipe import Recipe
from quantlib.report import Report


@flow(name="qat", flow_run_name="{recipe.name}", persist_result=False)
def qat(recipe: Recipe) -> Report:
    """Quantization-aware training of a float model, in every way that the recipe names, compared with float.

    Args:
        recipe: The float model, the images, and the branches to try; those of another method are left out.

    Raises:
        RecipeError: If the recipe has no [[qat]] branch.
    """
    return run_branches("qat", only(recipe, "qat"))
