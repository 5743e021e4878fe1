"""The main flow: the float baseline, every PTQ and QAT branch, the report."""

from prefect import flow
from prefect.runtime import flow_run

from flows.branches import float_branch, grow_trunk, ptq_branch, qat_branch
from flows.parameters import Changes, RecipeParameter
from flows.search import search_branches
from quantlib import machine
from quantlib.errors import RecipeError
from quantlib.inputs import Inputs, find_inputs
from quantlib.recipe import Recipe, override_recipe
from quantlib.report import Report
from quantlib.store import Ref
from tasks.measure import benchmark
from tasks.report import VariantRefs, write_report
from tasks.run import start_run


@flow(name="quantize", flow_run_name="{recipe.name}", persist_result=False)
def quantize(recipe: RecipeParameter, changes: Changes = ()) -> Report:
    """Quantize a float model in every way that the recipe names, and report which int8 model to ship.

    Args:
        recipe: The name of a ready recipe, or the file of one; or the float model, the images, and the branches to
            try, field by field.
        changes: Values of the recipe to change, each as qat.0.epochs=2.
    """
    return run_branches("quantize", override_recipe(recipe, changes))


def run_branches(name: str, recipe: Recipe) -> Report:
    """The body of each flow."""
    with start_run(name, recipe, flow_run.id) as run:
        inputs = find_inputs(recipe, run.home / "splits", run.progress)
        return write_report(recipe, *measure_branches(recipe, inputs))


def measure_branches(recipe: Recipe, inputs: Inputs) -> tuple[tuple[VariantRefs, ...], Ref, tuple[str, ...]]:
    """Every stage of a run, wired: the variants, their timings, and what is to be said of the search."""
    engine = machine.find_engine(recipe.engine)
    trunk = grow_trunk(recipe, inputs, engine)
    baseline = float_branch(trunk)
    named = [ptq_branch(trunk, branch) for branch in recipe.ptq] + [qat_branch(trunk, branch) for branch in recipe.qat]
    found, notes = search_branches(trunk, baseline)
    variants = (baseline, *named, *found)
    timings = benchmark(
        tuple(variant.artifact for variant in variants),
        trunk.validation[0],
        engine,
        machine.cpu_model(),
        tuple(sorted({1, *recipe.benchmark.batch_sizes})),
        tuple(sorted({1, *recipe.benchmark.num_threads})),
        recipe.benchmark.num_samples,
    )
    return variants, timings, tuple(notes)


def only(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the branches of one method, without a search.

    Raises:
        RecipeError: If it has none.
    """
    if not getattr(recipe, method):
        raise RecipeError(f"Recipe {recipe.name!r} has no [[{method}]] branch: add one, or run the flow `quantize`.")
    others: dict[str, object] = {other: () for other in ("ptq", "qat") if other != method}
    return recipe.model_copy(update=others | {"search": None})
