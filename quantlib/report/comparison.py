"""Two finished runs of one home compared: what went in, and what came out."""

from dataclasses import dataclass
from pathlib import Path

from quantlib.errors import RecipeError
from quantlib.report import ingredients, tables
from quantlib.report.ingredients import Change, CodeChange
from quantlib.report.model_change import ModelChange, Results, compare_models
from quantlib.store.journal import find_run
from quantlib.store.local import Store
from quantlib.store.opening import open_store


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """From one run to another."""

    before: str
    after: str
    recipe: tuple[Change, ...]
    data: tuple[Change, ...]
    """Fingerprints of the images and of the float model's weights."""
    code: tuple[CodeChange, ...]
    environment: tuple[Change, ...]
    """Versions of libraries and runtimes, and the CPU."""
    winner: ModelChange | None
    """From the first one's winner to the second one's; None if one of them has none."""
    variants: tuple[ModelChange, ...]
    """Variants of the same name, float among them."""
    notes: tuple[str, ...]
    """What could not be compared, one sentence each."""


def compare_runs(home: Path, before: str, after: str) -> Comparison:
    """Compare two runs.

    Args:
        home: The home folder of both.
        before: A finished run.
        after: Another.

    Raises:
        RecipeError: If a run does not exist or is not finished.
        StoreError: If a report is damaged.
    """
    statuses = [find_run(home / "runs", name) for name in (before, after)]
    for status in statuses:
        if status.state != "completed":
            raise RecipeError(
                f"Run {status.file.run_id} is {status.state}, and only completed runs can be compared: "
                f"`quantflow runs {status.file.run_id}` says what to do."
            )
    store = open_store(home)
    old, new = (read_results(home / "reports", store, name) for name in (before, after))
    made, remade = (ingredients.find_ingredients(store, results.report) for results in (old, new))
    won, winner = old.report.winner, new.report.winner
    rows = {row.variant: row for row in old.report.variants}
    variants = tuple(
        compare_models(old, rows[row.variant], new, row) for row in new.report.variants if row.variant in rows
    )
    notes = [
        f"{found.num_missing} of {len(results.report.stages)} records of run {results.report.run_id} are no longer in "
        "the store: data, code and versions are compared as far as known."
        for found, results in ((made, old), (remade, new))
        if found.num_missing
    ]
    if not all(change.paired for change in variants):
        notes.append("The runs evaluated different validation images: accuracies are compared unpaired, as a whole.")
    notes += [f"Run {side.report.run_id} has no winner." for side in (old, new) if side.report.winner is None]
    recipe_before, recipe_after = (ingredients.flatten_recipe(status.file.recipe) for status in statuses)
    return Comparison(
        before=before,
        after=after,
        recipe=ingredients.changes(recipe_before, recipe_after),
        data=ingredients.changes(made.data, remade.data),
        code=ingredients.code_changes(made, remade),
        environment=ingredients.changes(made.environment, remade.environment),
        winner=compare_models(old, won, new, winner) if won and winner else None,
        variants=variants,
        notes=tuple(notes),
    )


def read_results(reports: Path, store: Store, run_id: str) -> Results:
    """What a finished run is compared by.

    Raises:
        StoreError: If its report is missing or damaged.
    """
    name, _ = tables.choose_run(reports, run_id)
    report = tables.read_report(reports, name)
    return Results(
        report,
        tables.read_table(reports, "predictions", name).drop_columns("run_id"),
        ingredients.validation_fingerprint(store, report.stages),
    )
