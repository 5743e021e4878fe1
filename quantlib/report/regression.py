"""The gate against regressions: a run's winner compared with the winner of the last run of the same recipe."""

from pathlib import Path

from quantlib.errors import StoreError
from quantlib.report.comparison import read_results
from quantlib.report.model_change import ModelChange, Results, compare_models
from quantlib.report.rows import NoteRow
from quantlib.report.tables import find_earlier
from quantlib.store.local import Store


def check_regression(reports: Path, store: Store, results: Results) -> NoteRow:
    """Compare a run with the last finished run of its recipe that has a winner.

    Args:
        reports: Folder of all runs' reports.
        store: Holds the records of their stages.
        results: What this run has found.

    Returns:
        A note of kind "regression" if this run's winner is less accurate beyond chance, or slower beyond noise, or if
        it has none; else one of kind "note". Either says what was compared.
    """
    report, recipe = results.report, results.report.variants[0].recipe
    try:
        before = _last_with_winner(reports, store, recipe, report.run_id)
    except StoreError as error:
        return NoteRow(kind="note", text=f"Not checked for a regression: {error}")
    if before is None:
        return NoteRow(
            kind="note", text=f"Not checked for a regression: no earlier run of recipe {recipe} here has a winner."
        )
    won, winner = before.report.winner, report.winner
    assert won is not None
    against = f"the winner of run {before.report.run_id}, {won.variant} in {won.runtime or 'torchscript'}"
    if winner is None:
        return NoteRow(kind="regression", text=f"no variant is inside the gate, while {against}, was.")
    change = compare_models(before, won, results, winner)
    figures = f"{change.accuracy_text}; {change.speed_text}."
    worse = _what_is_worse(change)
    if worse:
        where = f"{winner.variant} in {winner.runtime or 'torchscript'}"
        return NoteRow(kind="regression", text=f"{where} is {' and '.join(worse)} than {against}: {figures}")
    return NoteRow(kind="note", text=f"No regression against {against}: {figures}")


def _what_is_worse(change: ModelChange) -> list[str]:
    found = {"less accurate": change.accuracy == "worse", "slower": change.speed == "slower"}
    return [word for word, is_so in found.items() if is_so]


def _last_with_winner(reports: Path, store: Store, recipe: str, run_id: str) -> Results | None:
    """The last earlier run that has a winner.

    Raises:
        StoreError: If a report is damaged.
    """
    found = (read_results(reports, store, name) for name in find_earlier(reports, recipe, run_id))
    return next((results for results in found if results.report.winner), None)
