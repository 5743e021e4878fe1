"""Quantization-aware training as a flow of its own."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.graphs.run import run_deployed
from flows.parameters import Changes, EngineParameter, RecipeParameter
from quantlib.recipe.file import override_recipe
from quantlib.report.results import Report


@flow(name="qat", flow_run_name="{recipe.name}", persist_result=False)
def qat(recipe: RecipeParameter, changes: Changes = (), engine: EngineParameter = "local") -> Report | State[Any]:
    """Quantization-aware training of a float model, in every way that the recipe lists, compared with float.

    Args:
        recipe: The name or file of an existing recipe; or, field by field, the float model, the images and the
            branches to try. Branches of the other method are left out.
        changes: Values of the recipe to change, each in the form qat.0.epochs=2.
        engine: What computes the stages: local, the process of the run; dask, a cluster on its machine; or the cluster
            of dask://HOST:PORT.

    Raises:
        RecipeError: If the recipe has no [[qat]] branch.
    """
    return run_deployed("qat", override_recipe(recipe, changes), engine)
