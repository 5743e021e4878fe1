"""Small plots as SVG, for places that show pictures and run no code, such as the dashboard's artifacts."""

import base64
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 300, 70, 20, 20, 45
_COLORS = ("#3B8FD4", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_NUM_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """An axis: its title, how its numbers are written, and what it spans."""

    title: str
    format: Callable[[float], str]
    low: float
    high: float

    @classmethod
    def over(cls, title: str, write: Callable[[float], str], values: Iterable[float]) -> "Axis":
        """An axis that spans values, with some room around them."""
        values = list(values)
        low, high = min(values), max(values)
        room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(title, write, low - room, high + room)

    def share(self, value: float) -> float:
        """Where a value is, from 0 (low) to 1 (high)."""
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Values to label on the axis."""
        return [self.low + (self.high - self.low) * n / (_NUM_TICKS - 1) for n in range(_NUM_TICKS)]


def plot(x: Axis, y: Axis, series: Mapping[str, Sequence[tuple[float, float]]], *, lines: bool) -> str:
    """An SVG picture of named series of points.

    Args:
        x: Horizontal.
        y: Vertical.
        series: Each series' points, by name; the name is written beside its last point.
        lines: Join the points of a series.
    """
    parts = [*_frame(x, y)]
    for place, (name, points) in enumerate(series.items()):
        color = _COLORS[place % len(_COLORS)]
        at = [(_across(x.share(a)), _up(y.share(b))) for a, b in points]
        if lines:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{color}"/>' for a, b in at]
        a, b = at[-1]
        # Keep names inside the picture, and those of neighbours on different sides.
        anchor = "end" if a > _WIDTH / 2 else "start"
        parts.append(_text(a + (-8 if anchor == "end" else 8), b + (-8, 16)[place % 2], name, anchor))
    style = 'font-family="sans-serif" font-size="12" fill="#1b1f24"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" {style}>'
        f'<rect width="100%" height="100%" rx="6" fill="#ffffff"/>{"".join(parts)}</svg>'
    )


def as_markdown(svg: str, title: str) -> str:
    """The picture as part of a Markdown text, with nothing to load."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _frame(x: Axis, y: Axis) -> list[str]:
    parts = []
    for value in x.ticks:
        a = _across(x.share(value))
        parts.append(_text(a, _HEIGHT - _BOTTOM + 16, x.format(value), "middle"))
    for value in y.ticks:
        b = _up(y.share(value))
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{b:.1f}" y2="{b:.1f}" stroke="#d5dbe1"/>')
        parts.append(_text(_LEFT - 6, b + 4, y.format(value), "end"))
    parts.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 8, x.title, "middle"))
    parts.append(_text(4, 13, y.title, "start"))
    return parts


def _text(a: float, b: float, text: str, anchor: str) -> str:
    return f'<text x="{a:.1f}" y="{b:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _up(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)
