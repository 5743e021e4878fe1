"""Several recipes as one flow run: each is a run of its own, and stages that they share are computed once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows.graphs.run import run_flow
from quantlib.errors import is_interrupt
from quantlib.recipe.schema import Recipe
from quantlib.report.results import Report
from tasks.listener import Listener


@dataclass(frozen=True)
class Outcome:
    """How the run of one recipe ended."""

    recipe: Recipe
    report: Report | None
    """None if it failed."""
    error: Exception | None
    """Why it failed."""


def make_flow(home: Path, listener: Listener, finished: Callable[[Outcome], None]) -> Flow[..., Any]:
    """A flow for this process alone, which runs recipes; one that fails does not keep the others from running.

    Args:
        home: The home folder.
        listener: Notified of each stage.
        finished: Called with the outcome of each recipe, in their order.
    """

    def run(recipes: list[Recipe]) -> State[Any] | None:
        outcomes = [_run_recipe(recipe, home, listener) for recipe in recipes]
        for outcome in outcomes:
            finished(outcome)
        return _end_state(outcomes)

    return Flow(run, name="quantize", flow_run_name="{recipes[0].name} and more", persist_result=False)


def _run_recipe(recipe: Recipe, home: Path, listener: Listener) -> Outcome:
    try:
        return Outcome(recipe, run_flow("quantize", recipe, home, listener, prefix=f"{recipe.name}/"), None)
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
