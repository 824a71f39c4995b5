"""What a study finds: sentences derived from measured values, with tables, charts and images.

A study is a module of this folder with one function ``run(bench) -> Findings`` and a row in ``catalog.py``. This module
has the results and helpers of all studies: differences on the same held-out images, and sentences and charts about
them. Pages are in ``report/other_pages.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from topwork.blocks import Bars, Chart, Grid, Share, Table
from topwork.evaluation.compare import SIGNIFICANCE, accuracy_difference_interval, mcnemar
from topwork.evaluation.intervals import wilson
from topwork.text import join_names, percent, points


@dataclass(frozen=True)
class Measured(Share):
    """A share, 0 to 1, of ``n`` images with its 95% interval (Wilson)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, correct: ArrayLike) -> Measured:
        """Accuracy from (N,) booleans, N > 0."""
        right = np.asarray(correct, np.bool_)
        interval = wilson(float(right.mean()), len(right))
        return cls(float(right.mean()), interval.low, interval.high, len(right))

    @property
    def stated(self) -> str:
        """``94.8% (95% CI 91.2–97.0)``, for sentences."""
        return percent(self.value) + self.interval(" (95% CI {})")


@dataclass(frozen=True)
class Difference:
    """Accuracy of the second method minus the first on the same images, with its paired 95% interval and McNemar's p-value."""

    value: float
    low: float
    high: float
    p_value: float
    n: int
    is_clear: bool

    def __str__(self) -> str:
        return f"{points(self.value)} points (95% CI {points(self.low)} to {points(self.high)})"


@dataclass(frozen=True, eq=False)
class Findings:
    """What a study found.

    Attributes:
        sentences: conclusions, the most important first; each follows from measured values.
        parts: tables, charts and images in reading order.
        values: the measured values by name, as plain JSON values, for programs and tests.
        facts: the conditions: images, network, size, epochs.
    """

    sentences: tuple[str, ...]
    parts: tuple[Table | Chart | Bars | Grid, ...]
    values: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; only the names of pictures."""
        kinds: dict[str, list[dict[str, Any]]] = {"tables": [], "plots": [], "bars": [], "grids": []}
        for part in self.parts:
            if isinstance(part, Grid):
                rows = [{"name": name, "n_pictures": len(pictures)} for name, pictures in part.rows]
                kinds["grids"].append({"title": part.title, "columns": list(part.columns), "rows": rows})
            else:
                kind = {Table: "tables", Chart: "plots", Bars: "bars"}[type(part)]
                kinds[kind].append(asdict(part))
        return {"sentences": list(self.sentences), "values": self.values, "facts": self.facts, **kinds}


def difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Difference:
    """Compares two methods on the same N images, given as (N,) booleans: whether each prediction is correct."""
    one, two = np.asarray(first, np.bool_), np.asarray(second, np.bool_)
    interval, p_value = accuracy_difference_interval(one, two, seed=seed), mcnemar(one, two)
    value = float(two.mean() - one.mean())
    return Difference(value, interval.low, interval.high, p_value, len(one), p_value < SIGNIFICANCE and value != 0)


def compared(first: str, first_correct: ArrayLike, second: str, second_correct: ArrayLike, seed: int = 0) -> str:
    """Whether the second method is better than the first, on the same images."""
    found = difference(first_correct, second_correct, seed)
    one, two = (percent(Measured.of(correct).value) for correct in (first_correct, second_correct))
    facts = f"{upper(second)} vs. {first}: {two} vs. {one} accuracy, {found}"
    if not found.is_clear:
        return f"{facts}. No significant difference (p = {found.p_value:.2f}, {found.n} images)."
    better = second if found.value > 0 else first
    p = "< 0.001" if found.p_value < 0.001 else f"= {found.p_value:.3f}"
    return f"{facts}. {upper(better)} is significantly better (p {p})."


def best_of(answers: Mapping[str, ArrayLike], seed: int = 0) -> str:
    """Which of several methods is best, and which others are not significantly worse."""
    names = sorted(answers, key=lambda name: -float(np.mean(np.asarray(answers[name], np.bool_))))
    best, share = names[0], Measured.of(answers[names[0]])
    tied = [name for name in names[1:] if not difference(answers[best], answers[name], seed).is_clear]
    worse = [name for name in names[1:] if name not in tied]
    facts = f"Highest accuracy: {best}, {share.stated}"
    if not tied:
        return f"{facts}, significantly better than all others."
    text = f"{facts}; no significant difference from {join_names(tied)} on {share.n} images"
    return f"{text}; significantly better than {join_names(worse)}." if worse else f"{text}."


def accuracy_bars(title: str, answers: Mapping[str, ArrayLike]) -> Bars:
    """Accuracy of each method with its interval."""
    rows = tuple((name, Measured.of(right)) for name, right in answers.items())
    return Bars(title, "accuracy on held-out images", rows)


def accuracies(answers: Mapping[str, ArrayLike]) -> dict[str, float]:
    """Accuracy by name, for ``values``."""
    return {name: Measured.of(right).value for name, right in answers.items()}


def upper(text: str) -> str:
    """The text with its first letter capitalized."""
    return text[:1].upper() + text[1:]
