"""The learning curve: accuracy by number of training images, measured by cross-validation and extrapolated.

Heads are fitted on subsets of the training images of increasing size and evaluated on the rest; the last point is the
cross-validation of the selected head. The error approximately follows a power law with a floor, ``c + a n^-b``
(Hestness et al. 2017, arXiv 1712.00409; Rosenfeld et al. 2020, arXiv 1909.12673); the curve is fitted to the points,
and the interval of the gain from more images is a bootstrap over images. Valid and test are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.evaluation.predictions import Ints
from topwork.features.logistic import SoftmaxRegression
from topwork.models.head import Floats

FRACTIONS = (0.125, 0.25, 0.5)  # of the training images; the last point is the cross-validation
MIN_PER_CLASS = 2  # mean images per class in the smallest subset
MAX_REPEATS = 3
N_BOOTSTRAP = 200
# Multiply-adds of all fits together; about half a second on two cores.
WORK_BUDGET = 6e9
_STEPS = 40  # of the solver, roughly
_EXPONENTS = np.linspace(0.1, 1.5, 29)
_FLOORS = np.linspace(0.0, 1.0, 11)  # relative to the lowest observed error
_PATH = (1.0, 0.1, 0.01, 1e-3)
Errors = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """Accuracy of heads fitted on n images, measured or expected, with its 95% confidence interval."""

    n: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class LearningCurve:
    """Measured points and extrapolated accuracy.

    Attributes:
        points: measured, smallest first.
        forecasts: for all images (those of the final head), twice and four times as many.
        gain: expected gain in accuracy (0 to 1) from twice the images, with its 95% confidence interval.
        floor, scale, exponent: of the most likely ``error = floor + scale n^-exponent``.
        line: (images, expected accuracy), from the smallest subset to four times the images.
    """

    points: tuple[Point, ...]
    forecasts: tuple[Point, ...]
    gain: tuple[float, float, float]
    floor: float
    scale: float
    exponent: float
    line: tuple[tuple[float, float], ...] = ()


def learning_curve(
    columns: Floats,
    labels: Ints,
    groups: Ints,
    n_classes: int,
    penalty: float,
    out_of_fold_correct: NDArray[np.bool_],
    fold_share: float,
    seed: int = 0,
) -> LearningCurve | None:
    """Measures and extrapolates the learning curve of a linear head.

    Args:
        columns: (N, D) columns of the head for the training images.
        labels: (N,).
        groups: (N,); groups are never split.
        penalty: of the head on all N images; scaled up for smaller subsets.
        out_of_fold_correct: (N,) whether the cross-validated prediction is correct.
        fold_share: share of the N images that each fold was fitted on.

    Returns:
        None if there are too few images.
    """
    n = len(labels)
    present = len(np.unique(labels))
    sizes = [round(f * n) for f in FRACTIONS if f * n >= max(MIN_PER_CLASS * present, 8)]
    if not sizes or n < 30:
        return None
    work = sum(m * min(m, columns.shape[1]) * n_classes * 2 * _STEPS for m in sizes)
    n_repeats = int(np.clip(WORK_BUDGET // max(work, 1), 1, MAX_REPEATS))

    def right_from(m: int) -> Errors:
        """(N,) share of repeats in which each held-out image was classified correctly; NaN if it was never held out."""
        right, asked = np.zeros(n), np.zeros(n)
        for repeat in range(n_repeats):
            fitted = _part(labels, groups, m, np.random.default_rng([seed, m, repeat]))
            rest = ~np.isin(groups, groups[fitted])
            predicted = _predicted(columns[fitted], labels[fitted], n_classes, penalty * n / len(fitted), columns[rest])
            right[rest] += predicted == labels[rest]
            asked[rest] += 1
        return right / np.where(asked > 0, asked, np.nan)

    rights = [*map(right_from, sizes), out_of_fold_correct.astype(np.float64)]
    if any(np.isnan(right).all() for right in rights):  # all images in one group: nothing can be held out
        return None
    return _extrapolated([*sizes, round(fold_share * n)], np.stack(rights), n, seed)


def _predicted(x: Floats, labels: Ints, n_classes: int, penalty: float, rest: Floats) -> Ints:
    """Classes of the other images by a head fitted with warm starts along the regularization path."""
    mean = x.mean(0)
    problem = SoftmaxRegression(x - mean, labels, n_classes, np.ones((1, len(x))))
    for step in (p for p in _PATH if p > penalty):
        problem.solve(step, tolerance=1e-2, max_steps=15)
    problem.solve(penalty, tolerance=1e-3)
    weight, bias = problem.solution()
    return np.asarray(((rest - mean) @ weight[0].T + bias[0]).argmax(1))


def _part(labels: Ints, groups: Ints, m: int, rng: np.random.Generator) -> Ints:
    """About m rows, stratified, with whole groups."""
    lot = rng.permutation(int(groups.max()) + 1)[groups]
    order = np.argsort(lot, kind="stable")
    rank = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        rank[rows] = (np.arange(len(rows)) + rng.uniform()) / len(rows)
    return np.sort(np.argsort(rank, kind="stable")[:m]).astype(np.int64)


def _extrapolated(sizes: list[int], right: Errors, n: int, seed: int) -> LearningCurve:
    """Fits the law to the mean of (S, N) results for n training images, and to bootstrap samples of images."""
    rng = np.random.default_rng([seed, 7])
    n_images = right.shape[1]
    is_known = ~np.isnan(right)
    filled = np.where(is_known, right, 0.0)
    boot = np.empty((N_BOOTSTRAP, len(sizes)))
    for row in range(N_BOOTSTRAP):  # one at a time, to bound memory
        counts = np.bincount(rng.integers(0, n_images, n_images), minlength=n_images)
        boot[row] = 1 - (filled @ counts) / np.maximum(is_known @ counts, 1)
    seen = 1 - filled.sum(1) / is_known.sum(1)
    spread = np.maximum(boot.std(0), 0.5 / n_images)
    x = np.array(sizes, dtype=np.float64)
    wanted = np.array([n, 2 * n, 4 * n], dtype=np.float64)
    laws = _Laws(x, seen[None], spread)
    expected = np.clip(1 - laws.mean_error(wanted)[0], 0, 1)
    accuracy = np.clip(1 - _Laws(x, boot, spread).drawn_error(wanted, rng), 0, 1)
    low, high = np.quantile(accuracy, [0.025, 0.975], axis=0)
    gain = np.quantile(accuracy[:, 1] - accuracy[:, 0], [0.025, 0.975])
    floor, scale, exponent = laws.best()
    along = np.geomspace(x.min(), 4 * n, 33)
    line = zip(along.tolist(), np.clip(1 - laws.mean_error(along)[0], 0, 1).tolist(), strict=True)
    point_low, point_high = np.quantile(1 - boot, [0.025, 0.975], axis=0)

    def points(at: Sequence[float], accuracy: Errors, low: Errors, high: Errors) -> tuple[Point, ...]:
        rows = zip(at, accuracy, np.minimum(low, accuracy), np.maximum(high, accuracy), strict=True)
        return tuple(Point(int(m), float(v), float(a), float(b)) for m, v, a, b in rows)

    return LearningCurve(
        points=points(sizes, 1 - seen, point_low, point_high),
        forecasts=points(wanted.tolist(), expected, low, high),
        gain=(float(expected[1] - expected[0]), float(gain[0]), float(gain[1])),
        floor=floor,
        scale=scale,
        exponent=exponent,
        line=tuple((round(size, 1), round(value, 5)) for size, value in line),
    )


class _Laws:
    """Power laws with a floor through each row of (B, S) errors at (S,) sizes, on a grid of exponents and floors."""

    # For each exponent and floor the best scale has a closed form (weighted least squares). Four points cannot
    # distinguish a floor from slow decay, so all laws are averaged with weights exp(-loss / 2).
    def __init__(self, n: Errors, errors: Errors, spread: Errors) -> None:
        weights, lowest = 1 / spread**2, errors.min(axis=1)
        exponents, shares = (grid.ravel() for grid in np.meshgrid(_EXPONENTS, _FLOORS, indexing="ij"))
        power = n[None] ** -exponents[:, None]  # (G, S)
        self.exponents = exponents
        self.floors = lowest[:, None] * shares[None]  # (B, G)
        over = (errors[:, None] - self.floors[..., None]) * weights * power[None]
        self.scales = np.maximum(over.sum(2) / (weights * power**2).sum(1)[None], 0)
        gap = errors[:, None] - self.floors[..., None] - self.scales[..., None] * power[None]
        loss = (weights * gap**2).sum(2)
        chance = np.exp(-(loss - loss.min(axis=1, keepdims=True)) / 2)
        self.chance = chance / chance.sum(axis=1, keepdims=True)

    def best(self) -> tuple[float, float, float]:
        """Floor, scale and exponent of the most likely law of the first row."""
        at = int(self.chance[0].argmax())
        return float(self.floors[0, at]), float(self.scales[0, at]), float(self.exponents[at])

    def mean_error(self, n: Errors) -> Errors:
        """(B, W) expected errors at some sizes."""
        power = n[None] ** -self.exponents[:, None]
        return np.asarray((self.chance * self.floors).sum(1)[:, None] + (self.chance * self.scales) @ power)

    def drawn_error(self, n: Errors, rng: np.random.Generator) -> Errors:
        """(B, W) errors of a random law for each row, drawn by its weight."""
        at = (self.chance.cumsum(axis=1) < rng.uniform(size=(len(self.chance), 1))).sum(axis=1)
        at = np.minimum(at, len(self.exponents) - 1)
        rows = np.arange(len(at))
        return np.asarray(
            self.floors[rows, at][:, None] + self.scales[rows, at][:, None] * n[None] ** -self.exponents[at][:, None]
        )
