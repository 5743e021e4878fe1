"""Every stage of a run, wired: the baseline, the branches, the search, the benchmark, the report."""

from functools import partial
from typing import Any

from prefect.runtime import flow_run
from prefect.utilities.annotations import quote

from flows.graphs.branches import Trunk, contenders_of, evaluate_files, float_branch, grow_trunk, ptq_branch, qat_branch
from flows.graphs.search import search_branches
from quantlib import machine
from quantlib.errors import RecipeError
from quantlib.inputs import Inputs, find_inputs
from quantlib.recipe.schema import Recipe
from quantlib.report.tables import NoteRow, Report
from quantlib.runtimes import available
from quantlib.store.artifacts import Ref
from tasks.caching import PLANNER, call_with_edges
from tasks.findings import NotYetKnownError
from tasks.measure import Contender, benchmark, pick_examples
from tasks.planning import Pending
from tasks.report import Measurements, VariantRefs, find_reported, write_report
from tasks.run import FINISHED, start_run
from tasks.side_by_side import one_by_one, side_by_side


def run_branches(name: str, recipe: Recipe) -> Report:
    """The body of each flow."""
    with start_run(name, recipe, flow_run.id) as run:
        inputs = find_inputs(recipe, run.home / "splits", run.progress)
        measured = measure_branches(recipe, inputs)
        arguments = {"recipe": recipe, "classes": inputs.val.classes, "measurements": measured}
        # Prefect is not to look for edges in them.
        write = partial(write_report, **{name: quote(value) for name, value in arguments.items()})
        report: Report = call_with_edges(write, arguments)
    FINISHED.get([]).append(report)
    return report


def measure_branches(recipe: Recipe, inputs: Inputs) -> Measurements:
    """Every stage of a run, wired."""
    engine = available.find_engine(recipe.engine)
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
    found, search_best, conclusion = search_branches(trunk, baseline)
    variants = (baseline, *named, *found)
    contenders = tuple(dict.fromkeys(each for variant in variants for each in contenders_of(trunk, variant)))
    timings = benchmark(
        contenders,
        trunk.validation[0],
        machine.cpu_model(),
        tuple(sorted({1, *recipe.benchmark.batch_sizes})),
        tuple(sorted({1, *recipe.benchmark.num_threads})),
        recipe.benchmark.num_samples,
    )
    variants = evaluate_files(trunk, variants, contenders, timings)
    return Measurements(
        variants=variants,
        contenders=contenders,
        timings=timings,
        validation=inputs.validation,
        pictures=_pick_examples(trunk, variants, contenders, timings),
        notes=tuple(NoteRow(kind="note", text=text) for text in (conclusion, *inputs.remarks) if text),
        search_best=search_best,
    )


def _pick_examples(
    trunk: Trunk, variants: tuple[VariantRefs, ...], contenders: tuple[Contender, ...], timings: Ref
) -> Ref | None:
    num_examples = trunk.recipe.evaluation.num_examples
    if num_examples == 0:
        return None
    answered: Any
    try:
        reported = find_reported(trunk.recipe, variants, contenders, timings)
        answered = tuple(
            (variant.name, file.validation) for variant, file in zip(variants[1:], reported[1:], strict=True)
        )
    except NotYetKnownError:
        answered = Pending("benchmark")
    return pick_examples(trunk.validation, variants[0].validation, answered, num_examples)


def only(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the branches of one method, without a search.

    Raises:
        RecipeError: If it has none.
    """
    if not getattr(recipe, method):
        raise RecipeError(f"Recipe {recipe.name!r} has no [[{method}]] branch: add one, or run the flow `quantize`.")
    others: dict[str, object] = {other: () for other in ("ptq", "qat") if other != method}
    return recipe.model_copy(update=others | {"search": None})
