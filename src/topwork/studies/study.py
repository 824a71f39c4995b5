"""What a study is: an experiment that teaches one idea of transfer learning, run on the user's own images.

A study is a module of this folder with one function ``run(bench) -> Findings`` and a row in ``catalog.py``. In: a
:class:`~topwork.studies.bench.Bench`. Out: :class:`Findings`: sentences that follow from the measured values, and the
tables, plots and pictures that show them. Drawing is in ``report/study_page.py``; nothing here prints or writes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from topwork.data.transforms import Pixels
from topwork.evaluation.intervals import wilson


@dataclass(frozen=True)
class Study:
    """A study as ``topwork study --list`` shows it.

    Attributes:
        teaches: what one knows afterwards.
        cost: time it takes, with what that was measured on.
        source: the tutorial or paper it comes from.
        needs_images: False for studies about networks alone.
    """

    name: str
    title: str
    teaches: str
    cost: str
    source: str
    needs_images: bool = True


@dataclass(frozen=True)
class Measured:
    """A share, 0 to 1, of ``n`` images with its 95 % interval (Wilson)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: ArrayLike) -> Measured:
        """The share of (N,) answers that are right, N > 0."""
        right = np.asarray(correct, np.bool_)
        interval = wilson(float(right.mean()), len(right))
        return cls(float(right.mean()), interval.low, interval.high, len(right))

    def overlaps(self, other: Measured) -> bool:
        """Whether the two intervals have anything in common."""
        return self.low <= other.high and other.low <= self.high


Cell = str | int | float | Measured | None


@dataclass(frozen=True)
class Table:
    """Rows of cells; a float is a plain number, a share is :class:`Measured`, None was not measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """One line of a plot: (x, y) from left to right; ``spans`` are the (low, high) of each y, or nothing.

    Attributes:
        dashed: what is expected rather than measured.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float], ...] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Plot:
    """Lines over two axes. ``y_is_share`` writes per cent on the y axis."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    y_is_share: bool = False
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A share for each of several names, with whiskers."""

    title: str
    label: str
    rows: tuple[tuple[str, Measured], ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows of small pictures: (name of the row, uint8 (H, W, 3) each); ``columns`` names the pictures of a row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Pixels, ...]], ...]
    note: str = ""


Part = Table | Plot | Bars | Grid


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study found.

    Attributes:
        sentences: the meaning, the most important first; each follows from measured values.
        parts: tables, plots and pictures in the order of reading.
        values: the measured values by name, as plain JSON values, for programs and tests.
        facts: on what it was measured: images, network, size, epochs.
    """

    sentences: tuple[str, ...]
    parts: tuple[Part, ...]
    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; of pictures only the names."""
        kinds: dict[str, list[dict[str, Any]]] = {"tables": [], "plots": [], "bars": [], "grids": []}
        for part in self.parts:
            if isinstance(part, Grid):
                rows = [{"name": name, "n_pictures": len(pictures)} for name, pictures in part.rows]
                kinds["grids"].append({"title": part.title, "columns": list(part.columns), "rows": rows})
            else:
                kind = {Table: "tables", Plot: "plots", Bars: "bars"}[type(part)]
                kinds[kind].append(asdict(part))
        return {"sentences": list(self.sentences), "values": self.values, "facts": self.facts, **kinds}
