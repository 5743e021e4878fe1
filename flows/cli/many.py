"""`quantflow run RECIPE RECIPE...`: several recipes, and the table that they end with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from flows.cli.console import StageDisplay, narrow_table, short_runtime
from flows.cli.outcome import FAILURE, NO_WINNER, REGRESSION, WRONG_INPUT, explain, status_of, warn

if TYPE_CHECKING:
    from rich.table import Table

    from flows.graphs.many import Outcome
    from quantlib.recipe.schema import Recipe

# The exit status of several recipes is the first of these that one of them has.
_BY_WEIGHT = (FAILURE, WRONG_INPUT, NO_WINNER, REGRESSION)


def run_many(recipes: Sequence[Recipe], home: Path, *, engine: str, verbose: bool) -> int:
    """Run several recipes as one flow run; print their table, and why those that failed did; return the exit status."""
    from flows.cli.running import run_many_here

    console = Console()
    with StageDisplay(console) as display:
        outcomes = run_many_here(recipes, home, display, warn, engine=engine, verbose=verbose)
    console.print(outcomes_table(outcomes))
    statuses = set()
    for outcome in outcomes:
        if outcome.report is not None:
            statuses.add(status_of(outcome.report))
            console.print(f"  quantflow report {outcome.report.run_id}", highlight=False, soft_wrap=True)
        elif outcome.error is not None:
            statuses.add(explain(outcome.error, home, verbose=verbose, prefix=f"{outcome.recipe.name}: "))
    return next((status for status in _BY_WEIGHT if status in statuses), 0)


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """The winner of each recipe; the variant that loses least where there is none."""
    table = narrow_table()
    for name in ("recipe", "variant"):
        table.add_column(name, overflow="fold")  # A name is never cut short.
    table.add_column("runtime")
    for name in ("top-1", "change", "MB", "ms", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for outcome in outcomes:
        recipe = Text(outcome.recipe.name)
        if outcome.report is None:
            table.add_row(recipe, *[""] * 7, "failed", style="red")
            continue
        best = outcome.report.best
        table.add_row(
            recipe,
            Text(best.title),
            short_runtime(best.runtime),
            f"{best.top1:.2%}",
            best.change,
            f"{best.size_bytes / 1e6:.2f}",
            f"{best.latency_p50_ms:.2f}",
            f"{best.speedup:.2f}x",
            best.verdict,
            style="bold green" if best.winner else None,
        )
    return table
