"""A run's report as one HTML page, made from the Parquet tables alone.

The page asks the network for nothing: plotly's JavaScript is part of it, and a content policy forbids the rest.
"""

import html
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import plotly.graph_objects as go
import plotly.offline
import pyarrow as pa
import pyarrow.compute as pc

from quantlib import diagnosis
from quantlib.errors import StoreError
from quantlib.report import EpochRow, LatencyRow, LayerRow, Report, StageRow, VariantRow, read_table, read_variants
from quantlib.store import write_atomically

Row = TypeVar("Row")

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers; its blue made lighter
# so that it stands out on dark, too.
_COLORS = ("#3B8FD4", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_GREY = "#8A8F98"
_METHOD_COLOR = {"float": _GREY, "ptq": "#3B8FD4", "qat": "#E69F00"}
_METHOD_SYMBOL = {"float": "square", "ptq": "circle", "qat": "diamond"}
_SIDES = ("top left", "bottom right", "top right", "bottom left")
_MAX_BARS = 20
_MAX_EXAMPLES = 12
_MAX_CONFUSIONS = 10


@dataclass(frozen=True)
class Confusion:
    """Images of one class that were taken for another, by float and by a quantized model."""

    label: int
    answer: int
    in_float: int
    in_variant: int


@dataclass(frozen=True)
class Disagreement:
    """Where a quantized model answers otherwise than float."""

    variant: str
    num_images: int
    num_broken: int
    """Images that float gets right and the variant does not."""
    num_mended: int
    """The other way round."""
    worse: tuple[Confusion, ...]
    """Confusions that are more frequent than with float, the worst first."""
    examples: tuple[int, ...]
    """The first broken images, by their place in the validation images."""


@dataclass(frozen=True)
class Section:
    """A chart with its heading."""

    id: str
    title: str
    note: str
    figure: str
    """Plotly's JSON; safe inside a script element."""
    height: int


def write_html(reports: Path, file: Path, run_id: str | None = None) -> None:
    """Write the page of one run.

    Args:
        reports: Folder of all runs' tables.
        file: Replaced where it exists.
        run_id: The run; None: the newest.

    Raises:
        StoreError: If no run has finished, or there is none of that name.
    """
    write_atomically(file, render(reports, run_id).encode())


def render(reports: Path, run_id: str | None = None) -> str:
    """The page of one run; see `write_html`.

    Raises:
        StoreError: If no run has finished, or there is none of that name.
    """
    history = read_variants(reports)
    run = _read_run(reports, history, run_id)
    recipe = run.variants[0].recipe
    history = [(name, row) for name, row in history if row.recipe == recipe]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"points": _points, "megabytes": lambda size: f"{size / 1e6:.2f} MB"}
    template = environment.from_string((files("quantlib") / "html_report.html").read_text(encoding="utf-8"))
    return template.render(
        run=run,
        best=run.best,
        float_row=next(row for row in run.variants if row.method == "float"),
        sections=_sections(run, history),
        disagreements=_disagreements(reports, run),
        diagnoses=diagnosis.diagnose(run),
        history=_runs(history),
        num_cached=sum(stage.cached for stage in run.stages),
        seconds=sum(stage.seconds for stage in run.stages),
        plotly_js=plotly.offline.get_plotlyjs(),
    )


def pareto_front(variants: Iterable[VariantRow]) -> list[VariantRow]:
    """The variants that no other beats in both latency and top-1, the fastest first."""
    front: list[VariantRow] = []
    for row in sorted(variants, key=lambda row: (row.latency_p50_ms, -row.top1)):
        if not front or row.top1 > front[-1].top1:
            front.append(row)
    return front


def compare(predictions: pa.Table, variant: str) -> Disagreement:
    """A variant's answers beside float's.

    Args:
        predictions: The table `predictions` of one run.
        variant: Another than "float".
    """
    labels, float_answers = _answers(predictions, "float")
    _, answers = _answers(predictions, variant)
    places = range(len(labels))
    broken = [n for n in places if float_answers[n] == labels[n] != answers[n]]
    mended = [n for n in places if float_answers[n] != labels[n] == answers[n]]
    before = Counter(pair for pair in zip(labels, float_answers, strict=True) if pair[0] != pair[1])
    after = Counter(pair for pair in zip(labels, answers, strict=True) if pair[0] != pair[1])
    worse = [Confusion(*pair, before[pair], after[pair]) for pair in after if after[pair] > before[pair]]
    worse.sort(key=lambda found: (found.in_float - found.in_variant, found.label, found.answer))
    return Disagreement(
        variant=variant,
        num_images=len(labels),
        num_broken=len(broken),
        num_mended=len(mended),
        worse=tuple(worse[:_MAX_CONFUSIONS]),
        examples=tuple(broken[:_MAX_EXAMPLES]),
    )


def _answers(predictions: pa.Table, variant: str) -> tuple[list[int], list[int]]:
    """(labels, likeliest classes) in the images' order."""
    rows = predictions.filter(pc.field("variant") == variant).sort_by("image_index")
    return rows["label"].to_pylist(), pc.list_element(rows["top5"], 0).to_pylist()


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
        layers=_rows(reports, "layers", LayerRow, chosen),
    )


def _rows(reports: Path, table: str, row: Callable[..., Row], run_id: str) -> tuple[Row, ...]:
    names = {field.name for field in fields(row)}  # type: ignore[arg-type]
    found = read_table(reports, table, run_id).to_pylist()
    return tuple(row(**{name: value[name] for name in names}) for value in found)


def _disagreements(reports: Path, run: Report) -> list[Disagreement]:
    """Every quantized variant's, the one to ship first."""
    predictions = read_table(reports, "predictions", run.run_id)
    rows = sorted((row for row in run.variants if row.method != "float"), key=lambda row: row is not run.best)
    return [compare(predictions, row.variant) for row in rows]


def _runs(history: list[tuple[str, VariantRow]]) -> list[tuple[str, VariantRow]]:
    """Each run with the variant that won it, or that came nearest; the newest first."""
    groups: dict[str, list[VariantRow]] = {}
    for name, row in history:
        groups.setdefault(name, []).append(row)
    return [(name, Report(name, tuple(rows), (), (), ()).best) for name, rows in groups.items()]


def _sections(run: Report, history: list[tuple[str, VariantRow]]) -> list[Section]:
    sections = [
        _section("tradeoff", "Accuracy against latency", "Up and left is better; the line is the Pareto front.")(
            _tradeoff(run.variants)
        ),
        _section("sizes", "Size", "Of the TorchScript file.")(_sizes(run.variants)),
        _section("latency", "Latency", "Median of a call, an image; the whisker ends at the 95th percentile.")(
            _latencies(run.latency)
        ),
    ]
    if run.epochs:
        note = "Of the converted int8 model. Lines mark the first epoch evaluated with frozen statistics."
        sections.append(_section("epochs", "QAT by epoch", note)(_epochs(run.epochs)))
    if len({name for name, _ in history}) > 1:
        sections.append(_section("history-top1", "History: top-1", "All runs of this recipe.")(_history(history)))
        speed = _history(history, lambda row: row.latency_p50_ms, "latency, ms")
        sections.append(_section("history-latency", "History: latency", "Batch 1, one thread.")(speed))
    note = f"The {_MAX_BARS} longest; all are listed below."
    sections.append(_section("stages", "Stages", note)(_stages(run.stages)))
    return sections


def _section(name: str, title: str, note: str) -> Callable[[go.Figure], Section]:
    def make(figure: go.Figure) -> Section:
        # "<" would end the script element that the JSON stands in.
        text = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
        return Section(name, title, note, text, int(figure.layout.height or 340))

    return make


def _figure(traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> go.Figure:
    """A figure without colours of its own but the traces': the page sets them, light or dark."""
    plain = {"automargin": True, "fixedrange": True, "zeroline": False}
    figure = go.Figure(
        list(traces),
        {
            "template": "none",
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "legend": {"orientation": "h", "y": -0.2},
            "xaxis": plain | x,
            "yaxis": plain | y,
        },
    )
    return figure.update_layout(**layout)


def _tradeoff(variants: Sequence[VariantRow]) -> go.Figure:
    front = pareto_front(variants)
    traces: list[Any] = [
        go.Scatter(
            x=[row.latency_p50_ms for row in front],
            y=[row.top1 for row in front],
            mode="lines",
            line={"shape": "hv", "dash": "dot", "color": _GREY},
            name="Pareto front",
            hoverinfo="skip",
        )
    ]
    # Neighbours' names go to different sides, so that they do not lie upon each other.
    ranked = sorted(variants, key=lambda row: row.latency_p50_ms)
    side = {row.variant: _SIDES[rank % len(_SIDES)] for rank, row in enumerate(ranked)}
    for method in ("float", "ptq", "qat"):
        rows = [row for row in variants if row.method == method]
        if rows:
            traces.append(_points_of(rows, method, [side[row.variant] for row in rows]))
    latency = {"title": {"text": "latency p50, ms (batch 1, one thread)"}, "rangemode": "tozero"}
    return _figure(traces, latency, {"title": {"text": "top-1"}, "tickformat": ".2%"})


def _points_of(rows: Sequence[VariantRow], method: str, sides: Sequence[str]) -> go.Scatter:
    return go.Scatter(
        x=[row.latency_p50_ms for row in rows],
        y=[row.top1 for row in rows],
        text=[_text(row.variant + (" ★" if row.winner else "")) for row in rows],
        mode="markers+text",
        textposition=sides,
        cliponaxis=False,
        marker={"size": 12, "color": _METHOD_COLOR[method], "symbol": _METHOD_SYMBOL[method]},
        name=method,
        hovertemplate="%{text}<br>%{x:.2f} ms<br>top-1 %{y:.2%}<extra></extra>",
    )


def _sizes(variants: Sequence[VariantRow]) -> go.Figure:
    bars = go.Bar(
        x=[row.size_bytes / 1e6 for row in variants],
        y=[_text(row.variant) for row in variants],
        orientation="h",
        marker={"color": [_METHOD_COLOR[row.method] for row in variants]},
        hovertemplate="%{y}: %{x:.2f} MB<extra></extra>",
    )
    return _figure([bars], {"title": {"text": "MB"}}, {"autorange": "reversed"}, height=_height(len(variants)))


def _latencies(latency: Sequence[LatencyRow]) -> go.Figure:
    """Bars by batch size and threads, in ms an image so that batches can be compared."""
    traces = []
    for place, variant in enumerate(dict.fromkeys(row.variant for row in latency)):
        rows = [row for row in latency if row.variant == variant]
        traces.append(
            go.Bar(
                x=[f"batch {row.batch_size}, {_threads(row.num_threads)}" for row in rows],
                y=[row.p50_ms / row.batch_size for row in rows],
                error_y={
                    "type": "data",
                    "color": _GREY,
                    "symmetric": False,
                    "array": [(row.p95_ms - row.p50_ms) / row.batch_size for row in rows],
                    "arrayminus": [0.0 for _ in rows],
                },
                marker={"color": _color(place, variant)},
                name=_text(variant),
                hovertemplate="%{fullData.name}, %{x}: %{y:.3f} ms<extra></extra>",
            )
        )
    return _figure(traces, {}, {"title": {"text": "ms an image"}}, barmode="group")


def _epochs(epochs: Sequence[EpochRow]) -> go.Figure:
    traces = []
    shapes, notes = [], []
    for place, variant in enumerate(dict.fromkeys(row.variant for row in epochs)):
        rows = sorted((row for row in epochs if row.variant == variant), key=lambda row: row.epoch)
        traces.append(
            go.Scatter(
                x=[row.epoch for row in rows],
                y=[row.top1 for row in rows],
                mode="lines+markers",
                line={"color": _COLORS[place % len(_COLORS)]},
                marker={"size": [13 if row.best else 7 for row in rows]},
                name=_text(variant),
                hovertemplate="%{fullData.name}, epoch %{x}: %{y:.2%}<extra></extra>",
            )
        )
        for what, level in (("batch_norm_frozen", 1.0), ("observers_frozen", 0.9)):
            first = next((row.epoch for row in rows if getattr(row, what)), None)
            if first is not None:
                shapes.append(_line_at(first, _COLORS[place % len(_COLORS)]))
                text = f"{what.replace('_', ' ')} ({variant})"
                notes.append({"x": first, "y": level, "yref": "paper", "text": _text(text), "showarrow": False})
    x = {"title": {"text": "epoch (large: the one kept)"}, "dtick": 1 if len(epochs) < 30 else None}
    y = {"title": {"text": "top-1"}, "tickformat": ".2%"}
    return _figure(traces, x, y, shapes=shapes, annotations=notes, showlegend=True)


def _line_at(x: float, color: str) -> dict[str, Any]:
    line = {"dash": "dash", "width": 1, "color": color}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _history(
    history: Sequence[tuple[str, VariantRow]],
    value: Callable[[VariantRow], float] = lambda row: row.top1,
    axis: str = "top-1",
) -> go.Figure:
    """A line a variant over the recipe's runs."""
    traces = []
    variants = dict.fromkeys(row.variant for _, row in history)
    for place, variant in enumerate(variants):
        rows = sorted(
            ((name, row) for name, row in history if row.variant == variant), key=lambda pair: pair[1].created_at
        )
        traces.append(
            go.Scatter(
                x=[row.created_at for _, row in rows],
                y=[value(row) for _, row in rows],
                text=[_text(name) for name, _ in rows],
                mode="lines+markers",
                line={"color": _color(place, variant)},
                name=_text(variant),
                hovertemplate="%{fullData.name}: %{y}<br>%{text}<extra></extra>",
            )
        )
    return _figure(traces, {}, {"title": {"text": axis}, "tickformat": ".2%" if axis == "top-1" else None})


def _stages(stages: Sequence[StageRow]) -> go.Figure:
    longest = sorted(stages, key=lambda row: row.seconds, reverse=True)[:_MAX_BARS]
    traces = [
        go.Bar(
            x=[row.seconds for row in longest if row.cached == cached],
            y=[_text(row.stage) for row in longest if row.cached == cached],
            orientation="h",
            marker={"color": color},
            name=name,
            hovertemplate="%{y}: %{x:.2f} s<extra></extra>",
        )
        for cached, name, color in ((False, "computed", _COLORS[0]), (True, "cached", _GREY))
    ]
    order = [_text(row.stage) for row in longest]
    y = {"categoryorder": "array", "categoryarray": order[::-1]}
    return _figure(traces, {"title": {"text": "seconds"}}, y, height=_height(len(longest)), showlegend=True)


def _color(place: int, variant: str) -> str:
    return _GREY if variant == "float" else _COLORS[(place - 1) % len(_COLORS)]


def _height(num_bars: int) -> int:
    """Pixels."""
    return 110 + 24 * num_bars


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _text(text: str) -> str:
    """Plotly reads a little HTML in its texts: what comes from a recipe is no markup."""
    return html.escape(text)


def _points(drop: float) -> str:
    """A drop in accuracy as a signed change in points."""
    return f"{round(-100 * drop, 2) + 0.0:+.2f}"
