"""The geometry of small plots: in go numbers, out come positions for an SVG that a template draws.

No drawing library: a run of a few seconds must not wait for one, and a page's text should be text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 46
MAX_TICKS = 6


@dataclass(frozen=True)
class Line:
    """One line: its name, (x, y) points from left to right, its color 1..6, and the point to mark, if any."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int
    is_strong: bool = False
    marked: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scale:
    """From values to positions: ``low`` goes to ``start``, ``high`` to ``end``; by logarithm if asked."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high, at = (self.low, self.high, value)
        if self.is_log:
            low, high, at = (math.log(max(v, 1e-300)) for v in (low, high, value))
        share = 0.5 if high == low else (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Drawn:
    """A line as SVG: path data, dots, and the mark."""

    name: str
    path: str
    dots: tuple[tuple[float, float], ...]
    color: int
    is_strong: bool
    mark: tuple[float, float] | None


@dataclass(frozen=True)
class Plot:
    """Everything a template needs to draw lines over two axes."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Drawn, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_plot(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    y_text: Callable[[float], str],
    *,
    x_is_log: bool = False,
    x_text: Callable[[float], str] = "{:g}".format,
) -> Plot:
    """Lines over a linear or logarithmic x axis; a larger x is further right."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_scale = Scale(min(xs), max(xs), LEFT + 8, WIDTH - RIGHT - 8, x_is_log)
    y_values = ticks(min(ys), max(ys))
    y_scale = Scale(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
    x_values = log_ticks(min(xs), max(xs)) if x_is_log else ticks(min(xs), max(xs))
    return Plot(
        title,
        x_label,
        y_label,
        tuple((x_scale(x), x_text(x)) for x in x_values if min(xs) <= x <= max(xs)),
        tuple((y_scale(y), y_text(y)) for y in y_values),
        tuple(_drawn(line, x_scale, y_scale) for line in lines),
    )


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round values a round step apart, from at or below ``low`` to at or above ``high``."""
    span = (high - low) or abs(high) or 1.0
    rough = span / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        first, last = first - 1, last + 1
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive values, thinned out to a few; the ends where there are fewer than two."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = [10.0**i for i in range(first, last + 1)]
    if len(powers) < 2:
        return [low] if low == high else [low, high]
    return powers[:: 1 + len(powers) // MAX_TICKS]


def tick_percent(value: float) -> str:
    """``25 %`` on an axis."""
    return f"{100 * value:g}\u202f%"


def _drawn(line: Line, x_scale: Scale, y_scale: Scale) -> Drawn:
    points = tuple((x_scale(x), y_scale(y)) for x, y in line.points)
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    mark = (x_scale(line.marked[0]), y_scale(line.marked[1])) if line.marked else None
    return Drawn(line.name, path, points, line.color, line.is_strong, mark)
