"""What a run would do: walks the flow's wiring with a planner in place of its stages."""

from pathlib import Path

from flows.graphs.run import measure_branches
from quantlib.inputs import find_inputs
from quantlib.recipe.schema import Recipe
from quantlib.runtimes import available
from quantlib.store.journal import Journal, read_runs
from quantlib.store.opening import open_store
from tasks.planning import Plan, PlannedStage


def plan_run(recipe: Recipe, home: Path) -> list[PlannedStage]:
    """Which stages a run would reuse, and why it would run the others, in the order of the flow.

    Args:
        recipe: The recipe of the run.
        home: The home folder; only the note of the dataset's content is written to it.
    """
    runs = [run for run in read_runs(home / "runs") if run.file.recipe.get("name") == recipe.name]
    lines = Journal(home / "runs" / runs[0].file.run_id).stages() if runs else []
    finished = {line["key"] for line in lines if "cached" in line}
    plan = Plan(open_store(home), {line["label"]: line["key"] for line in lines}, finished)
    available.find_engine(recipe.engine)
    measure_branches(plan, recipe, find_inputs(recipe, home / "splits"))
    return plan.stages
