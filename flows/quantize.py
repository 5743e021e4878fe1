"""The main flow: the float baseline, every PTQ and QAT branch, the report."""

from functools import partial

from prefect import flow
from prefect.runtime import flow_run

from flows.branches import float_branch, grow_trunk, ptq_branch, qat_branch
from flows.parameters import Changes, RecipeParameter
from flows.search import search_branches
from quantlib import machine
from quantlib.errors import RecipeError
from quantlib.inputs import Inputs, find_inputs
from quantlib.machine import Runtime
from quantlib.recipe import Recipe
from quantlib.recipe_file import override_recipe
from quantlib.report import Report
from tasks.caching import PLANNER
from tasks.measure import Contender, benchmark, pick_examples
from tasks.report import Measurements, VariantRefs, write_report
from tasks.run import start_run
from tasks.side_by_side import one_by_one, side_by_side


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
        return write_report(recipe, inputs.val.classes, measure_branches(recipe, inputs))


def measure_branches(recipe: Recipe, inputs: Inputs) -> Measurements:
    """Every stage of a run, wired."""
    engine = machine.find_engine(recipe.engine)
    trunk = grow_trunk(recipe, inputs, engine)
    # A plan is in the order of the recipe.
    run_all = side_by_side if PLANNER.get() is None else one_by_one
    baseline, *named = run_all(
        [
            partial(float_branch, trunk),
            *(partial(ptq_branch, trunk, branch) for branch in recipe.ptq),
            *(partial(qat_branch, trunk, branch) for branch in recipe.qat),
        ]
    )
    found, notes = search_branches(trunk, baseline)
    variants = (baseline, *named, *found)
    contenders = tuple(contender for variant in variants for contender in _contenders(variant, trunk.onnx_runtimes))
    timings = benchmark(
        contenders,
        trunk.validation[0],
        machine.cpu_model(),
        tuple(sorted({1, *recipe.benchmark.batch_sizes})),
        tuple(sorted({1, *recipe.benchmark.num_threads})),
        recipe.benchmark.num_samples,
    )
    pictures = None
    if recipe.evaluation.num_examples > 0:
        answered = tuple((variant.name, variant.artifact, variant.candidates) for variant in variants[1:])
        pictures = pick_examples(trunk.validation, baseline.validation, answered, recipe.evaluation.num_examples)
    return Measurements(
        variants=variants, contenders=contenders, timings=timings, pictures=pictures, notes=tuple(notes)
    )


def _contenders(variant: VariantRefs, onnx_runtimes: tuple[Runtime, ...]) -> list[Contender]:
    """A variant's files in every runtime that this machine has for them."""
    if variant.engine is None:
        return [Contender(variant.artifact, machine.torch_runtime(None))]
    engines = dict.fromkeys((variant.engine, *machine.engines()))
    found = [Contender(variant.artifact, machine.torch_runtime(engine)) for engine in engines]
    if variant.onnx is not None and variant.onnx.runtime is not None:
        found += [Contender(variant.onnx.file, runtime) for runtime in onnx_runtimes]
    return found


def only(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the branches of one method, without a search.

    Raises:
        RecipeError: If it has none.
    """
    if not getattr(recipe, method):
        raise RecipeError(f"Recipe {recipe.name!r} has no [[{method}]] branch: add one, or run the flow `quantize`.")
    others: dict[str, object] = {other: () for other in ("ptq", "qat") if other != method}
    return recipe.model_copy(update=others | {"search": None})
