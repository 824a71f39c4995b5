"""Plots of studies as SVG: inside a page, in its colors, or as a file of its own.

In: a :class:`~topwork.studies.study.Plot` or ``Bars``. Out: positions for ``templates/figure.svg``. No drawing library;
text stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from topwork.report.charts import Scale, log_ticks, tick_percent, ticks
from topwork.studies.study import Bars, Plot, Series
from topwork.text import escape

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 66, 16, 12, 48
ROW, NAME = 34, 224  # height of a bar's row, width of its name
LONGEST_NAME = 33
COLORS = 6
STYLE = Path(__file__).parent / "static" / "figure.css"


@dataclass(frozen=True)
class Line:
    """A line as SVG: path data, dots, whiskers (x, low, high), and a color 1 to 6."""

    name: str
    path: str
    dots: tuple[tuple[float, float], ...]
    whiskers: tuple[tuple[float, float, float], ...]
    color: int
    dashed: bool


@dataclass(frozen=True)
class Whisker:
    """A bar as SVG: its name, its value in words, the y of its middle, and x of value, low and high."""

    name: str
    text: str
    y: float
    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Figure:
    """Everything the template needs for a plot with axes (``lines``) or for bars."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[Whisker, ...] = ()
    note: str = ""
    from_zero: bool = True
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def figure(part: Plot | Bars) -> Figure:
    """Positions of a plot or of bars."""
    return _bars(part) if isinstance(part, Bars) else _plot(part)


def stand_alone(part: Plot | Bars, environment: Environment) -> str:
    """An SVG file that carries its own style, with a legend where there are several lines."""
    drawn = figure(part)
    style = Markup(STYLE.read_text(encoding="utf-8"))
    return environment.get_template("figure-file.svg").render(drawn=drawn, style=style)


def _plot(part: Plot) -> Figure:
    xs = [x for line in part.series for x, _ in line.points]
    ys = [y for line in part.series for _, y in line.points]
    ys += [y for line in part.series for span in line.spans for y in span]
    x_values, x_low, x_high = _axis(xs, part.x_scale == "log", tight=True)
    y_values, y_low, y_high = _axis(ys, part.y_scale == "log", tight=False)
    x_scale = Scale(x_low, x_high, LEFT + 8, WIDTH - RIGHT - 8, part.x_scale == "log")
    y_scale = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, part.y_scale == "log")
    y_text: Callable[[float], str] = tick_percent if part.y_is_share else _number
    return Figure(
        title=part.title,
        x_label=part.x_label,
        y_label=part.y_label,
        x_ticks=tuple((x_scale(x), _number(x)) for x in x_values if x_low <= x <= x_high),
        y_ticks=tuple((y_scale(y), y_text(y)) for y in y_values if y_low <= y <= y_high),
        lines=tuple(_line(line, number, x_scale, y_scale) for number, line in enumerate(part.series)),
        note=part.note,
    )


def _axis(values: Sequence[float], is_log: bool, *, tight: bool) -> tuple[list[float], float, float]:
    """Ticks, and the ends of the axis: the values' own where tight, else round ones."""
    low, high = min(values), max(values)
    if is_log:
        low = max(low, 1e-12)
        high = max(high, low)
        marks = log_ticks(low, high)
        return marks, low, high if high > low else low * 10
    marks = ticks(low, high)
    return (marks, low, high if high > low else low + 1) if tight else (marks, marks[0], marks[-1])


def _line(line: Series, number: int, x_scale: Scale, y_scale: Scale) -> Line:
    points = tuple((x_scale(x), y_scale(y)) for x, y in line.points)
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    spans = zip(line.points, line.spans, strict=False)
    whiskers = tuple((x_scale(x), y_scale(low), y_scale(high)) for (x, _), (low, high) in spans)
    return Line(escape(line.name), path, points, whiskers, 1 + number % COLORS, line.dashed)


def _bars(part: Bars) -> Figure:
    """Bars from zero where shares are low; else dots over an axis that starts at a round share below the lowest."""
    lowest = min(value.low for _, value in part.rows)
    marks = [mark for mark in ticks(0.0 if lowest < 0.5 else lowest, 1.0) if mark <= 1.0]
    bottom = TOP + ROW * len(part.rows) + 6
    scale = Scale(marks[0], 1.0, NAME, WIDTH - 70)
    bars = tuple(
        Whisker(
            _short(name), f"{100 * value.value:.1f}\u202f%", TOP + ROW * (number + 0.5), scale(value.value),
            scale(max(value.low, marks[0])), scale(value.high),
        )
        for number, (name, value) in enumerate(part.rows)
    )  # fmt: skip
    return Figure(
        part.title, part.label, "", tuple((scale(x), tick_percent(x)) for x in marks), (), bars=bars, note=part.note,
        from_zero=marks[0] == 0, height=bottom + BOTTOM, left=NAME, right=WIDTH - 70, bottom=bottom,
    )  # fmt: skip


def _short(name: str) -> str:
    text = escape(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


def _number(value: float) -> str:
    """A tick: few digits, powers of ten as 1e-5."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"
