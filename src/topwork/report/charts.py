"""Charts as SVG, inside a page or as a separate file.

In: a :class:`~topwork.blocks.Chart` or :class:`~topwork.blocks.Bars`. Out: markup. Each point has a ``<title>`` with its
numbers, which browsers show as a tooltip. No plotting library: importing one would take too long, and text stays text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from topwork.blocks import Bars, Chart, Series, Share
from topwork.text import escape, percent, points

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 14, 48
ROW, NAME, VALUE = 32, 190, 76  # of bars: height of a row, width of its name and of its number
LONGEST_NAME = 30
MAP_SIDE = 360
MAX_TICKS = 6
MAX_DOTS_ON_LINE = 40
N_COLORS = 12
STYLE = Path(__file__).parent / "static" / "chart.css"


@dataclass(frozen=True)
class Axis:
    """Maps values to positions: ``low`` to ``start``, ``high`` to ``end``; optionally logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; values outside the axis are clipped."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, at = (math.log(max(v, 1e-300)) for v in (low, high, at))
        share = 0.5 if high == low else (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


def draw(block: Chart | Bars) -> Markup:
    """The chart as an ``<svg>`` element."""
    width, height = size_of(block)
    label = block.title or (f"{block.y_label} against {block.x_label}" if isinstance(block, Chart) else block.label)
    return Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, escape(label), _inner(block)
    )


def stand_alone(block: Chart | Bars) -> str:
    """An SVG file with its own style and title, and a legend if there are several series."""
    width, height = size_of(block)
    keys = legend(block)
    rows = Markup("").join(
        Markup(
            '<g transform="translate({} {})"><g class="{}"><path d="M0 -4 H24"/></g><text class="name" x="32" y="0">{}</text></g>'
        ).format(LEFT, height + 38 + 20 * number, style, name)
        for number, (name, style) in enumerate(keys)
    )
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {:g} {:g}" role="img" font-family="system-ui, sans-serif">'
        '<style>{}</style><rect class="paper" width="100%" height="100%"/><text class="title" x="12" y="22">{}</text>'
        '<g transform="translate(0 30)">{}</g>{}</svg>\n'
    ).format(
        width,
        height + 34 + 20 * len(keys),
        Markup(STYLE.read_text(encoding="utf-8")),
        escape(block.title),
        _inner(block),
        rows,
    )


def legend(block: Chart | Bars) -> list[tuple[str, str]]:
    """Name and style class of each series, if a legend is needed."""
    if isinstance(block, Bars):
        return []
    named = [(series, number) for number, series in enumerate(block.series) if series.name]
    wanted = len(named) > 1 if block.has_legend is None else block.has_legend
    return [(escape(series.name), _style(series, number)) for series, number in named] if wanted else []


def size_of(block: Chart | Bars) -> tuple[float, float]:
    """Width and height of the drawing."""
    if isinstance(block, Bars):
        return WIDTH, TOP + ROW * len(block.rows) + 6 + BOTTOM
    return (WIDTH, HEIGHT) if block.has_axes else (MAP_SIDE, MAP_SIDE)


def _inner(block: Chart | Bars) -> Markup:
    return Markup("").join(_bars(block) if isinstance(block, Bars) else _chart(block))


# ---- series over two axes


def _chart(chart: Chart) -> Iterator[Markup]:
    x, y, x_ticks, y_ticks = axes_of(chart)
    if chart.has_axes:
        yield from _grid(x_ticks, y_ticks, LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM)
        yield _label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, chart.x_label)
        if chart.y_label:
            turned = '<text class="label" transform="translate(13 {:g}) rotate(-90)" text-anchor="middle">{}</text>'
            yield Markup(turned).format((TOP + HEIGHT - BOTTOM) / 2, escape(chart.y_label))
    for number, series in enumerate(chart.series):
        yield Markup('<g class="{}">{}</g>').format(
            _style(series, number), Markup("").join(_series(series, chart, x, y))
        )


Ticks = tuple[tuple[float, str], ...]


def axes_of(chart: Chart) -> tuple[Axis, Axis, Ticks, Ticks]:
    """Both axes, and (position, text) of their ticks."""
    width, height = size_of(chart)
    left, right, top, bottom = (LEFT, RIGHT, TOP, BOTTOM) if chart.has_axes else (10, 10, 10, 10)
    xs = [x for series in chart.series for x, _ in series.points]
    ys = [y for series in chart.series for _, y in series.points]
    ys += [y for series in chart.series for span in series.spans for y in span]
    if any(series.kind == "bars" for series in chart.series):
        ys.append(0.0)
    x_low, x_high = chart.x_range or (min(xs), max(xs))
    y_low, y_high = chart.y_range or (min(ys), max(ys))
    x_values, y_values = (
        log_ticks(low, high) if scale == "log" else ticks(low, high)
        for low, high, scale in ((x_low, x_high, chart.x_scale), (y_low, y_high, chart.y_scale))
    )
    if chart.has_axes and chart.y_scale == "linear" and chart.y_range is None:
        y_low, y_high = y_values[0], y_values[-1]
        if chart.y_is_share and max(ys) <= 1:
            y_high = min(y_high, 1.0)
    x = Axis(x_low, x_high, left + 8, width - right - 8, chart.x_scale == "log")
    y = Axis(y_low, y_high, height - bottom, top, chart.y_scale == "log")
    x_text, y_text = (tick_percent if is_share else number_text for is_share in (chart.x_is_share, chart.y_is_share))
    marks = chart.x_ticks or [(value, x_text(value)) for value in x_values]
    return (
        x,
        y,
        tuple((x(value), text) for value, text in marks if x_low <= value <= x_high),
        tuple((y(value), y_text(value)) for value in y_values if y_low <= value <= y_high * (1 + 1e-9)),
    )


def _series(series: Series, chart: Chart, x: Axis, y: Axis) -> Iterator[Markup]:
    spots = [(x(a), y(b)) for a, b in series.points]
    if series.kind == "band":
        ends = [(x(a), y(high)) for (a, _), (_, high) in zip(series.points, series.spans, strict=True)]
        ends += [(x(a), y(low)) for (a, _), (low, _) in reversed(list(zip(series.points, series.spans, strict=True)))]
        yield Markup('<polygon points="{}"/>').format(" ".join(f"{a:g},{b:g}" for a, b in ends))
        return
    if series.kind == "bars":
        yield from _columns(series, chart, spots, y)
        return
    if series.kind in ("line", "dashed"):
        yield Markup('<path class="stroke" d="{}"/>').format("M" + " L".join(f"{a:g} {b:g}" for a, b in spots))
    for (a, _), (low, high) in zip(spots, series.spans, strict=False):
        yield Markup('<path class="whisker" d="M{:g} {:g} V{:g}"/>').format(a, y(low), y(high))
    is_long = series.kind == "line" and len(spots) > MAX_DOTS_ON_LINE
    if series.kind != "dashed" and (series.labels or not is_long):
        style = ' class="hidden"' if is_long else ""
        for number, (a, b) in enumerate(spots):
            radius = series.sizes[number] if series.sizes else 3.2 if chart.has_axes else 2.6
            yield Markup('<circle{} cx="{:g}" cy="{:g}" r="{:g}"><title>{}</title></circle>').format(
                Markup(style), a, b, radius, point_text(series, number, chart)
            )
    if series.mark:
        text = f"{series.name}, in use: {value_text(chart, *series.mark)}"
        yield Markup('<circle class="mark" cx="{:g}" cy="{:g}" r="6"><title>{}</title></circle>').format(
            x(series.mark[0]), y(series.mark[1]), escape(text)
        )


def _columns(series: Series, chart: Chart, spots: Sequence[tuple[float, float]], y: Axis) -> Iterator[Markup]:
    ground = y(0.0)
    step = (spots[-1][0] - spots[0][0]) / max(len(spots) - 1, 1) if len(spots) > 1 else 20.0
    for number, (a, b) in enumerate(spots):
        if series.points[number][1]:
            yield Markup(
                '<rect x="{:g}" y="{:g}" width="{:g}" height="{:g}"><title>{}</title></rect>'
            ).format(round(a - step / 2, 2), b, round(max(step - 1, 1), 2), round(ground - b, 2), point_text(series, number, chart))  # fmt: skip


def point_text(series: Series, number: int, chart: Chart) -> str:
    """What a point is, with its numbers."""
    if series.labels:
        return escape(series.labels[number])
    text = value_text(chart, *series.points[number])
    if number < len(series.spans):
        low, high = series.spans[number]
        text += f" ({_text(low, chart.y_is_share)} to {_text(high, chart.y_is_share)})"
    return escape(f"{series.name}: {text}" if series.name and len(chart.series) > 1 else text)


def value_text(chart: Chart, x: float, y: float) -> str:
    """Both numbers of a point with the names of their axes."""
    return f"{chart.x_label} {_text(x, chart.x_is_share)}, {chart.y_label} {_text(y, chart.y_is_share)}"


def _text(value: float, is_share: bool) -> str:
    return percent(value) if is_share else f"{value:.4g}"


def _style(series: Series, number: int) -> str:
    color = number + 1 if series.color is None else series.color
    color = 0 if color == 0 else (color - 1) % N_COLORS + 1
    return f"series {series.kind} c{color}{' strong' if series.is_strong else ''}"


# ---- bars


def _bars(block: Bars) -> Iterator[Markup]:
    """Bars from zero if shares are low, else dots on an axis that starts at a round value below the lowest."""
    lows = [share.value if share.low is None else share.low for _, share in block.rows]
    highs = [share.value if share.high is None else share.high for _, share in block.rows]
    low, high = min(v or 0.0 for v in lows), max(v or 0.0 for v in highs)
    if block.is_difference:
        marks = ticks(min(low, 0.0), max(high, 0.0))
    else:
        marks = [mark for mark in ticks(0.0 if low < 0.5 else low, 1.0) if mark <= 1.0]
    bottom, right = TOP + ROW * len(block.rows) + 6, WIDTH - VALUE
    scale = Axis(marks[0], marks[-1], NAME, right)
    is_from_zero = marks[0] == 0 and not block.is_difference
    text: Callable[[float], str] = _tick_points if block.is_difference else tick_percent
    yield from _grid(tuple((scale(v), text(v)) for v in marks), (), NAME, right, bottom, top=TOP)
    if block.is_difference:
        yield Markup('<path class="zero" d="M{:g} {:g} V{:g}"/>').format(scale(0.0), TOP, bottom)
    yield _label((NAME + right) / 2, bottom + 40, block.label)
    for number, (name, share) in enumerate(block.rows):
        yield from _bar(_short(name), share, TOP + ROW * (number + 0.5), scale, is_from_zero, block.is_difference)


def _bar(name: str, share: Share, y: float, scale: Axis, is_from_zero: bool, is_difference: bool) -> Iterator[Markup]:
    value = share.value or 0.0
    text = points(value) if is_difference else percent(value)
    yield Markup('<text class="name" x="{:g}" y="{:g}" text-anchor="end">{}</text>').format(NAME - 10, y + 4, name)
    if is_from_zero:
        yield Markup('<rect class="value" x="{:g}" y="{:g}" width="{:g}" height="16"/>').format(
            NAME, y - 8, max(round(scale(value) - NAME, 2), 1)
        )
    if share.low is not None and share.high is not None:
        low, high = scale(share.low), scale(share.high)
        yield Markup('<path class="span" d="M{0:g} {2:g} H{1:g} M{0:g} {3:g} v8 M{1:g} {3:g} v8"/>').format(low, high, y, y - 4)  # fmt: skip
    tip = f"{name}: {text}" + (
        f" ({points(share.low or 0)} to {points(share.high or 0)})" if is_difference else share.interval(" ({})")
    )
    if not is_from_zero:
        yield Markup('<circle class="point" cx="{:g}" cy="{:g}" r="5"><title>{}</title></circle>').format(
            scale(value), y, tip
        )
    yield Markup('<text class="figure" x="{:g}" y="{:g}">{}</text>').format(WIDTH - VALUE + 10, y + 4, text)


# ---- pieces


def _grid(x_ticks: Ticks, y_ticks: Ticks, left: float, right: float, bottom: float, top: float | None = None) -> Iterator[Markup]:  # fmt: skip
    for y, text in y_ticks:
        yield Markup('<path class="grid" d="M{:g} {:g} H{:g}"/>').format(left, y, right)
        yield Markup('<text class="tick" x="{:g}" y="{:g}" text-anchor="end">{}</text>').format(left - 8, y + 4, text)
    for x, text in x_ticks:
        if top is not None:
            yield Markup('<path class="grid" d="M{:g} {:g} V{:g}"/>').format(x, top, bottom)
        yield Markup('<path class="notch" d="M{:g} {:g} v4"/>').format(x, bottom)
        yield Markup('<text class="tick" x="{:g}" y="{:g}" text-anchor="middle">{}</text>').format(x, bottom + 18, text)
    yield Markup('<path class="axis" d="M{:g} {:g} H{:g}"/>').format(left, bottom, right)


def _label(x: float, y: float, text: str) -> Markup:
    return Markup('<text class="label" x="{:g}" y="{:g}" text-anchor="middle">{}</text>').format(x, y, escape(text))


def _short(name: str) -> str:
    text = escape(name)
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1] + "…"


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
    """Powers of ten between two positive values; more steps if they are few, the ends if fewer than two lie between."""
    low = max(low, 1e-12)
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(max(high, low))) + 1)
        found = [m * 10.0**i for i in powers for m in steps if low * (1 - 1e-9) <= m * 10.0**i <= high * (1 + 1e-9)]
        if len(found) > 2:
            return found[:: 1 + len(found) // (MAX_TICKS + 1)]
    return found if len(found) == 2 else [low] if low == high else [low, high]


def tick_percent(value: float) -> str:
    """``25%`` on an axis."""
    return f"{100 * value:g}%"


def _tick_points(value: float) -> str:
    return f"{100 * value:+g}".replace("-", "−") if value else "0"


def number_text(value: float) -> str:
    """A tick: few digits, very small and very large ones as ``1e-5``."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,g}"


def key(style: str) -> Markup:
    """The sample of a series in a legend."""
    shapes = {"dots": '<circle cx="10" cy="5" r="3.5"/>', "band": '<polygon points="0,0 20,0 20,10 0,10"/>'}
    shapes |= {"rings": shapes["dots"], "bars": shapes["band"]}
    shape = shapes.get(style.split()[1], '<path class="stroke" d="M0 5 H20"/>')
    return Markup('<svg class="chart" width="20" height="10" aria-hidden="true"><g class="{}">{}</g></svg>').format(
        style, Markup(shape)
    )
