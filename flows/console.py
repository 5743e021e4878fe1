"""What `quantflow` shows in a terminal: the stages of a run as they pass, and the tables of a report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from quantlib.diagnosis import Diagnosis
    from quantlib.journal import RunStatus
    from quantlib.report import Report, VariantRow
    from quantlib.retention import Entry


class StageDisplay:
    """Shows each stage as it starts, with a bar while it works, and what became of it.

    Args:
        console: Where to; without a terminal behind it, a line a stage and no bars.
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
        """Show a bar that has no end yet."""
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
        """Replace the bar by a line that stays."""
        if label in self._bars:
            self._progress.remove_task(self._bars.pop(label))
        outcome = "[cyan]cached[/]" if cached else f"[green]{seconds:.1f} s[/]"
        self._console.print(f"  {label:<42} {outcome}", highlight=False)


def result_table(variants: Sequence[VariantRow]) -> Table:
    """The variants of a run: accuracy, size, speed, verdict."""
    table = Table(header_style="bold")
    table.add_column("variant", overflow="fold")  # A name is never cut short.
    for name in ("top-1", "drop", "size", "latency", "speed-up"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in variants:
        table.add_row(
            row.title,
            f"{row.top1:.2%}",
            "" if row.method == "float" else f"{100 * row.top1_drop:+.2f} pt",
            f"{row.size_bytes / 1e6:.2f} MB",
            f"{row.latency_p50_ms:.2f} ms",
            f"{row.speedup:.2f}x",
            _verdict(row),
            style="bold green" if row.winner else None,
        )
    return table


def why(found: Sequence[Diagnosis]) -> list[Table | str]:
    """What costs the variants of a run their accuracy: weights or activations, which layers, and what to try."""
    parts: list[Table | str] = []
    simulated = [diagnosis.variant for diagnosis in found if diagnosis.variant.top1_simulated is not None]
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
    images = "training images held back" if first.measured_on == "held_back" else "validation images"
    title = f"{diagnosis.variant.variant}: the layers that cost most ({first.num_images} {images})"
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


def runs_table(runs: Sequence[RunStatus]) -> Table:
    """Runs with their state, age, stage, and what to do next."""
    table = Table(header_style="bold")
    table.add_column("run", no_wrap=True, min_width=max(len(run.file.run_id) for run in runs))
    for name in ("state", "age", "stages"):
        table.add_column(name, no_wrap=not any(run.message for run in runs))
    for name in ("last stage", "next"):
        table.add_column(name)
    next_step = {"running": "wait", "completed": "report", "crashed": "resume", "failed": "resume"}
    for run in runs:
        table.add_row(
            run.file.run_id,
            f"{run.state}: {run.message}" if run.message else run.state,
            _age(datetime.fromisoformat(run.file.started_at)),
            str(run.num_stages),
            run.stage,
            next_step[run.state],
        )
    return table


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


def _age(since: datetime) -> str:
    seconds = (datetime.now(UTC) - since).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def conclusion(report: Report, max_top1_drop: float) -> str:
    """What to ship and how to load it, or that nothing is inside the gate."""
    best = report.best
    lines = [
        f"Winner: {best.variant}, {-100 * best.top1_drop:+.2f} points of top-1 against float, "
        f"{best.speedup:.2f}x as fast."
        if report.winner
        else f"No variant is inside the gate of {100 * max_top1_drop:.2f} points. The best so far is {best.variant}, "
        f"{-100 * best.top1_drop:+.2f} points."
    ]
    if best.selected_on == "validation":
        lines.append("Choices were made on the validation images themselves: these accuracies are optimistic.")
    lines += report.remarks
    lines += [f"  file    {best.artifact_path}", f'  load    torch.jit.load("{best.artifact_path}")']
    if best.fastest_runtime is not None:
        measured = best.fastest_path == best.onnx_path and best.onnx_top1 is not None
        top1 = f", top-1 {best.onnx_top1:.2%}" if measured else ""
        lines += [
            f"  fastest quantlib.export.load({best.fastest_path!r}, {best.fastest_runtime!r})",
            f"          {best.fastest_p50_ms:.2f} ms an image on one thread{top1}",
        ]
    return "\n".join(lines)


def _verdict(row: VariantRow) -> str:
    if row.method == "float":
        return "baseline"
    if row.winner:
        return "winner"
    return "accepted" if row.accepted else row.gate or "outside"
