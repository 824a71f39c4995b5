"""What a study is: an experiment that teaches one idea of transfer learning, run on the user's own images.

A study is a module of this folder with one function ``run(bench) -> Findings`` and a row in ``catalog.py``. In: a
:class:`~topwork.studies.bench.Bench`. Out: :class:`Findings`: sentences that follow from the measured values, and the
tables, charts and pictures (``blocks``) that show them. Pages are in ``report/other_pages.py``; nothing here prints or writes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from topwork.blocks import Bars, Chart, Grid, Share, Table
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
class Measured(Share):
    """A share, 0 to 1, of ``n`` images with its 95% interval (Wilson)."""

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


Part = Table | Chart | Bars | Grid


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study found.

    Attributes:
        sentences: the meaning, the most important first; each follows from measured values.
        parts: tables, charts and pictures in the order of reading.
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
                kind = {Table: "tables", Chart: "plots", Bars: "bars"}[type(part)]
                kinds[kind].append(asdict(part))
        return {"sentences": list(self.sentences), "values": self.values, "facts": self.facts, **kinds}
