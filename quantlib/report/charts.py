"""The charts of a run's HTML report, as Plotly's JSON."""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from quantlib.report.results import Report
from quantlib.report.rows import EpochRow, LatencyRow, StageRow, VariantRow

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart; its blue is
# lighter here, to stand out on dark as well.
_COLORS = ("#3B8FD4", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_GREY = "#8A8F98"
_METHOD_COLOR = {"float": _GREY, "ptq": "#3B8FD4", "qat": "#E69F00"}
_METHOD_SYMBOL = {"float": "square", "ptq": "circle", "qat": "diamond"}
# Where a point's name can go: how far to the right, and how far above.
_SIDES = {
    "top right": (1, 1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
    "bottom left": (-1, -1),
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, 1),
    "bottom center": (0, -1),
}
# Sizes in pixels: of the narrowest plot, on a phone, and of a letter and a point in it.
_PLOT_WIDTH, _PLOT_HEIGHT, _LETTER_WIDTH, _LETTER_HEIGHT, _POINT = 270, 230, 7, 14, 12
_MAX_BARS = 20


@dataclass(frozen=True)
class Section:
    """A chart with its heading."""

    id: str
    title: str
    note: str
    figure: str
    """Plotly's JSON; safe inside a script element."""
    height: int


def pareto_front(variants: Sequence[VariantRow]) -> list[VariantRow]:
    """The variants that nothing beats in latency and top-1, the fastest first.

    Among those inside the gate, beyond noise, as the verdict compared them; in an old report, or if none is inside, by
    the plain figures.
    """
    compared = [row for row in variants if row.pareto]
    if compared:
        return sorted(compared, key=lambda row: row.latency_p50_ms)
    front: list[VariantRow] = []
    for row in sorted(variants, key=lambda row: (row.latency_p50_ms, -row.top1)):
        if not front or row.top1 > front[-1].top1:
            front.append(row)
    return front


def sections(run: Report, history: Sequence[tuple[str, VariantRow]]) -> list[Section]:
    """A run's charts, in the order of the page.

    Args:
        run: What they show.
        history: (run_id, variant) of all runs of its recipe, including this one.
    """
    up_left = "Up and left is better; the line joins the variants that nothing inside the gate beats beyond noise."
    whisker = "Median call, per image; the whisker ends at the 95th percentile, or above the chart."
    own = _in_own_runtime(run.latency, run.variants)
    found = [
        _section("tradeoff", "Accuracy against latency", up_left, _tradeoff(run.variants)),
        _section("sizes", "Size", "Of each variant's file.", _sizes(run.variants)),
        _section("latency", "Latency", whisker, _latencies(own, lambda row: row.variant)),
    ]
    runtimes = [row for row in run.latency if row.variant == run.best.variant]
    if len({row.runtime for row in runtimes}) > 1:
        note = f"{run.best.variant} in every runtime that this machine has."
        found.append(_section("runtimes", "Runtimes", note, _latencies(runtimes, lambda row: row.runtime)))
    if run.epochs:
        note = "The converted int8 model. Lines mark the first epoch evaluated with frozen statistics."
        found.append(_section("epochs", "QAT by epoch", note, _epochs(run.epochs, run.variants)))
    if len({name for name, _ in history}) > 1:
        found.append(_section("history-top1", "History: top-1", "All runs of this recipe.", _history(history)))
        speed = _history(history, lambda row: row.latency_p50_ms, "latency, ms")
        found.append(_section("history-latency", "History: latency", "Batch 1, one thread.", speed))
    note = f"The {_MAX_BARS} longest; all are listed below."
    found.append(_section("stages", "Stages", note, _stages(run.stages)))
    return found


def _section(name: str, title: str, note: str, figure: go.Figure) -> Section:
    # "<" would end the script element that holds the JSON.
    text = json.dumps(json.loads(figure.to_json())).replace("<", "\\u003c")
    return Section(name, title, note, text, int(figure.layout.height or 340))


def _figure(traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> go.Figure:
    """A figure with no colours but the traces': the page sets the others, light or dark."""
    plain = {"automargin": True, "fixedrange": True, "zeroline": False}
    figure = go.Figure(
        list(traces),
        {
            "template": "none",
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
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
    accuracy = _top1_axis([row.top1 for row in variants])
    side = _name_sides(variants, *accuracy["range"])
    for method in ("float", "ptq", "qat"):
        rows = [row for row in variants if row.method == method]
        if rows:
            traces.append(_points_of(rows, method, [side[row.variant] for row in rows]))
    latency = {"title": {"text": "latency p50, ms (batch 1, one thread)"}, "rangemode": "tozero"}
    return _figure(traces, latency, accuracy)


def _name_sides(variants: Sequence[VariantRow], low: float, high: float) -> dict[str, str]:
    """On which side of its point each variant's name goes, so that no name covers another name or a point.

    Args:
        variants: The points, over latencies from zero.
        low: The lowest top-1 of the axis.
        high: The highest.
    """
    slowest = max(row.latency_p50_ms for row in variants)
    points = [
        (_PLOT_WIDTH * row.latency_p50_ms / slowest, _PLOT_HEIGHT * (row.top1 - low) / (high - low)) for row in variants
    ]
    taken: list[tuple[float, ...]] = [
        (x, y, _POINT, _POINT) for x, y in points
    ]  # (middle, width and height) of everything drawn.
    sides = {}
    for row, (x, y) in zip(variants, points, strict=True):
        width, height = _LETTER_WIDTH * (len(row.variant) + 2 * row.winner), _LETTER_HEIGHT
        boxes = {
            side: (x + right * (width + _POINT) / 2, y + up * height, width, height)
            for side, (right, up) in _SIDES.items()
        }
        side = min(boxes, key=lambda side: _num_overlaps(boxes[side], taken))
        sides[row.variant] = side
        taken.append(boxes[side])
    return sides


def _num_overlaps(box: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> int:
    x, y, width, height = box
    beyond = not 0 <= x - width / 2 < x + width / 2 <= _PLOT_WIDTH
    return beyond + sum(abs(x - a) < (width + w) / 2 and abs(y - b) < (height + h) / 2 for a, b, w, h in others)


def _points_of(rows: Sequence[VariantRow], method: str, sides: Sequence[str]) -> go.Scatter:
    return go.Scatter(
        x=[row.latency_p50_ms for row in rows],
        y=[row.top1 for row in rows],
        text=[_text(row.variant + (" ★" if row.winner else "")) for row in rows],
        mode="markers+text",
        textposition=sides,
        cliponaxis=False,
        # Where points overlap, both can be seen.
        marker={"size": _POINT, "color": _METHOD_COLOR[method], "symbol": _METHOD_SYMBOL[method], "opacity": 0.7},
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


def _in_own_runtime(latency: Sequence[LatencyRow], variants: Sequence[VariantRow]) -> list[LatencyRow]:
    """Each variant's rows for the runtime that its verdict is about; in old reports, for its first runtime."""
    own = {row.variant: row.runtime for row in reversed(latency)}
    own |= {row.variant: row.runtime for row in variants if row.runtime}
    return [row for row in latency if row.runtime == own[row.variant]]


def _latencies(latency: Sequence[LatencyRow], name_of: Callable[[LatencyRow], str]) -> go.Figure:
    """Bars by batch size and threads, in ms per image so that batches can be compared."""
    traces = []
    for place, name in enumerate(dict.fromkeys(map(name_of, latency))):
        rows = [row for row in latency if name_of(row) == name]
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
                marker={"color": _color(place, name)},
                name=_text(name),
                hovertemplate="%{fullData.name}, %{x}: %{y:.3f} ms<extra></extra>",
            )
        )
    # An outlier's whisker would flatten all bars.
    longest = max((row.p50_ms / row.batch_size for row in latency), default=1.0)
    return _figure(traces, {}, {"title": {"text": "ms per image"}, "range": [0, 1.5 * longest]}, barmode="group")


def _epochs(epochs: Sequence[EpochRow], variants: Sequence[VariantRow]) -> go.Figure:
    """One line per branch, beginning at -1 with the int8 model it started from."""
    starts = {row.variant: (-1, row.top1_start, bool(row.kept_start)) for row in variants if row.top1_start is not None}
    names = list(dict.fromkeys(row.variant for row in epochs))
    traces, shapes = [], []
    frozen: dict[tuple[str, int], list[str]] = {}
    for place, variant in enumerate(names):
        rows = sorted((row for row in epochs if row.variant == variant), key=lambda row: row.epoch)
        points = [(row.epoch, row.top1, row.best) for row in rows]
        if variant in starts:
            points.insert(0, starts[variant])
        traces.append(
            go.Scatter(
                x=[epoch for epoch, _, _ in points],
                y=[top1 for _, top1, _ in points],
                text=["start" if epoch < 0 else f"epoch {epoch}" for epoch, _, _ in points],
                mode="lines+markers",
                line={"color": _COLORS[place % len(_COLORS)]},
                marker={"size": [13 if kept else 7 for _, _, kept in points]},
                name=_text(variant),
                hovertemplate="%{fullData.name}, %{text}: %{y:.2%}<extra></extra>",
            )
        )
        for what in ("batch_norm_frozen", "observers_frozen"):
            first = next((row.epoch for row in rows if getattr(row, what)), None)
            if first is not None:
                shapes.append(_line_at(first, _COLORS[place % len(_COLORS)]))
                frozen.setdefault((what.replace("_", " "), first), []).append(variant)
    # One below the other, each once for all branches it applies to.
    notes = [
        {
            "x": first,
            "y": 1 - 0.08 * number,
            "yref": "paper",
            "text": _text(f"{what} ({'all' if len(of) == len(names) > 1 else ', '.join(of)})"),
            "showarrow": False,
        }
        for number, ((what, first), of) in enumerate(frozen.items())
    ]
    x = {"title": {"text": "epoch (-1: the start; large: the one kept)"}, "dtick": 1 if len(epochs) < 30 else None}
    shown = [*(row.top1 for row in epochs), *(top1 for _, top1, _ in starts.values())]
    return _figure(traces, x, _top1_axis(shown), shapes=shapes, annotations=notes, showlegend=True)


def _line_at(x: float, color: str) -> dict[str, Any]:
    line = {"dash": "dash", "width": 1, "color": color}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def _history(
    history: Sequence[tuple[str, VariantRow]],
    value: Callable[[VariantRow], float] = lambda row: row.top1,
    axis: str = "top-1",
) -> go.Figure:
    """One line per variant over the recipe's runs."""
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
    values = [value(row) for _, row in history]
    return _figure(traces, {}, _top1_axis(values) if axis == "top-1" else {"title": {"text": axis}})


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


def _top1_axis(values: Sequence[float]) -> dict[str, Any]:
    """An axis that holds the values with room around them: around a single value, Plotly shows -1 to 1."""
    room = max(0.1 * (max(values) - min(values)), 0.005)
    bounds = [max(0.0, min(values) - room), min(1.0 + room, max(values) + room)]
    return {"title": {"text": "top-1"}, "tickformat": ".2%", "range": bounds}


def _color(place: int, variant: str) -> str:
    return _GREY if variant == "float" else _COLORS[(place - 1) % len(_COLORS)]


def _height(num_bars: int) -> int:
    """Height in pixels."""
    return 110 + 24 * num_bars


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _text(text: str) -> str:
    """Escape a text: Plotly reads some HTML in texts, and what comes from a recipe is not markup."""
    return html.escape(text)
