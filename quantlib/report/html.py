"""A run's report as one HTML page, made from the Parquet tables alone.

The page loads nothing from the network: plotly's JavaScript is part of it, and a content policy forbids the rest.
"""

import base64
from importlib.resources import files
from pathlib import Path

import jinja2
import plotly.offline

from quantlib.files import write_atomically
from quantlib.report import charts, diagnosis
from quantlib.report.disagreement import Disagreement, compare
from quantlib.report.results import Report
from quantlib.report.rows import VariantRow, points
from quantlib.report.tables import choose_run, read_report, read_table


def write_html(reports: Path, file: Path, run_id: str | None = None) -> None:
    """Write the page of one run.

    Args:
        reports: Folder of all runs' tables.
        file: The page; replaced if it exists.
        run_id: The run; None: the newest.

    Raises:
        StoreError: If no run has finished, there is none with that name, or its report is damaged.
    """
    write_atomically(file, render(reports, run_id).encode())


def render(reports: Path, run_id: str | None = None) -> str:
    """The page of one run; see `write_html`.

    Raises:
        StoreError: If no run has finished, there is none with that name, or its report is damaged.
    """
    name, history = choose_run(reports, run_id)
    run = read_report(reports, name)
    recipe = run.variants[0].recipe
    history = [(name, row) for name, row in history if row.recipe == recipe]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    names = {row.class_index: row.name for row in run.classes}
    environment.filters |= {
        "points": lambda drop: points(-drop),
        "megabytes": lambda size: f"{size / 1e6:.2f} MB",
        "class_name": lambda index: names.get(index, str(index)),
        "data_url": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    }
    template = environment.from_string((files("quantlib.report") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        best=run.best,
        float_row=next(row for row in run.variants if row.method == "float"),
        sections=charts.sections(run, history),
        disagreements=_disagreements(reports, run),
        diagnoses=diagnosis.diagnose(run),
        history=_runs(history),
        num_cached=sum(stage.cached for stage in run.stages),
        seconds=sum(stage.seconds for stage in run.stages),
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def _disagreements(reports: Path, run: Report) -> list[Disagreement]:
    """Every quantized variant's disagreement with float, the one to ship first."""
    predictions = read_table(reports, "predictions", run.run_id)
    rows = sorted((row for row in run.variants if row.method != "float"), key=lambda row: row is not run.best)
    return [compare(predictions, row.variant) for row in rows]


def _runs(history: list[tuple[str, VariantRow]]) -> list[tuple[str, VariantRow]]:
    """Each run with the variant that won it or came closest; the newest run first."""
    groups: dict[str, list[VariantRow]] = {}
    for name, row in history:
        groups.setdefault(name, []).append(row)
    reports = [
        Report(run_id=name, variants=tuple(rows), epochs=(), latency=(), stages=()) for name, rows in groups.items()
    ]
    return [(report.run_id, report.best) for report in reports]
