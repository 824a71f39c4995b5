"""The parts of pages and documents as plain values: sentences, figures, tables, charts, pictures and commands.

Every page is a list of sections with blocks. ``report/page.py`` renders them as HTML and as Markdown, so each section is
written once. Texts are plain: names from data go through ``text.escape`` first, and the renderers escape HTML and Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topwork.text import percent


@dataclass(frozen=True)
class Share:
    """A share, 0 to 1, of ``n`` images with its 95% interval; None if not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        return percent(self.value) + self.interval(" ({})")

    def interval(self, pattern: str = "{}") -> str:
        """``91.2–97.0`` inside a pattern; empty without an interval."""
        if self.low is None or self.high is None:
            return ""
        return pattern.format(f"{percent(self.low)[:-1]}–{percent(self.high)[:-1]}")


def as_share(figure: Mapping[str, Any] | float | None) -> Share:
    """The share in ``{"value", "low", "high"}`` or a plain number."""
    if isinstance(figure, Mapping):
        return Share(figure.get("value"), figure.get("low"), figure.get("high"), figure.get("n"))
    return Share(figure)


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, sort key and style (``good``, ``bad``, ``muted``, ``strong``)."""

    text: str
    value: float | None = None
    style: str = ""


@dataclass(frozen=True)
class Bar:
    """A cell with a share and its interval as a bar, and a mark at ``base``."""

    share: Share
    base: float | None = None


@dataclass(frozen=True)
class Stack:
    """A cell with a stacked bar: (name of the part, length relative to the longest row) each."""

    pieces: tuple[tuple[str, float], ...]


AnyCell = str | int | float | Share | Cell | Bar | Stack | None


def as_cell(cell: AnyCell) -> Cell | Bar | Stack:
    """A cell as text: numbers with few digits, shares with their interval, a dash for None."""
    if isinstance(cell, (Cell, Bar, Stack)):
        return cell
    if isinstance(cell, Share):
        return Cell(str(cell), cell.value)
    if isinstance(cell, int):
        return Cell(f"{cell:,}", cell)
    if isinstance(cell, float):
        return Cell(f"{cell:.4g}", cell)
    return Cell("–" if cell is None else cell)


# ---- words


@dataclass(frozen=True)
class Text:
    """A paragraph. ``kind``: ``lead``, ``muted``, ``small``, or nothing."""

    text: str
    kind: Literal["", "lead", "muted", "small"] = ""


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Notes:
    """A list of sentences: ``kind`` ``warning`` in a colored box, ``plain`` as paragraphs with a bar next to them."""

    items: tuple[str, ...]
    title: str = ""
    kind: Literal["warning", "plain"] = "warning"


@dataclass(frozen=True)
class Findings:
    """Sentences with a topic each: (``warning``, ``note`` or ``good``; topic; sentence)."""

    items: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Facts:
    """Facts with name, value and note, as ``tiles`` or as a ``list``."""

    rows: tuple[tuple[str, str, str], ...]
    kind: Literal["tiles", "list"] = "tiles"


@dataclass(frozen=True)
class Links:
    """Links: (text, address) each."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Command:
    """A command or code, with a copy button."""

    text: str
    label: str = "Command"


# ---- figures and tables


@dataclass(frozen=True)
class Figure:
    """One metric as text, with interval, a note, a bar on a scale from 0 to 1, and what it was measured on."""

    label: str
    value: str
    interval: str = ""
    hint: str = ""
    bar: Bar | None = None
    basis: str = ""


@dataclass(frozen=True)
class Figures:
    """Metrics side by side."""

    rows: tuple[Figure, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells below column names; cells after the first are numbers unless ``text_columns`` has their index.

    Attributes:
        heading: whether to show the title.
        name: id of the table, so that ``has_filter`` can offer a search field.
        keys: one per row, for a script that follows a row to its images.
        chosen: indices of highlighted rows.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[AnyCell, ...], ...]
    note: str = ""
    heading: bool = True
    is_sortable: bool = False
    sorted_by: int | None = None
    text_columns: tuple[int, ...] = ()
    name: str = ""
    has_filter: bool = False
    keys: tuple[str, ...] = ()
    chosen: tuple[int, ...] = ()
    legend: tuple[str, ...] = ()


# ---- charts


@dataclass(frozen=True)
class Series:
    """Points of one kind in a chart, (x, y) from left to right.

    Attributes:
        spans: (low, high) of each y; whiskers, or the area of a ``band``.
        kind: style of drawing; ``bars`` are as wide as the spacing of the points.
        labels: of the points, for the tooltip.
        sizes: radius of each dot.
        mark: a point to ring.
        color: number of the color, by default the position of the series; 0 is gray.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float], ...] = ()
    kind: Literal["line", "dashed", "dots", "rings", "bars", "band"] = "line"
    labels: tuple[str, ...] = ()
    sizes: tuple[float, ...] = ()
    mark: tuple[float, float] | None = None
    color: int | None = None
    is_strong: bool = False


Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Chart:
    """Series over two axes; ``x_is_share`` and ``y_is_share`` write percent.

    Attributes:
        x_range, y_range: ends of an axis; by default those of the values.
        x_ticks: (position, text); by default round numbers.
        has_axes: False for a map, whose positions have no meaning.
        has_legend: None for a legend if there are several series.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    x_is_share: bool = False
    y_is_share: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    x_ticks: tuple[tuple[float, str], ...] | None = None
    has_axes: bool = True
    has_legend: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A horizontal bar chart of shares with error bars.

    Attributes:
        is_difference: shares are differences around zero, in points.
    """

    title: str
    label: str
    rows: tuple[tuple[str, Share], ...]
    note: str = ""
    is_difference: bool = False


# ---- pictures


@dataclass(frozen=True)
class Picture:
    """A small picture: ``source`` is a data URI, or None with the ``problem``. Width and height in pixels."""

    source: str | None
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Tile:
    """A picture of a card: a :class:`Picture` or a manifest row, its alternative text, and a caption."""

    picture: Picture | int
    alt: str
    caption: str = ""
    style: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a card: a muted label, a text, a number on the right."""

    label: str
    text: str
    number: str = ""
    style: str = ""


@dataclass(frozen=True)
class Card:
    """Related pictures with lines of text; ``near`` are smaller ones for comparison.

    Attributes:
        keys: values for the gallery's filters, by filter.
    """

    tiles: tuple[Tile, ...]
    lines: tuple[Line, ...] = ()
    path: str = ""
    near: tuple[Tile, ...] = ()
    near_label: str = ""
    title: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Cards; those after ``n_open`` are behind a fold.

    Attributes:
        width: of a card: ``s``, ``m``, ``l``, or ``row`` for one card per line.
        filters: name of a key, label, and the (value, text) choices; a search field comes with them.
    """

    cards: tuple[Card, ...]
    width: Literal["s", "m", "l", "row"] = "m"
    n_open: int = 1000
    noun: str = "image"
    name: str = ""
    filters: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = ()


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows of pictures as pixels: (name of the row, uint8 (H, W, 3) each); ``columns`` are the column names."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[NDArray[np.uint8], ...]], ...]
    note: str = ""


# ---- blocks of blocks


@dataclass(frozen=True)
class Fold:
    """Collapsible blocks."""

    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Beside:
    """Columns of blocks; stacked on narrow pages."""

    columns: tuple[Sequence[Block], ...]


@dataclass(frozen=True)
class Special:
    """A block with its own template, ``report/templates/NAME.html``; Markdown uses the ``plain`` blocks."""

    template: str
    values: Mapping[str, Any]
    plain: Sequence[Block] = ()


Block = (
    Text
    | Heading
    | Notes
    | Findings
    | Facts
    | Links
    | Command
    | Figures
    | Table
    | Chart
    | Bars
    | Gallery
    | Grid
    | Fold
    | Beside
    | Special
)


@dataclass(frozen=True)
class Section:
    """A section of a page; ``name`` is its anchor."""

    name: str
    title: str
    blocks: Sequence[Block]
