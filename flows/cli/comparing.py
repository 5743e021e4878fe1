"""`quantflow compare`: what changed between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.options import home_option
from flows.cli.outcome import reports_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantlib.report.comparison import Comparison
    from quantlib.report.ingredients import Change
    from quantlib.report.model_change import ModelChange

_SHOWN = 12
"""Characters of a fingerprint."""


@click.command()
@click.argument("before", metavar="RUN")
@click.argument("after", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@home_option
@reports_errors
def compare(before: str, after: str, as_json: bool, home: Path) -> int:
    """Show what changed from the first RUN to the second: recipe, data, code, versions, accuracy and speed."""
    from quantlib.report import as_json as writer
    from quantlib.report.comparison import compare_runs

    found = compare_runs(home, before, after)
    click.echo(writer.as_json(found) if as_json else "\n".join(comparison_lines(found)))
    return 0


def comparison_lines(found: Comparison) -> list[str]:
    """A comparison as text, one change per line."""
    return [
        f"From {found.before} to {found.after}",
        *_part("Recipe", _changes(found.recipe)),
        *_part("Data and weights", _changes(found.data)),
        *_part("Code", (f"{change.stage}: {', '.join(change.modules)}" for change in found.code)),
        *_part("Versions and CPU", _changes(found.environment)),
        *_part("Winner", _model(found.winner) if found.winner else ["cannot be compared"]),
        *_part("Variants of the same name", (line for change in found.variants for line in _model(change))),
        *(f"Note: {note}" for note in found.notes),
    ]


def _part(title: str, lines: Iterable[str]) -> list[str]:
    shown = [f"  {line}" for line in lines]
    return [title, *(shown or ["  no change"])]


def _changes(found: Iterable[Change]) -> list[str]:
    return [f"{change.name}: {_short(change.before)} -> {_short(change.after)}" for change in found]


def _short(value: object) -> str:
    if value is None:
        return "none"
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:_SHOWN] if is_hash else text


def _model(change: ModelChange) -> list[str]:
    names = dict.fromkeys(
        f"{name} in {runtime or 'torchscript'}"
        for name, runtime in ((change.before, change.runtime_before), (change.after, change.runtime_after))
    )
    return [" -> ".join(names), f"  {change.accuracy_text}", f"  {change.speed_text}"]
