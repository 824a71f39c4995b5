"""Sentences of studies: in go measured values, out comes text that cannot disagree with them.

A difference is called one only where chance would hardly do it; otherwise the sentence says "no clear difference".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from topwork.evaluation.compare import SIGNIFICANCE, accuracy_difference_interval, mcnemar
from topwork.studies.study import Measured
from topwork.text import join_names, percent, points


@dataclass(frozen=True)
class Difference:
    """Second less first on the same images: a share with its paired 95 % interval, and McNemar's exact p-value."""

    value: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether chance would hardly do it."""
        return self.p_value < SIGNIFICANCE and self.value != 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"is_clear": self.is_clear}


def difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Difference:
    """Compares two ways of answering the same N images, given as (N,) right or wrong."""
    one, two = np.asarray(first, np.bool_), np.asarray(second, np.bool_)
    interval = accuracy_difference_interval(one, two, seed=seed)
    return Difference(float(two.mean() - one.mean()), interval.low, interval.high, mcnemar(one, two), len(one))


def compared(first: str, first_correct: ArrayLike, second: str, second_correct: ArrayLike, seed: int = 0) -> str:
    """One sentence on whether the second way is better than the first, on the same images."""
    found = difference(first_correct, second_correct, seed)
    one, two = Measured.of(first_correct), Measured.of(second_correct)
    facts = (
        f"{upper(second)} is right for {percent(two.value)}, {first} for {percent(one.value)}: {points(found.value)} points "
        f"({points(found.low)} to {points(found.high)})"
    )
    if not found.is_clear:
        return f"{facts}. No clear difference on {found.n} images (p = {found.p_value:.2f})."
    better = second if found.value > 0 else first
    return f"{facts}; {better} is clearly better (p {_p(found.p_value)})."


def best_of(answers: dict[str, ArrayLike], seed: int = 0) -> str:
    """One sentence on which of several ways is best, and which others are not clearly worse."""
    names = sorted(answers, key=lambda name: -float(np.mean(np.asarray(answers[name], np.bool_))))
    best = names[0]
    shares = Measured.of(answers[best])
    tied = [name for name in names[1:] if not difference(answers[best], answers[name], seed).is_clear]
    worse = [name for name in names[1:] if name not in tied]
    facts = f"{upper(best)} has the most right: {share(shares)}"
    if not tied:
        return f"{facts}, clearly more than every other."
    if not worse:
        return f"{facts}; no clear difference from {join_names(tied)} on {shares.n} images."
    return f"{facts}; {join_names(tied)} cannot be told from it on {shares.n} images, {join_names(worse)} clearly can."


def share(value: Measured) -> str:
    """``94.8% (91.2–97.0)``."""
    return str(value)


def upper(text: str) -> str:
    """The text with a capital in front."""
    return text[:1].upper() + text[1:]


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"= {value:.3f}"
