"""Terminal output of `quantflow`: the stages of a run as they happen, and the tables of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from quantlib.export.prediction import Prediction
    from quantlib.graph.plan import LayerPlan
    from quantlib.report.diagnosis import Diagnosis
    from quantlib.report.results import Report
    from quantlib.report.rows import VariantRow
    from quantlib.store.journal import RunStatus
    from quantlib.store.retention import Entry

# Width of all columns of `result_table` but the name, with the longest figures.
_FIGURES_WIDTH = 65


class StageDisplay:
    """Shows each stage as it starts, a bar while it works, and its outcome.

    Args:
        console: Where to print; if it is no terminal, one line per stage and no bars.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> StageDisplay:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage_started(self, label: str) -> None:
        """Show a bar with no total yet."""
        if self._console.is_terminal:
            self._bars[label] = self._progress.add_task(label, total=None)
        else:
            self._console.print(f"  {label} …", highlight=False)

    def stage_progressed(self, label: str, done: int, total: int) -> None:
        """Move the bar."""
        if self._console.is_terminal:
            if label not in self._bars:
                self._bars[label] = self._progress.add_task(label, total=total)
            self._progress.update(self._bars[label], completed=done, total=total)

    def stage_finished(self, label: str, *, cached: bool, seconds: float) -> None:
        """Replace the bar with a line that stays."""
        if label in self._bars:
            self._progress.remove_task(self._bars.pop(label))
        outcome = "[cyan]cached[/]" if cached else f"[green]{seconds:.1f} s[/]"
        self._console.print(f"  {label:<42} {outcome}", highlight=False)


def result_table(variants: Sequence[VariantRow], width: int = 80) -> Table:
    """The variants of a run: runtime, accuracy, size and speed of the file that each verdict is about.

    Args:
        variants: One row per variant.
        width: Width of the terminal, in characters.
    """
    table = narrow_table()
    table.add_column("variant", overflow="fold")  # A name is never cut short.
    table.add_column("runtime")
    for name in ("top-1", "change", "MB", "ms", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in variants:
        table.add_row(
            _in_lines(row.title, width - _FIGURES_WIDTH),
            short_runtime(row.runtime),
            f"{row.top1:.2%}",
            "" if row.method == "float" else row.change,
            f"{row.size_bytes / 1e6:.2f}",
            f"{row.latency_p50_ms:.2f}",
            f"{row.speedup:.2f}x",
            row.verdict,
            style="bold green" if row.winner else None,
        )
    return table


def _in_lines(name: str, width: int) -> Text:
    """A name in lines of at most `width`, broken between words."""
    lines = [""]
    for word in re.findall(r"[^-_. ]*[-_. ]*", name):
        if len(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return Text("\n".join(line.rstrip(" ") for line in lines if line))


def interval_table(variants: Sequence[VariantRow]) -> Table:
    """How certain each variant's change is, in points of top-1."""
    table = narrow_table()
    table.add_column("variant", overflow="fold")
    for name in ("change", "95% interval", "McNemar p", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in variants:
        if row.method == "float":
            continue
        table.add_row(
            row.title,
            row.change,
            row.interval,
            "" if row.p_value is None else f"{row.p_value:.2g}",
            f"{row.num_images:,}",
        )
    return table


def narrow_table() -> Table:
    """A table without borders: a terminal has 80 columns."""
    return Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def short_runtime(runtime: str | None) -> str:
    """A runtime's name, shortened so that the table fits a terminal."""
    return (runtime or "torchscript").replace("torchscript", "torch").replace("-", " ")


def why(found: Sequence[Diagnosis]) -> list[Table | str]:
    """Why the variants of a run lose accuracy: weights or activations, which layers, and what to try."""
    parts: list[Table | str] = []
    simulated = [diagnosis.row for diagnosis in found if diagnosis.row.top1_simulated is not None]
    if simulated:
        table = Table(header_style="bold", title="What is quantized (simulated in float)", title_justify="left")
        table.add_column("variant")
        for name in ("weights only", "activations only", "both", "int8"):
            table.add_column(name, justify="right")
        for row in simulated:
            figures = (row.top1_weights_only, row.top1_activations_only, row.top1_simulated, row.top1)
            table.add_row(row.variant, *("" if value is None else f"{value:.2%}" for value in figures))
        parts.append(table)
    for diagnosis in found:
        if diagnosis.worst:
            parts += [_worst_table(diagnosis), *(f"  try {line}" for line in diagnosis.advice)]
    return parts


def _worst_table(diagnosis: Diagnosis) -> Table:
    first = diagnosis.worst[0]
    images = "training images held out" if first.measured_on == "held_out" else "validation images"
    title = f"{diagnosis.row.variant}: the layers that cost most ({first.num_images} {images})"
    if first.top1_float is not None and first.top1_int8 is not None:
        title += f"\ntop-1 {first.top1_float:.2%} in float, {first.top1_int8:.2%} with all layers int8"
    table = Table(header_style="bold", title=title, title_justify="left")
    table.add_column("layer")
    for name in ("SQNR", "clipped", "top-1 only it", "all but it"):
        table.add_column(name, justify="right")
    for row in diagnosis.worst:
        table.add_row(
            row.layer,
            "" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB",
            "" if row.saturation is None else f"{row.saturation:.3%}",
            f"{row.top1_only:.2%}",
            f"{row.top1_all_but:.2%}",
        )
    return table


# What to do next with a run: a short form and a command.
_NEXT = {
    "running": ("wait", "wait until it is done"),
    "completed": ("report", "quantflow report {run} --html report.html"),
    "crashed": ("resume", "quantflow resume {run}"),
    "failed": ("resume", "fix what the message says, then quantflow resume {run}"),
    "damaged": ("run again", "run its recipe again: what it computed is reused"),
}


def runs_table(runs: Sequence[RunStatus], width: int = 80) -> Table:
    """Runs with their state, age, stage, and what to do next, one line per run.

    Args:
        runs: One row per run.
        width: Width of the terminal, in characters.
    """
    table = narrow_table()
    rows = [
        (
            run.file.run_id,
            run.state,
            _age(datetime.fromisoformat(run.file.started_at)),
            str(run.num_stages),
            _NEXT[run.state][0],
            run.stage,
        )
        for run in runs
    ]
    names = ("run", "state", "age", "stages", "next", "last stage")
    widths = [max(len(name), *(len(row[number]) for row in rows)) for number, name in enumerate(names)]
    # The last stage is cut to the width left over; `quantflow runs RUN` shows it in full.
    widths[-1] = max(len(names[-1]), width - sum(widths[:-1]) - 2 * len(names))
    for name in names:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cut(text, most)) for text, most in zip(row, widths, strict=True)))  # Not markup.
    return table


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def run_details(run: RunStatus) -> str:
    """Everything known about one run."""
    recipe = run.file.recipe.get("name", "unknown")
    lines = [
        f"run      {run.file.run_id}",
        f"recipe   {recipe}, flow {run.file.flow or 'unknown'}",
        f"state    {run.state}" + (f": {run.message}" if run.message else ""),
        f"started  {run.file.started_at} on {run.file.host or 'unknown'}, process {run.file.pid}",
        f"stages   {run.num_stages} done" + (f", the last one was {run.stage}" if run.stage else ""),
        f"next     {_NEXT[run.state][1].format(run=run.file.run_id)}",
    ]
    return "\n".join(lines)


def cache_table(entries: Sequence[Entry]) -> Table:
    """Stored stages with their age, size and runs."""
    table = Table("stage", "age", "size", "used by", header_style="bold")
    for entry in entries:
        used_by = (
            f"{entry.runs[0]}{f' and {len(entry.runs) - 1} more' if len(entry.runs) > 1 else ''}" if entry.runs else ""
        )
        created = datetime.fromisoformat(entry.record.created_at)
        table.add_row(entry.record.stage, _age(created), f"{entry.size / 1e6:.2f} MB", used_by)
    return table


def layers_table(layers: Sequence[LayerPlan]) -> Table:
    """The layers of a model: what each becomes, why, and its share of the work."""
    total = max(1, sum(layer.num_multiplications for layer in layers))
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    table.add_column("becomes")
    table.add_column("work", justify="right")
    table.add_column("why", overflow="fold")
    for layer in layers:
        work = f"{layer.num_multiplications / total:.1%}" if layer.num_multiplications else ""
        table.add_row(Text(layer.path), layer.kind, "int8" if layer.int8 else "float", work, layer.reason)
    return table


def predictions_table(predictions: Sequence[Prediction]) -> Table:
    """The likeliest class of each image; of a single image, the five likeliest."""
    table = narrow_table()
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    for each in predictions:
        shown = 1 if len(predictions) > 1 else None
        for name, probability in list(zip(each.classes, each.probabilities, strict=True))[:shown]:
            table.add_row(Text(each.image), Text(name), f"{probability:.2%}")
    return table


def _age(since: datetime) -> str:
    seconds = (datetime.now(UTC) - since).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def conclusion(report: Report, max_top1_drop: float) -> str:
    """What to ship, why, and how to load it; or that nothing is inside the gate."""
    best, lines = report.best, []
    figures = (
        f"{best.variant} in {best.runtime}, {best.change} points of top-1 against float ({best.evidence}), "
        f"{best.speedup:.2f}x as fast."
    )
    if report.winner:
        lines += [f"Winner: {figures}", f"Why: {best.reason}."]
    else:
        lines.append(f"No variant is inside the gate of {100 * max_top1_drop:.2f} points. The best so far: {figures}")
    if best.selected_on == "validation":
        lines.append("Choices were made on the validation images themselves: these accuracies are optimistic.")
    lines += [f"Regression: {report.regression}"] if report.regression else []
    lines += [f"Warning: {warning}" for warning in report.warnings]
    lines += report.remarks
    lines += [
        f"  file    {best.artifact_path}",
        f"  load    {best.load}",
        f"          {best.top1:.2%} of top-1, {best.latency_p50_ms:.2f} ms per image on one thread, "
        f"{best.size_bytes / 1e6:.2f} MB",
    ]
    return "\n".join(lines)
