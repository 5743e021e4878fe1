"""The wiring of a whole run: the baseline, the branches, the search, the benchmark, the report."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Failed

from flows.graphs.branches import float_branch, ptq_branch, qat_branch
from flows.graphs.evaluation import evaluate_files, targets_of, time_files
from flows.graphs.search import search_branches
from flows.graphs.shared_stages import SharedStages, share_stages
from flows.hosting.cluster import LOCAL, open_executor
from quantlib.errors import RecipeError
from quantlib.inputs import Inputs, find_inputs
from quantlib.recipe.schema import Recipe
from quantlib.report.results import Report
from quantlib.report.rows import NoteRow
from quantlib.store.artifacts import Ref
from tasks.execution import Executor, start_run
from tasks.listener import Listener
from tasks.measure import pick_examples
from tasks.planning import Pending
from tasks.refs import BenchmarkTarget, Measurements, VariantRefs
from tasks.report import find_reported, write_report
from tasks.run import NotYetKnownError, Run, home_folder, together


def run_flow(
    name: str,
    recipe: Recipe,
    home: Path,
    listener: Listener | None = None,
    run_id: str | None = None,
    prefix: str = "",
    executor: Executor | None = None,
) -> Report:
    """Body of every flow.

    Args:
        name: quantize, ptq or qat; the last two leave out the other method's branches, and the search.
        recipe: The recipe to run.
        home: The home folder.
        listener: Notified of each stage, if given.
        run_id: The run to resume; None starts a new one.
        prefix: Put before the labels that users see.
        executor: Computes the stages; None: this process.

    Raises:
        RecipeError: If the recipe has no branch of the flow's method.
    """
    if name != "quantize":
        recipe = only(recipe, name)
    with start_run(name, recipe, flow_run.id, home, listener, run_id, prefix, executor) as run:
        run.executor.check(recipe)
        inputs = find_inputs(recipe, home / "splits", partial(run.progress, ""))
        measured = measure_branches(run, recipe, inputs)
        write = partial(write_report, run, recipe, inputs, measured)
        report: Report = run.call_task("write_report", "write_report", write, {"measurements": measured})
    return report


def end_state(report: Report) -> Report | State[Any]:
    """What a flow returns: the report or, after a regression, a Failed state that says what got worse."""
    return Failed(message=f"Regression: {report.regression}") if report.regression else report


def run_deployed(name: str, recipe: Recipe, engine: str) -> Report | State[Any]:
    """Body of a deployed flow.

    Args:
        name: quantize, ptq or qat.
        recipe: The recipe to run.
        engine: What computes the stages, as `--engine` takes it.
    """
    home, logger = home_folder(), get_run_logger()
    with open_executor(engine, home, logger.warning) as executor:
        return end_state(run_flow(name, recipe, home, executor=executor))


def make_flow(
    name: str,
    home: Path,
    listener: Listener,
    run_id: str | None,
    finished: Callable[[Report], None],
    engine: str = LOCAL,
    say: Callable[[str], None] = print,
) -> Flow[..., Any]:
    """A flow for this process alone; it does the same as `run_flow`.

    Args:
        name: Name of the flow.
        home: The home folder.
        listener: Notified of each stage.
        run_id: The run to resume; None starts a new one.
        finished: Called with the report of a completed run, whatever happens to Prefect's flow run afterwards.
        engine: What computes the stages, as `--engine` takes it.
        say: Called with messages for the user that are not errors.
    """

    def run(recipe: Recipe) -> Report | State[Any]:
        with open_executor(engine, home, say) as executor:
            report = run_flow(name, recipe, home, listener, run_id, executor=executor)
        finished(report)
        return end_state(report)

    return Flow(run, name=name, flow_run_name="{recipe.name}", persist_result=False)


def measure_branches(run: Run, recipe: Recipe, inputs: Inputs) -> Measurements:
    """Wire every stage of a run; with a `Plan` as `run`, nothing is computed."""
    shared = share_stages(run, recipe, inputs, run.machine.engine(recipe.engine))
    branches: list[Callable[[], VariantRefs]] = [
        partial(float_branch, shared),
        *(partial(ptq_branch, shared, branch) for branch in recipe.ptq),
        *(partial(qat_branch, shared, branch) for branch in recipe.qat),
    ]
    baseline, *named = together(run, branches)
    found, search_best, conclusion = search_branches(shared, baseline)
    variants = (baseline, *named, *found)
    targets = tuple(dict.fromkeys(each for variant in variants for each in targets_of(variant)))
    timings = time_files(
        shared,
        targets,
        tuple(sorted({1, *recipe.benchmark.batch_sizes})),
        tuple(sorted({1, *recipe.benchmark.num_threads})),
        "variants",
    )
    variants = evaluate_files(shared, variants, targets, timings)
    return Measurements(
        variants=variants,
        targets=targets,
        timings=timings,
        validation=inputs.validation,
        pictures=_pick_examples(shared, variants, targets, timings),
        notes=tuple(NoteRow(kind="note", text=text) for text in (conclusion, *inputs.remarks) if text),
        search_best=search_best,
    )


def _pick_examples(
    shared: SharedStages, variants: tuple[VariantRefs, ...], targets: tuple[BenchmarkTarget, ...], timings: Ref
) -> Ref | None:
    num_examples = shared.recipe.evaluation.num_examples
    if num_examples == 0:
        return None
    answered: Any
    try:
        reported = find_reported(shared.run, shared.recipe, variants, targets, timings)
        answered = tuple(
            (refs.variant.name, file.validation) for refs, file in zip(variants[1:], reported[1:], strict=True)
        )
    except NotYetKnownError:
        answered = Pending("benchmark-variants")
    float_answers = variants[0].reference.validation
    images = tuple(shared.validation[: len(float_answers)])
    return shared.run(pick_examples, images, float_answers, answered, num_examples)


def only(recipe: Recipe, method: str) -> Recipe:
    """The recipe with the branches of one method, and no search.

    Raises:
        RecipeError: If it has no such branch.
    """
    if not getattr(recipe, method):
        raise RecipeError(f"Recipe {recipe.name!r} has no [[{method}]] branch: add one, or run the flow `quantize`.")
    others: dict[str, object] = {other: () for other in ("ptq", "qat") if other != method}
    return recipe.model_copy(update=others | {"search": None})
