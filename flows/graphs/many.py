"""Several recipes as one flow run: each is a run of its own, and stages that they share are computed once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.graphs.run import run_flow
from flows.hosting.cluster import LOCAL, open_executor
from quantlib.errors import is_interrupt
from quantlib.recipe.schema import Recipe
from quantlib.report.results import Report
from tasks.calls import Calls
from tasks.execution import Executor
from tasks.listener import Listener


@dataclass(frozen=True)
class Outcome:
    """How the run of one recipe ended."""

    recipe: Recipe
    report: Report | None
    """None if it failed."""
    error: Exception | None
    """Why it failed."""


def make_flow(
    home: Path,
    listener: Listener,
    finished: Callable[[Outcome], None],
    engine: str = LOCAL,
    say: Callable[[str], None] = print,
) -> Flow[..., Any]:
    """A flow for this process alone, which runs recipes; one that fails does not keep the others from running.

    Args:
        home: The home folder.
        listener: Notified of each stage.
        finished: Called with the outcome of each recipe, in their order.
        engine: What computes the stages, as `--engine` takes it; a cluster runs all recipes at once.
        say: Called with messages for the user that are not errors.
    """

    def run(recipes: list[Recipe]) -> State[Any] | None:
        with open_executor(engine, home, say) as executor:
            calls: Calls[Any] = Calls(at_once=executor.at_once)
            try:
                waits = [calls.begin(partial(_run_recipe, recipe, home, listener, executor)) for recipe in recipes]
                outcomes = [wait() for wait in waits]
            finally:
                executor.close()  # After Ctrl-C, stages still compute.
                calls.end()
        for outcome in outcomes:
            finished(outcome)
        return _end_state(outcomes)

    return Flow(run, name="quantize", flow_run_name="{recipes[0].name} and more", persist_result=False)


def _run_recipe(recipe: Recipe, home: Path, listener: Listener, executor: Executor) -> Outcome:
    try:
        report = run_flow("quantize", recipe, home, listener, prefix=f"{recipe.name}/", executor=executor)
        return Outcome(recipe, report, None)
    except Exception as error:
        if is_interrupt(error):
            raise KeyboardInterrupt from error
        return Outcome(recipe, None, error)


def _end_state(outcomes: list[Outcome]) -> State[Any] | None:
    """A Failed state that names each recipe that failed or regressed; None if there is none."""
    said = [f"{each.recipe.name}: {each.error}" for each in outcomes if each.error is not None]
    said += [
        f"{each.recipe.name}: Regression: {each.report.regression}"
        for each in outcomes
        if each.report is not None and each.report.regression
    ]
    return Failed(message=" ".join(said)) if said else None
