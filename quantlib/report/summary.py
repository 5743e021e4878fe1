"""A run's result as Markdown, for the dashboard: the verdict, the variants, what changed since the previous run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlib.errors import StoreError
from quantlib.report.results import Report
from quantlib.report.rows import VariantRow, points
from quantlib.report.svg import Axis, as_markdown, plot
from quantlib.report.tables import find_earlier, read_table

_MAX_COMPUTED = 12


def summarize(report: Report, reports: Path) -> str:
    """The run's page on the dashboard.

    Args:
        report: The run's report.
        reports: Folder of all runs' tables; this run's may be among them.
    """
    recipe = report.variants[0].recipe
    previous = next(iter(find_earlier(reports, recipe, report.run_id)), None)
    damage: list[StoreError] = []
    before = read_table(reports, "variants", previous, damage.append).to_pylist() if previous else []
    parts = [
        _verdict(report),
        *([f"**Regression:** {report.regression}"] if report.regression else []),
        *(f"**Warning:** {warning}" for warning in report.warnings),
        _table(report.variants),
        *report.remarks,
        *_plots(report),
        f"## Since {'`' + previous + '`' if previous else 'the last run'}",
        str(damage[0])
        if damage
        else _changes(report.variants, before)
        if previous
        else f"This is the first run of recipe `{recipe}`.",
        _stages(report),
        "## Files",
        _files(report, reports),
    ]
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """The verdict in one line, such as "Ship minmax in onnxruntime: -0.50 points of top-1, 3.1x as fast"."""
    best = report.best
    where = f" in {best.runtime}" if best.runtime else ""
    figures = f"{best.change} points of top-1, {best.speedup:.2f}x as fast"
    if report.winner:
        return f"Ship {best.variant}{where}: {figures}"
    return f"Nothing to ship: no variant is inside the gate. The best so far is {best.variant}{where}: {figures}"


def _verdict(report: Report) -> str:
    best = report.best
    lines = [f"# {'Ship' if report.winner else 'Nothing to ship'}{f' `{best.variant}`' if report.winner else ''}"]
    figures = (
        f"{best.change} points of top-1 against float{f' ({best.evidence})' if best.evidence else ''}, "
        f"{best.speedup:.2f}x as fast{f' in {best.runtime}' if best.runtime else ''}"
    )
    if report.winner is None:
        lines.append(f"No variant is inside the gate. The best so far is `{best.variant}`: {figures}.")
    else:
        lines.append(f"{figures}, {best.size_bytes / 1e6:.2f} MB.")
    if best.reason:
        lines.append(f"Why this one: {best.reason}.")
    return "\n\n".join(lines)


def _table(variants: Sequence[VariantRow]) -> str:
    lines = [
        "| variant | runtime | images | top-1 | change, points | 95% interval | p | size | latency p50 | speed-up "
        "| verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in variants:
        is_float = row.method == "float"
        cells = [
            row.title.replace(row.variant, f"`{row.variant}`", 1),
            row.runtime or "torchscript",
            f"{row.num_images:,}",
            f"{row.top1:.2%}",
            "" if is_float else row.change,
            "" if is_float else row.interval,
            "" if is_float or row.p_value is None else f"{row.p_value:.2g}",
            f"{row.size_bytes / 1e6:.2f} MB",
            f"{row.latency_p50_ms:.2f} ms",
            f"{row.speedup:.2f}x",
            f"**{row.verdict}**" if row.winner else row.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plots(report: Report) -> list[str]:
    rows = report.variants
    latency = Axis.over("latency p50, ms (batch 1, one thread)", "{:.2f}".format, (row.latency_p50_ms for row in rows))
    top1 = Axis.over("top-1", "{:.2%}".format, (row.top1 for row in rows))
    points = {row.variant: [(row.latency_p50_ms, row.top1)] for row in rows}
    plots = [as_markdown(plot(latency, top1, points, lines=False), "Accuracy against latency")]
    if report.epochs:
        epoch = Axis.over("epoch of QAT", "{:.1f}".format, (row.epoch for row in report.epochs))
        accuracy = Axis.over("top-1", "{:.2%}".format, (row.top1 for row in report.epochs))
        branches: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(report.epochs, key=lambda row: row.epoch):
            branches.setdefault(row.variant, []).append((row.epoch, row.top1))
        plots.append(as_markdown(plot(epoch, accuracy, branches, lines=True), "QAT accuracy by epoch"))
    return plots


def _changes(variants: Sequence[VariantRow], before: Sequence[Mapping[str, Any]]) -> str:
    """A line for each variant that is new, gone or a different model, and for the winner if it changed."""
    old = {row["variant"]: row for row in before}
    lines = []
    winners = [next((name for name, won in pairs if won), "none") for pairs in _winners(variants, before)]
    if winners[0] != winners[1]:
        lines.append(f"The winner is `{winners[1]}`; it was `{winners[0]}`.")
    for row in variants:
        if row.variant not in old:
            lines.append(f"`{row.variant}` is new.")
        elif row.artifact_sha256 != old[row.variant]["artifact_sha256"]:
            lines.append(
                f"`{row.variant}` is a different model: {points(row.top1 - old[row.variant]['top1'])} points of top-1, "
                f"latency {old[row.variant]['latency_p50_ms']:.2f} to {row.latency_p50_ms:.2f} ms."
            )
        elif row.top1 != old[row.variant]["top1"]:
            change = points(row.top1 - old[row.variant]["top1"])
            lines.append(f"`{row.variant}` is the same model, measured differently: {change} points of top-1.")
    lines += [f"`{name}` is gone." for name in old if name not in {row.variant for row in variants}]
    return "\n".join(f"- {line}" for line in lines) or "Every model is the same, and as accurate as before."


def _winners(variants: Sequence[VariantRow], before: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, bool]]]:
    """(variant, whether it won) of the previous run, then of this one."""
    return [
        [(row["variant"], row["winner"]) for row in before],
        [(row.variant, row.winner) for row in variants],
    ]


def _stages(report: Report) -> str:
    computed = [stage for stage in report.stages if not stage.cached]
    if not computed:
        return f"All {len(report.stages)} stages were reused."
    longest = sorted(computed, key=lambda stage: stage.seconds, reverse=True)[:_MAX_COMPUTED]
    names = ", ".join(f"`{stage.stage}` ({stage.seconds:.1f} s)" for stage in longest)
    more = "" if len(longest) == len(computed) else f", and {len(computed) - len(longest)} more"
    return f"{len(computed)} of {len(report.stages)} stages were computed: {names}{more}."


def _files(report: Report, reports: Path) -> str:
    best = report.best
    return "\n".join(
        [
            f"- the model: `{best.artifact_path}`",
            f"- to load it: `{best.load}`",
            f"- the tables: `{reports}`, run `{report.run_id} --html report.html`",
            f"- plots: `quantflow report {report.run_id} --html report.html`",
        ]
    )
