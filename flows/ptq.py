"""Post-training quantization as a flow of its own."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.graphs.run import end_state, run_flow
from flows.parameters import Changes, RecipeParameter
from quantlib.recipe.file import override_recipe
from quantlib.report.results import Report
from tasks.execution import home_folder


@flow(name="ptq", flow_run_name="{recipe.name}", persist_result=False)
def ptq(recipe: RecipeParameter, changes: Changes = ()) -> Report | State[Any]:
    """Post-training quantization of a float model, in every way that the recipe lists, compared with float.

    Args:
        recipe: The name or file of an existing recipe; or, field by field, the float model, the images and the
            branches to try. Branches of the other method are left out.
        changes: Values of the recipe to change, each in the form qat.0.epochs=2.

    Raises:
        RecipeError: If the recipe has no [[ptq]] branch.
    """
    return end_state(run_flow("ptq", override_recipe(recipe, changes), home_folder()))
