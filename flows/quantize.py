"""The main flow: the float baseline, every PTQ and QAT branch, the report."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.graphs.run import run_deployed
from flows.parameters import Changes, EngineParameter, RecipeParameter
from quantlib.recipe.file import override_recipe
from quantlib.report.results import Report


@flow(name="quantize", flow_run_name="{recipe.name}", persist_result=False)
def quantize(recipe: RecipeParameter, changes: Changes = (), engine: EngineParameter = "local") -> Report | State[Any]:
    """Quantize a float model in every way that the recipe lists, and report which int8 model to ship.

    Args:
        recipe: The name or file of an existing recipe; or, field by field, the float model, the images and the
            branches to try.
        changes: Values of the recipe to change, each in the form qat.0.epochs=2.
        engine: What computes the stages: local, the process of the run; dask, a cluster on its machine; or the cluster
            of dask://HOST:PORT.
    """
    return run_deployed("quantize", override_recipe(recipe, changes), engine)
