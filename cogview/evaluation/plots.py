"""Plots of a page as inline SVG: intervals of differences, and curves. Colours are classes of the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from cogview.evaluation.records import ResultCurve

INTERVAL_WIDTH, INTERVAL_HEIGHT = 140, 18  # pixels
CURVE_WIDTH, CURVE_HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40  # margins of a plot of curves
SERIES = ("a", "b")  # classes of the two results


def interval_plot(value: float, low: float, high: float, limit: float, css_class: str) -> str:
    """Return an interval around a value, with a line at 0 in the middle.

    Args:
        value: The difference.
        low: Lower end of its interval.
        high: Upper end.
        limit: Value at the right edge, above 0; the left edge has its negative.
        css_class: Class of the interval, such as "better".
    """

    def x(number: float) -> float:
        return INTERVAL_WIDTH / 2 * (1 + max(-1.0, min(1.0, number / limit))) if limit > 0 else INTERVAL_WIDTH / 2

    middle, y = INTERVAL_WIDTH / 2, INTERVAL_HEIGHT / 2
    return (
        f'<svg class="interval {css_class}" viewBox="-4 0 {INTERVAL_WIDTH + 8} {INTERVAL_HEIGHT}" '
        f'width="{INTERVAL_WIDTH + 8}" height="{INTERVAL_HEIGHT}" role="img" '
        f'aria-label="from {low:.4g} to {high:.4g}">'
        f'<line class="zero" x1="{middle:g}" y1="0" x2="{middle:g}" y2="{INTERVAL_HEIGHT}"/>'
        f'<line class="range" x1="{x(low):.1f}" y1="{y:g}" x2="{x(high):.1f}" y2="{y:g}"/>'
        f'<circle cx="{x(value):.1f}" cy="{y:g}" r="3.5"/></svg>'
    )


def curve_plot(curves: Mapping[str, ResultCurve]) -> str:
    """Return curves of one kind in one plot, with bands where they have them.

    Args:
        curves: One or two curves, by the class of their result: "a", "b".
    """
    each = list(curves.values())
    x_ticks = nice_ticks(min(min(one.x) for one in each), max(max(one.x) for one in each))
    y_ticks = nice_ticks(
        min(min(one.low or one.y) for one in each),
        max(max(one.high or one.y) for one in each),
    )
    scale = _Scale(x_ticks, y_ticks)
    lines = [
        f'<svg class="curves" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" width="{CURVE_WIDTH}" '
        f'height="{CURVE_HEIGHT}" role="img" aria-label="{escape(each[0].y_label or "curves")}">'
    ]
    lines += scale.axes(each[0].x_label, each[0].y_label)
    for name, curve in curves.items():
        if curve.low and curve.high:
            edge = [*zip(curve.x, curve.high, strict=True), *reversed(list(zip(curve.x, curve.low, strict=True)))]
            lines.append(f'  <polygon class="band {name}" points="{scale.points(edge)}"/>')
    for name, curve in curves.items():
        points = list(zip(curve.x, curve.y, strict=True))
        lines.append(f'  <polyline class="curve {name}" points="{scale.points(points)}"/>')
        for point in points:
            x, y = scale.point(*point)
            lines.append(
                f'  <circle class="point {name}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{point[0]:g}: {point[1]:.5g}</title></circle>"
            )
    return "\n".join([*lines, "</svg>"])


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return ticks at 1, 2 or 5 times a power of ten that cover a range; the first and last are its ends or beyond.

    Args:
        low: Lower end.
        high: Upper end.
        count: Number of ticks to aim at.
    """
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


class _Scale:
    """Positions in a plot of curves.

    Args:
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the vertical axis.
    """

    def __init__(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixels of a point."""
        across = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return LEFT + across * (CURVE_WIDTH - LEFT - RIGHT), CURVE_HEIGHT - BOTTOM - up * (CURVE_HEIGHT - TOP - BOTTOM)

    def points(self, points: Sequence[tuple[float, float]]) -> str:
        """Return the attribute ``points`` of a line."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.point(*point) for point in points))

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Return grid lines, ticks and labels."""
        lines = []
        right, bottom = CURVE_WIDTH - RIGHT, CURVE_HEIGHT - BOTTOM
        for tick in self.y_ticks:
            _, y = self.point(self.x_ticks[0], tick)
            lines.append(f'  <line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            lines.append(f'  <text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in self.x_ticks:
            x, _ = self.point(tick, self.y_ticks[0])
            lines.append(f'  <line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            lines.append(f'  <text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
        middle = (LEFT + right) / 2
        lines.append(f'  <text x="{middle:g}" y="{CURVE_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
        lines.append(
            f'  <text transform="translate(12 {(TOP + bottom) / 2:g}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return lines
