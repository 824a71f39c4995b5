"""Paired comparison of two models on the same images.

Paired: only images that exactly one of the two classifies correctly count, which is more sensitive than comparing two
intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from topwork.errors import UsageError
from topwork.evaluation.intervals import Interval, binomial_cdf
from topwork.evaluation.predictions import Bools, Ints, Predictions

SIGNIFICANCE = 0.05
"""A difference is significant below this p-value."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models on the same images.

    Attributes:
        n: Images compared: those whose true class is in at least one of the models.
        difference: Second minus first.
        difference_interval: Its 95% confidence interval; None if n is 0.
        p_value: Of McNemar's exact test for equal accuracy.
        per_class: By class name, for the classes with images: ``n``, ``accuracy_first``, ``accuracy_second``, and
            ``n_gained`` and ``n_lost``, the images that only the second or only the first model gets right.
        gained: Positions (rows in the first predictions) that only the second model gets right.
        lost: Positions that only the first model gets right.
        disagreements: Positions with different predictions, correct or not, labeled or not.
    """

    n: int
    accuracy_first: float | None
    accuracy_second: float | None
    difference: float | None
    difference_interval: Interval | None
    p_value: float
    per_class: dict[str, dict[str, Any]]
    gained: Ints
    lost: Ints
    disagreements: Ints


def compare(
    first: Predictions,
    second: Predictions,
    first_hashes: Sequence[str],
    second_hashes: Sequence[str],
    n_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two models, image by image; classes are matched by name, images by the hash of their content.

    Images of a class that only one model has count as errors of the other.

    Args:
        first: Predictions of the model to improve on.
        second: Predictions of the other model, its images in any order.
        first_hashes, second_hashes: Content hash of each image.

    Raises:
        UsageError: The images or their labels differ.
    """
    place = _places(first_hashes, second_hashes, len(first), len(second))
    second = second.take(place)
    true = _true_names(first, second)
    known = np.array([name is not None for name in true], dtype=np.bool_)
    right_first, right_second = first.correct[known], second.correct[known]
    n = int(known.sum())
    positions = np.flatnonzero(known)
    return Comparison(
        n=n,
        accuracy_first=float(right_first.mean()) if n else None,
        accuracy_second=float(right_second.mean()) if n else None,
        difference=float(right_second.mean() - right_first.mean()) if n else None,
        difference_interval=accuracy_difference_interval(right_first, right_second, n_resamples, seed) if n else None,
        p_value=mcnemar(right_first, right_second),
        per_class=_class_changes([name for name in true if name is not None], right_first, right_second),
        gained=positions[right_second & ~right_first],
        lost=positions[right_first & ~right_second],
        disagreements=_disagreements(first, second),
    )


def mcnemar(correct_first: ArrayLike, correct_second: ArrayLike) -> float:
    """Exact two-sided p-value for equal accuracy of two models (McNemar 1947, binomial form).

    Args:
        correct_first: (N,) whether the first model is right.
        correct_second: (N,) whether the second is, on the same images.

    Returns:
        The probability of a split of the discordant images at least this uneven; 1 without any.
    """
    first, second = np.asarray(correct_first, dtype=np.bool_), np.asarray(correct_second, dtype=np.bool_)
    n_first, n_second = int((first & ~second).sum()), int((second & ~first).sum())
    return float(min(1.0, 2 * binomial_cdf(min(n_first, n_second), n_first + n_second, 0.5)))


def accuracy_difference_interval(
    correct_first: ArrayLike, correct_second: ArrayLike, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """95% confidence interval of the difference in accuracy, second minus first, by a paired bootstrap.

    Two pseudo-images are added, one that only the first model gets right and one that only the second does, as in the
    formula of Bonett & Price 2012 (J. Educ. Behav. Stat. 37:479): without them, ten identical predictions would give an
    interval of width zero.

    Args:
        correct_first: (N,) whether the first model is right, N > 0.
        correct_second: (N,) whether the second is, on the same images.
    """
    first, second = np.asarray(correct_first, dtype=np.bool_), np.asarray(correct_second, dtype=np.bool_)
    n, gained, lost = len(first) + 2, int((second & ~first).sum()) + 1, int((first & ~second).sum()) + 1
    shares = np.array([gained, lost, n - gained - lost]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=n_resamples)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, [0.025, 0.975])
    seen = float(second.mean() - first.mean())
    return Interval(min(float(low), seen), max(float(high), seen))


def _places(first: Sequence[str], second: Sequence[str], n_first: int, n_second: int) -> Ints:
    """For each image of the first predictions, its row in the second."""
    if len(first) != n_first or len(second) != n_second:
        raise ValueError("one hash per image is needed")
    missing = Counter(first) - Counter(second)
    extra = Counter(second) - Counter(first)
    if missing or extra:
        raise UsageError(
            "the two runs were not evaluated on the same images"
            f" ({missing.total()} only in the first, {extra.total()} only in the second);"
            " fit both on the same images with the same split and --seed"
        )
    place = np.empty(n_first, dtype=np.int64)
    # Stable, so that duplicates are matched in order.
    place[np.argsort(np.asarray(first), kind="stable")] = np.argsort(np.asarray(second), kind="stable")
    return place


def _truth(predictions: Predictions) -> list[tuple[str, ...] | None]:
    """The names of the labels of each image; None if the model does not know its class."""
    classes = predictions.classes
    if predictions.multi_label:
        return [tuple(classes[label] for label in np.flatnonzero(row).tolist()) for row in predictions.truth]
    return [(classes[label],) if label >= 0 else None for label in predictions.labels.tolist()]


def _true_names(first: Predictions, second: Predictions) -> list[tuple[str, ...] | None]:
    """The true labels of each image, from whichever model knows them."""
    names = []
    for row, (a, b) in enumerate(zip(_truth(first), _truth(second), strict=True)):
        if a is not None and b is not None and set(a) != set(b):
            raise UsageError(
                f"the two runs have different labels for image {row} ({'|'.join(a)!r} and {'|'.join(b)!r});"
                " compare runs with the same labels"
            )
        names.append(b if a is None else a)
    return names


def _class_changes(true: list[tuple[str, ...]], right_first: Bools, right_second: Bools) -> dict[str, dict[str, Any]]:
    """Images of each class, and which model is right on them; an image with several labels counts for each."""
    names = sorted({name for own in true for name in own})
    index = {name: i for i, name in enumerate(names)}
    pairs = np.array([(row, index[name]) for row, own in enumerate(true) for name in own], np.int64).reshape(-1, 2)
    first, second, label = right_first[pairs[:, 0]], right_second[pairs[:, 0]], pairs[:, 1]

    def count(mask: Bools) -> list[int]:
        return [int(n) for n in np.bincount(label[mask], minlength=len(names))]

    masks = (np.ones(len(label), np.bool_), first, second, second & ~first, first & ~second)
    rows = zip(names, *map(count, masks), strict=True)
    return {
        name: {"n": n, "accuracy_first": a / n, "accuracy_second": b / n, "n_gained": gained, "n_lost": lost}
        for name, n, a, b, gained, lost in rows
    }


def _disagreements(first: Predictions, second: Predictions) -> Ints:
    answers = zip(first.answers, second.answers, strict=True)
    return np.flatnonzero([set(a.split("|")) != set(b.split("|")) if first.multi_label else a != b for a, b in answers])
