"""How good the answers are where an image may have any number of labels: in go labels and probabilities, out numbers.

A number that cannot be measured is None, never NaN. Not here: one label per image (``metrics``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.errors import UsageError
from topwork.evaluation.intervals import Interval, interval_from_variance, wilson
from topwork.evaluation.predictions import Bools, Ints


@dataclass(frozen=True)
class LabelScores:
    """The scores of one class where an image may have several; None where there is nothing to measure."""

    n: int
    average_precision: float | None
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Everything measured where an image may have several labels.

    Attributes:
        n: Images.
        mean_average_precision: Mean over the classes with an image, threshold-free.
        micro_f1: F1 over all (image, class) pairs together.
        macro_f1: Mean F1 of the classes with an image.
        exact_match: Share of images with every label right.
        hamming_loss: Share of wrong (image, class) pairs.
        per_class: Scores by class name.
        intervals: 95 % intervals of the five numbers, by name.
    """

    n: int
    mean_average_precision: float | None
    micro_f1: float | None
    macro_f1: float | None
    exact_match: float | None
    hamming_loss: float | None
    per_class: dict[str, LabelScores]
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, None where nothing was measured."""
        return asdict(self)


def evaluate_multilabel(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    thresholds: ArrayLike = 0.5,
    n_resamples: int = 200,
    seed: int = 0,
) -> MultiLabelEvaluation:
    """Measure answers where an image may have any number of labels.

    Args:
        labels: (N, C) whether the image has the label, 0 or 1.
        probabilities: (N, C) probability of each label, each 0 to 1 on its own.
        classes: The C class names.
        thresholds: One for all classes or (C,): a label is given from this probability on.
        n_resamples: Resamples of images behind the variances of the mean average precision and the F1 scores; the
            intervals come from the variances (``interval_from_variance``), so a few hundred are plenty.
        seed: Of those resamples.

    Raises:
        UsageError: The shapes do not fit together.
    """
    truth, scores = np.asarray(labels).astype(np.bool_), np.asarray(probabilities, dtype=np.float64)
    if truth.ndim != 2 or truth.shape != scores.shape or truth.shape[1] != len(classes):
        raise UsageError(
            f"several labels per image: labels {truth.shape}, probabilities {scores.shape} and {len(classes)} classes"
            " do not fit together"
        )
    order = np.lexsort(np.hstack([truth, scores]).T)  # so that no figure depends on the order of the images
    truth, scores = truth[order], scores[order]
    given = scores >= np.asarray(thresholds, dtype=np.float64)
    table = _LabelTable.of(truth, scores, given)
    ones = np.ones(len(truth))
    average_precision, counts = table.average_precision(ones), table.counts(ones)
    summary = _label_summary(average_precision, counts) if len(truth) else (None, None, None)
    exact = (truth == given).all(axis=1)
    return MultiLabelEvaluation(
        len(truth),
        *summary,
        exact_match=_mean_or_none(exact),
        hamming_loss=_mean_or_none((truth != given).ravel()),
        per_class=_label_scores(classes, average_precision, counts),
        intervals=_label_intervals(table, summary, n_resamples, seed) | _pair_intervals(truth, given, exact),
    )


@dataclass(frozen=True, eq=False)
class _LabelTable:
    """Labels and scores, sorted once, so that any weighting of the images is a few passes over (N, C) arrays."""

    truth: Bools
    given: Bools
    order: Ints  # (N, C) image at each place of the class's ranking, highest score first
    last_tie: Ints  # (N, C) last place that holds the same score

    @staticmethod
    def of(truth: Bools, scores: NDArray[np.float64], given: Bools) -> _LabelTable:
        order = np.argsort(-scores, axis=0, kind="stable")
        ranked = np.take_along_axis(scores, order, axis=0)
        places = np.broadcast_to(np.arange(len(scores))[:, None], scores.shape)
        ends = np.ones(scores.shape, dtype=np.bool_)
        ends[:-1] = ranked[1:] != ranked[:-1]
        last = np.where(ends, places, len(scores))
        last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
        return _LabelTable(truth, given, order, last)

    def average_precision(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C,) average precision with these (N,) image weights; NaN where no image has the label."""
        ranked = weights[self.order]
        relevant = ranked * np.take_along_axis(self.truth, self.order, axis=0)
        positives, everything = np.cumsum(relevant, axis=0), np.cumsum(ranked, axis=0)
        precision = np.divide(positives, everything, out=np.zeros_like(positives), where=everything > 0)
        total = relevant.sum(axis=0)
        found = (relevant * np.take_along_axis(precision, self.last_tie, axis=0)).sum(axis=0)
        return np.asarray(np.divide(found, total, out=np.full(total.shape, np.nan), where=total > 0))

    def counts(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """(3, C) weight of the images that have the label, were given it, and both."""
        return np.stack([weights @ self.truth, weights @ self.given, weights @ (self.truth & self.given)])


def _label_summary(
    average_precision: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[float | None, float | None, float | None]:
    """Mean average precision, micro F1, macro F1."""
    has, was_given, both = counts
    present, pairs = has > 0, float(has.sum() + was_given.sum())
    f1 = 2 * both[present] / (has + was_given)[present]
    micro = 2 * float(both.sum()) / pairs if pairs else None
    return _mean_or_none(average_precision[present]), micro, _mean_or_none(f1)


def _label_scores(
    classes: Sequence[str], average_precision: NDArray[np.float64], counts: NDArray[np.float64]
) -> dict[str, LabelScores]:
    scores = {}
    for name, precision_mean, (has, given, both) in zip(classes, average_precision, counts.T, strict=True):
        scores[name] = LabelScores(
            n=int(has),
            average_precision=float(precision_mean) if has else None,
            precision=float(both / given) if given else None,
            recall=float(both / has) if has else None,
            f1=float(2 * both / (has + given)) if has else None,
        )
    return scores


def _label_intervals(
    table: _LabelTable, summary: tuple[float | None, float | None, float | None], n_resamples: int, seed: int
) -> dict[str, Interval]:
    n, rng = len(table.truth), np.random.default_rng(seed)
    drawn = []
    for _ in range(n_resamples if n else 0):
        weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        drawn.append(_label_summary(table.average_precision(weights), table.counts(weights)))
    intervals = {}
    for name, value, values in zip(
        ("mean_average_precision", "micro_f1", "macro_f1"), summary, zip(*drawn, strict=True), strict=False
    ):
        seen = [v for v in values if v is not None]
        if value is not None and len(seen) > 1:
            intervals[name] = interval_from_variance(value, float(np.var(seen)), n)
    return intervals


def _pair_intervals(truth: Bools, given: Bools, exact: Bools) -> dict[str, Interval]:
    if len(truth) == 0:
        return {}
    intervals = {"exact_match": wilson(float(exact.mean()), len(exact))}
    wrong = (truth != given).mean(axis=1)
    if len(wrong) > 1:
        intervals["hamming_loss"] = interval_from_variance(
            float(wrong.mean()), float(wrong.var()) / len(wrong), len(wrong)
        )
    return intervals


def _mean_or_none(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
