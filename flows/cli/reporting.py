"""`quantflow report`: what runs have found."""

from pathlib import Path

import click

from flows.cli.options import home_option
from flows.cli.outcome import FAILURE, complain, reports_errors
from quantlib.errors import StoreError


@click.command()
@click.argument("run_id", metavar="[RUN]", required=False)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one run's page to this file instead: tables and plots, for any browser, even offline.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one run's verdict and tables as JSON, for programs.")
@click.option(
    "--intervals", is_flag=True, help="Also show how sure each drop is: its 95% interval and McNemar's p-value."
)
@home_option
@reports_errors
def report(run_id: str | None, html: Path | None, as_json: bool, intervals: bool, home: Path) -> int:
    """Show the results of RUN, or of all runs, the newest first.

    --html and --json are about one run: RUN, or the newest.
    """
    if html is not None:
        from quantlib.report.html import write_html

        write_html(home / "reports", html, run_id)
        click.echo(f"Report written to {html}")
        return 0
    if as_json:
        from quantlib.report.as_json import report_as_json
        from quantlib.report.tables import choose_run, read_report

        name, _ = choose_run(home / "reports", run_id)
        click.echo(report_as_json(read_report(home / "reports", name)))
        return 0
    damage = _show_tables(home, run_id, intervals=intervals)
    for found in damage:
        complain(str(found), FAILURE)
    return FAILURE if damage else 0


def _show_tables(home: Path, run_id: str | None, *, intervals: bool) -> list[StoreError]:
    """Print the table of one run or of all, and what costs accuracy in each; return what is damaged."""
    from dataclasses import replace
    from itertools import groupby

    from rich.console import Console

    from flows.cli.console import interval_table, result_table, why
    from quantlib.report.diagnosis import diagnose
    from quantlib.report.layers import LayerRow
    from quantlib.report.results import Report
    from quantlib.report.rows import NoteRow
    from quantlib.report.tables import choose_run, read_rows, read_variants

    console = Console()
    damage: list[StoreError] = []
    if run_id is not None:
        rows = [(name, row) for name, row in choose_run(home / "reports", run_id)[1] if name == run_id]
    else:
        rows = read_variants(home / "reports", damage.append)
    if not rows and not damage:
        console.print(f"No run has finished below {home}. Start one with `quantflow run`.", soft_wrap=True)
    for name, group in groupby(rows, key=lambda row: row[0]):
        variants = [variant for _, variant in group]
        title = f"\n{name}  recipe {variants[0].recipe}, {variants[0].cpu_model}, torch {variants[0].torch_version}"
        console.print(title, highlight=False, markup=False, style="bold")
        console.print(result_table(variants, console.width))
        if intervals:
            console.print(interval_table(variants))
        found = Report(run_id=name, variants=tuple(variants), epochs=(), latency=(), stages=())
        try:
            layers = read_rows(home / "reports", "layers", LayerRow, name)
            notes = read_rows(home / "reports", "notes", NoteRow, name)
            found = replace(found, layers=layers, notes=notes)
        except StoreError as error:
            damage.append(error)
        if found.regression:
            console.print(f"Regression: {found.regression}", highlight=False, markup=False, soft_wrap=True)
        for part in why(diagnose(found)):
            console.print(part, highlight=False, markup=False)
    return damage
