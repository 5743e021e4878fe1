"""A run's report as one HTML page, made from the Parquet tables alone.

The page loads nothing from the network: plotly's JavaScript is part of it, and a content policy forbids the rest.
"""

import base64
from collections.abc import Callable
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

import jinja2
import plotly.offline

from quantlib.errors import StoreError
from quantlib.export.bundle import Preprocessing
from quantlib.files import write_atomically
from quantlib.measure.examples import Example
from quantlib.report import charts, diagnosis
from quantlib.report.disagreement import Disagreement, compare
from quantlib.report.results import Report
from quantlib.report.rows import (
    ClassRow,
    EpochRow,
    FileRow,
    LatencyRow,
    LayerRow,
    NoteRow,
    StageRow,
    VariantRow,
    points,
)
from quantlib.report.tables import read_table, read_variants

Row = TypeVar("Row")


def write_html(reports: Path, file: Path, run_id: str | None = None) -> None:
    """Write the page of one run.

    Args:
        reports: Folder of all runs' tables.
        file: The page; replaced if it exists.
        run_id: The run; None: the newest.

    Raises:
        StoreError: If no run has finished, or there is none with that name.
    """
    write_atomically(file, render(reports, run_id).encode())


def render(reports: Path, run_id: str | None = None) -> str:
    """The page of one run; see `write_html`.

    Raises:
        StoreError: If no run has finished, or there is none with that name.
    """
    damage: list[StoreError] = []
    history = read_variants(reports, damage.append)
    if run_id is not None:
        # Damage to the run itself is an error; other damaged runs are only left out.
        read_table(reports, "variants", run_id)
    elif damage and not history:
        raise damage[0]
    run = _read_run(reports, history, run_id)
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


def _read_run(reports: Path, history: list[tuple[str, VariantRow]], run_id: str | None) -> Report:
    names = list(dict.fromkeys(name for name, _ in history))
    if not names:
        raise StoreError(f"No run has finished below {reports}. Start one with `quantflow run`.")
    chosen = names[0] if run_id is None else run_id
    if chosen not in names:
        raise StoreError(f"No run {chosen!r} below {reports}. The newest are: {', '.join(names[:5])}.")
    return Report(
        run_id=chosen,
        variants=tuple(row for name, row in history if name == chosen),
        epochs=_rows(reports, "epochs", EpochRow, chosen),
        latency=_rows(reports, "latency", LatencyRow, chosen),
        stages=_rows(reports, "stages", StageRow, chosen),
        classes=_rows(reports, "classes", ClassRow, chosen),
        preprocessing=_rows(reports, "preprocessing", Preprocessing, chosen),
        examples=_rows(reports, "examples", Example, chosen),
        layers=_rows(reports, "layers", LayerRow, chosen),
        files=_rows(reports, "files", FileRow, chosen),
        notes=_rows(reports, "notes", NoteRow, chosen),
    )


def _rows(reports: Path, table: str, row: Callable[..., Row], run_id: str) -> tuple[Row, ...]:
    names = {field.name for field in fields(row)}  # type: ignore[arg-type]
    found = read_table(reports, table, run_id).to_pylist()
    return tuple(row(**{name: value[name] for name in names}) for value in found)


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
