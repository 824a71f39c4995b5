"""The paired test with which topwork selects between two candidates on the same images.

In: a score per image of each. Out: the mean difference with its standard error, and whether that is clear. Pairing tells
far more than two separate intervals, because hard images are hard for both. How two finished models compare (McNemar's
test, bootstrap) is in ``evaluation/compare.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Gain(NamedTuple):
    """Mean paired difference and its standard error."""

    mean: float
    error: float

    def words(self, digits: int) -> str:
        """The size of the gain and its standard error, if it has one: ``0.009 ± 0.007``."""
        error = f"± {self.error:.{digits}f}" if math.isfinite(self.error) else "on a single image"
        return f"{abs(self.mean):.{digits}f} {error}"


def paired(first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None) -> Gain:
    """First minus second, image by image.

    Args:
        first, second: (N,) scores of the same images.
        weights: (N,) of the images; images of weight 0 do not count.

    Returns:
        The weighted mean and its standard error, which is infinite for fewer than two images.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    weight = np.ones(len(difference)) if weights is None else np.asarray(weights, np.float64)
    n, total = int((weight > 0).sum()), float(weight.sum())
    if n < 2:
        return Gain(float((weight * difference).sum() / total) if n else 0.0, math.inf)
    mean = float((weight * difference).sum() / total)
    squares = float(((weight * (difference - mean)) ** 2).sum())
    return Gain(mean, math.sqrt(squares * n / (n - 1)) / total)


def is_clearly_better(gain: Gain, n_errors: float = 1.0, least: float = 0.0) -> bool:
    """Whether a gain is more than ``n_errors`` standard errors, and more than ``least``.

    A single image on which two models differ is never clear: it is exactly one standard error.
    """
    return gain.mean > max(least, n_errors * gain.error * (1 + 1e-9))
