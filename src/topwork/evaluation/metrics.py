"""Metrics of predictions, with 95% confidence intervals.

``METRICS`` is the table of all metrics, for one label per image and for several: evaluation, terminal, reports and help
read it, so a new metric is one entry. ``evaluate_part`` computes everything in ``evaluation.json`` about one part of a
split. Images whose true class the model does not have (label -1) are counted and excluded from all metrics. A metric
that cannot be computed is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.evaluation.curves import (
    LabelRanking,
    calibration_error,
    calibration_error_interval,
    mean_ranks,
    precision_recall_curve,
    roc_auc,
)
from topwork.evaluation.intervals import (
    Interval,
    auc_interval,
    average_precision_interval,
    balanced_accuracy_interval,
    f1_interval,
    interval_from_variance,
    macro_f1_interval,
    mean_interval,
    wilson,
)
from topwork.evaluation.predictions import Bools, Ints, Predictions
from topwork.text import count, decimal, percent, percent_ci, quoted

TOP_K = 5
LARGEST_DENSE_CONFUSION = 2_000
"""With more classes than this the confusion matrix is kept as its cells only: 10,000 classes would take 800 MB."""
_PERMUTATIONS = 2000
_RESAMPLES_OF_RANKINGS = 200  # only for the variance (``interval_from_variance``), so a few hundred are enough


# ---- the table of metrics


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        key: Its name in ``evaluation.json``.
        title: Its name for people.
        hint: What it measures, in a few words.
        unit: ``percent`` for shares, ``number`` for other scores from 0 to 1, ``nats`` for losses.
        value: Computes it; None if undefined.
        interval: Computes its 95% confidence interval, if any.
        task: The kind of labels it is for; None for both.
        min_classes: Not shown with fewer classes than this.
        max_classes: Not measured with more classes than this.
    """

    key: str
    title: str
    hint: str
    unit: Literal["percent", "number", "nats"]
    value: Callable[[Measured], float | None]
    interval: Callable[[Measured], Interval | None]
    task: Literal["softmax", "sigmoid"] | None = "softmax"
    min_classes: int = 0
    max_classes: int | None = None

    def applies(self, multi_label: bool, n_classes: int) -> bool:
        """Whether it applies to this kind of labels and this number of classes."""
        is_of_task = self.task is None or (self.task == "sigmoid") == multi_label
        return is_of_task and (self.max_classes is None or n_classes <= self.max_classes)

    def text(self, value: float | None) -> str:
        """Formats a value."""
        return percent(value) if self.unit == "percent" else decimal(value)

    def figure(self, part: Mapping[str, Any]) -> dict[str, float | None]:
        """Its ``value``, ``low`` and ``high`` in a part of an ``evaluation.json``."""
        if self.key == "accuracy":
            return dict(part["accuracy"])
        interval = (part.get("intervals") or {}).get(self.key) or {}
        return {"value": part.get(self.key), "low": interval.get("low"), "high": interval.get("high")}

    def text_ci(self, part: Mapping[str, Any]) -> str:
        """``94.8% (95% CI 91.2–97.0)`` or ``0.981 (95% CI 0.970–0.990)``."""
        figure = self.figure(part)
        if self.unit == "percent" or figure["value"] is None:
            return percent_ci(figure)
        span = "" if figure["low"] is None else f" (95% CI {decimal(figure['low'])}–{decimal(figure['high'])})"
        return decimal(figure["value"]) + span


def metrics_of(part: Mapping[str, Any]) -> Iterator[Metric]:
    """The metrics to show for a part of an ``evaluation.json``, in their order."""
    n_classes = len(part["classes"])
    for metric in METRICS:
        is_shown = metric.applies(bool(part.get("multi_label")), n_classes) and n_classes >= metric.min_classes
        if is_shown and metric.figure(part)["value"] is not None:
            yield metric


class Measured:
    """A part with cached intermediate results that several metrics need."""

    def __init__(self, predictions: Predictions, n_resamples: int = 1000, seed: int = 0) -> None:
        self.known, self.n_resamples, self.seed = predictions.labeled(), n_resamples, seed

    @cached_property
    def cells(self) -> Ints:
        """(M, 3) true label, predicted label and count, for the cells of the confusion matrix above 0."""
        # Sparse, so that the cost does not depend on the number of classes squared.
        known, n_classes = self.known, self.known.n_classes
        pairs, count = np.unique(known.labels * n_classes + known.predicted, return_counts=True)
        return np.stack([pairs // n_classes, pairs % n_classes, count], axis=1).astype(np.int64)

    @cached_property
    def counts(self) -> _Counts:
        """Images of each class, predicted as it, and both."""
        known = self.known
        if known.multi_label:
            return _Counts(known.truth.sum(0), known.given.sum(0), (known.truth & known.given).sum(0))
        return _Counts.of(self.cells, known.n_classes)

    @cached_property
    def positive(self) -> tuple[Bools, NDArray[np.float64]]:
        """Of two classes: see :func:`positive_scores`."""
        return positive_scores(self.known)

    @cached_property
    def ranking(self) -> LabelRanking:
        """For several labels: the images ranked by the probability of each label."""
        return LabelRanking.of(self.known.truth, self.known.probabilities, self.known.given)

    @cached_property
    def average_precisions(self) -> NDArray[np.float64]:
        """(C,) average precision of each label; NaN for labels without images."""
        return self.ranking.average_precision(np.ones(len(self.known)))

    @cached_property
    def resampled(self) -> dict[str, float]:
        """For several labels: variances of mean average precision and F1 over resamples of images."""
        n, rng = len(self.known), np.random.default_rng(self.seed)
        drawn = []
        for _ in range(min(self.n_resamples, _RESAMPLES_OF_RANKINGS) if n else 0):
            weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
            counts = _Counts(*self.ranking.counts(weights))
            precision = self.ranking.average_precision(weights)
            drawn.append((_mean(precision[counts.n > 0]), counts.micro_f1, counts.macro_f1))
        keys = ("mean_average_precision", "micro_f1", "macro_f1")
        seen = {
            key: [v for v in values if v is not None]
            for key, values in zip(keys, zip(*drawn, strict=True), strict=False)
        }
        return {key: float(np.var(values)) for key, values in seen.items() if len(values) > 1}

    def interval_of_resampled(self, key: str, value: float | None) -> Interval | None:
        """The interval of one of these."""
        if value is None or key not in self.resampled:
            return None
        return interval_from_variance(value, self.resampled[key], len(self.known))

    @cached_property
    def pairs(self) -> tuple[NDArray[np.float64], Bools]:
        """For several labels: probability of each (image, class) pair, and whether the image has the label."""
        stated, right = self.known.probabilities.ravel(), self.known.truth.ravel()
        order = np.lexsort((right, stated))  # sums must not depend on the order of the images
        return stated[order], right[order]


def _balanced_interval(m: Measured) -> Interval:
    present = m.counts.n > 0
    return balanced_accuracy_interval(m.counts.n_correct[present], m.counts.n[present])


def _macro_f1_interval(m: Measured) -> Interval | None:
    if m.known.multi_label:
        return m.interval_of_resampled("macro_f1", m.counts.macro_f1)
    return macro_f1_interval(m.cells, m.counts.n_correct, m.counts.n, m.counts.n_predicted)


def _entropy_interval(m: Measured) -> Interval | None:
    found = mean_interval(m.known.loss)  # a single image has no variance
    return None if found is None else Interval(max(0.0, found.low), found.high)


def _roc_interval(m: Measured) -> Interval | None:
    area = roc_auc(*m.positive)
    return (
        None
        if area is None
        else auc_interval(area, int(m.counts.n[m.known.task.positive]), int(m.counts.n[1 - m.known.task.positive]))
    )


def _average_precision(m: Measured) -> float | None:
    curve = precision_recall_curve(*m.positive)
    return curve.average_precision if curve is not None and roc_auc(*m.positive) is not None else None


def _average_precision_interval(m: Measured) -> Interval | None:
    value = _average_precision(m)
    return None if value is None else average_precision_interval(value, int(m.counts.n[m.known.task.positive]))


def _ece_interval(m: Measured) -> Interval | None:
    if not m.n_resamples:
        return None
    return calibration_error_interval(m.known.confidence, m.known.correct, m.n_resamples, m.seed)


def _mean_average_precision(m: Measured) -> float | None:
    return _mean(m.average_precisions[m.counts.n > 0])


def _hamming_interval(m: Measured) -> Interval | None:
    wrong = (m.known.truth != m.known.given).mean(axis=1)
    n = len(wrong)
    return interval_from_variance(float(wrong.mean()), float(wrong.var()) / n, n) if n > 1 else None


def _no_interval(_: Measured) -> None:
    return None


def _accuracy(m: Measured) -> float | None:
    return _mean(m.known.correct)


def _accuracy_interval(m: Measured) -> Interval:
    return wilson(float(m.known.correct.mean()), len(m.known))


METRICS = (
    Metric(
        "accuracy", "Accuracy", "fraction of correct answers", "percent", _accuracy, _accuracy_interval,
    ),
    Metric(
        "accuracy", "Exact match", "fraction of images with all labels correct", "percent",
        _accuracy, _accuracy_interval, "sigmoid",
    ),
    Metric(
        "balanced_accuracy", "Balanced accuracy", "mean recall over the classes, regardless of size", "percent",
        lambda m: m.counts.mean_recall, _balanced_interval,
    ),
    Metric(
        "top5_accuracy", "Top-5 accuracy", "the true class is among the top five", "percent",
        lambda m: _mean(m.known.rank < TOP_K),
        lambda m: wilson(float((m.known.rank < TOP_K).mean()), len(m.known)), min_classes=TOP_K + 1,
    ),
    Metric(
        "mean_average_precision", "Mean average precision", "quality of the ranking by each label, independent of thresholds",
        "percent", _mean_average_precision,
        lambda m: m.interval_of_resampled("mean_average_precision", _mean_average_precision(m)), "sigmoid",
    ),
    Metric(
        "micro_f1", "Micro F1", "precision and recall combined, over all labels of all images", "percent",
        lambda m: m.counts.micro_f1, lambda m: m.interval_of_resampled("micro_f1", m.counts.micro_f1), "sigmoid",
    ),
    Metric(
        "macro_f1", "Macro F1", "precision and recall combined, mean over the classes", "percent",
        lambda m: m.counts.macro_f1, _macro_f1_interval, None,
    ),
    Metric(
        "roc_auc", "ROC AUC", "area under the ROC curve: 0.5 is chance, 1 is perfect", "number",
        lambda m: roc_auc(*m.positive), _roc_interval, min_classes=2, max_classes=2,
    ),
    Metric(
        "average_precision", "Average precision", "area under the precision-recall curve", "number",
        _average_precision, _average_precision_interval, min_classes=2, max_classes=2,
    ),
    Metric(
        "ece", "Calibration error", "mean gap between confidence and accuracy; lower is better", "percent",
        lambda m: calibration_error(m.known.confidence, m.known.correct), _ece_interval,
    ),
    Metric(
        "calibration_error", "Calibration error",
        "mean gap between predicted probability and observed frequency; lower is better", "percent",
        lambda m: calibration_error(*m.pairs), _no_interval, "sigmoid",
    ),
    Metric(
        "cross_entropy", "Cross-entropy", "mean of −log(probability of the true class), in nats; lower is better",
        "nats", lambda m: _mean(m.known.loss), _entropy_interval,
    ),
    Metric(
        "hamming_loss", "Hamming loss", "fraction of wrong labels; lower is better", "percent",
        lambda m: _mean((m.known.truth != m.known.given).ravel()), _hamming_interval, "sigmoid",
    ),
)  # fmt: skip
"""Every metric, in the order in which they are shown."""


# ---- one part of a split


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class; None if undefined: precision without predictions, recall and F1 without images."""

    n_train: int | None
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, eq=False)
class PartEvaluation:
    """All metrics of one part (valid or test) of a split; ``evaluation["macro_f1"]`` is one of the metrics.

    Attributes:
        n: Number of evaluated images.
        n_unknown_class: Images excluded because the model does not have their class.
        values: The metrics by their key in ``METRICS``.
        intervals: Their 95% confidence intervals, by the same keys, if there is one.
        per_class: Scores by class name, in the order of ``classes``.
        class_intervals: 95% confidence intervals of precision, recall and F1 by class name, if they were measured.
        confusion_cells: (M, 3) true label, predicted label, count, if the count is not 0; empty for several labels.
        classes: The C class names.
        labels: Facts about several labels, as in ``evaluation.json``; None for one label per image.
        positive: For two classes with a positive one: ``class``, ``threshold``, and ``recall``, ``precision`` and
            ``false_positive_rate`` at the threshold.
    """

    n: int
    n_unknown_class: int
    values: dict[str, float | None]
    intervals: dict[str, Interval]
    per_class: dict[str, ClassScores]
    class_intervals: dict[str, dict[str, Interval]]
    confusion_cells: Ints
    classes: tuple[str, ...]
    labels: dict[str, Any] | None = field(default=None)
    positive: dict[str, Any] | None = field(default=None)

    def __getitem__(self, key: str) -> float | None:
        """The value of one metric."""
        return self.values[key]

    @property
    def confusion(self) -> Ints:
        """(C, C) confusion matrix, rows true, columns predicted."""
        matrix = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        matrix[self.confusion_cells[:, 0], self.confusion_cells[:, 1]] = self.confusion_cells[:, 2]
        return matrix

    def as_dict(self) -> dict[str, Any]:
        """The part as in ``evaluation.json``: plain values, None if undefined.

        With more than 2,000 classes ``confusion`` is None and ``confusion_cells`` holds its [true, predicted, count].
        """
        interval = self.intervals.get("accuracy")
        part: dict[str, Any] = {"n": self.n} if self.labels is None else {"multi_label": True, "n": self.n}
        part |= {"n_unknown_class": self.n_unknown_class} if self.labels is None else {}
        part |= self.values | {
            "accuracy": {
                "value": self.values["accuracy"],
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
            },
            "intervals": {key: found.as_dict() for key, found in self.intervals.items() if key != "accuracy"},
            "per_class": {name: asdict(scores) for name, scores in self.per_class.items()},
            "per_class_intervals": {
                name: {key: interval.as_dict() for key, interval in found.items()}
                for name, found in self.class_intervals.items()
            },
            "classes": list(self.classes),
        }
        if self.labels is not None:
            for name, more in self.labels["per_class"].items():
                part["per_class"][name] |= more
            return part | {key: value for key, value in self.labels.items() if key != "per_class"}
        part |= {"positive": self.positive} if self.positive else {}
        is_dense = len(self.classes) <= LARGEST_DENSE_CONFUSION
        part["confusion"] = self.confusion.tolist() if is_dense else None
        return part if is_dense else part | {"confusion_cells": self.confusion_cells.tolist()}


def evaluate_part(
    predictions: Predictions, n_train: Mapping[str, int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> PartEvaluation:
    """Evaluates one part of a split.

    Args:
        predictions: The predictions, with calibrated logits.
        n_train: Training images by class name, if known; 0 for missing classes.
        n_resamples: Resamples for the intervals that need them (calibration error; several labels: average precision
            and F1); 0 to omit them.
        seed: Random seed.
    """
    measured = Measured(_sorted(predictions), n_resamples, seed)
    known, has_any = measured.known, len(measured.known) > 0
    metrics = [m for m in METRICS if m.applies(known.multi_label, known.n_classes)]
    metrics = [m for m in metrics if m.max_classes is None or known.n_classes >= m.min_classes]
    intervals = {m.key: found for m in metrics if has_any and (found := m.interval(measured)) is not None}
    per_class, class_intervals = _class_scores(known.classes, measured.counts, n_train)
    return PartEvaluation(
        n=len(known),
        n_unknown_class=len(predictions) - len(known),
        values={m.key: m.value(measured) if has_any else None for m in metrics},
        intervals=intervals,
        per_class=per_class,
        class_intervals=class_intervals,
        confusion_cells=np.empty((0, 3), np.int64) if known.multi_label else measured.cells,
        classes=known.classes,
        labels=_facts_of_several(measured) if known.multi_label else None,
        positive=None if known.multi_label or known.task.thresholds is None else _positive_facts(measured),
    )


# ---- the held-out parts of a split


HELD_OUT = ("test", "valid")
"""The parts that are evaluated; what counts most comes first."""


def evaluate_held_out(
    predictions: Mapping[str, Predictions], leaked: Collection[int], n_train: Mapping[str, int] | None, seed: int = 0
) -> dict[str, Any]:
    """``valid`` and ``test`` as in ``evaluation.json``, and both without images that are also in train.

    Args:
        predictions: By part.
        leaked: Rows of the manifest with the same picture or group as a training image.

    Returns:
        The parts by name; ``test_without_leaks`` if some of its images leaked and others did not; ``leaks``: by part
        ``n_leaked``.
    """
    found: dict[str, Any] = {}
    leaks = {}
    for name in reversed(HELD_OUT):
        if name not in predictions:
            continue
        part = predictions[name]
        found[name] = evaluate_part(part, n_train, seed=seed).as_dict()
        is_leaked = np.isin(part.sample_indices, np.array(sorted(leaked), np.int64))
        if is_leaked.any():
            leaks[name] = {"n_leaked": int(is_leaked.sum())}
        if is_leaked.any() and not is_leaked.all():
            found[f"{name}_without_leaks"] = evaluate_part(part.take(~is_leaked), n_train, seed=seed).as_dict()
    return found | ({"leaks": leaks} if leaks else {})


def headline(evaluation: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and metrics of the main part: test, else valid; without leaked images if there are any."""
    for name in HELD_OUT:
        if evaluation.get(name) and evaluation[name]["n"]:
            return name, evaluation.get(f"{name}_without_leaks") or evaluation[name]
    return None


def leak_sentence(name: str, evaluation: Mapping[str, Any]) -> str:
    """A sentence on the leaks of a part."""
    n = evaluation["leaks"][name]["n_leaked"]
    them, are = ("it", "is") if n == 1 else ("them", "are")
    text = f"{count(n, 'image')} of {name} {are} also in train (the same picture, or one of the same group)."
    clean = evaluation.get(f"{name}_without_leaks")
    if clean is None:
        return f"{text} No other images are left, so the metrics of {name} say little about new images."
    with_all, without = percent_ci(evaluation[name]["accuracy"]), percent_ci(clean["accuracy"])
    return f"{text} Accuracy without {them}: {without}; with {them}: {with_all}."


def zero_shot_sentence(evaluation: Mapping[str, Any]) -> str:
    """The zero-shot accuracy as a sentence; empty if not requested."""
    found = evaluation.get("zero_shot")
    if not found:
        return ""
    text = f"Zero-shot accuracy with the prompt {quoted(found['prompt'], 80)}: {percent_ci(found['accuracy'])}"
    return f"{text}, on the same {count(found['n'], 'image')} of {found['part']}."


def _sorted(predictions: Predictions) -> Predictions:
    """For several labels, sorts the images, so that no metric depends on their order."""
    if not predictions.multi_label or not len(predictions):
        return predictions
    return predictions.take(np.lexsort(np.hstack([predictions.truth, predictions.probabilities]).T))


def _facts_of_several(m: Measured) -> dict[str, Any]:
    known, n = m.known, len(m.known)
    precision, limits = m.average_precisions, known.task.limits(known.n_classes)
    return {
        "n_labels_per_image": round(float(known.truth.sum(1).mean()), 3) if n else None,
        "n_labels_given_per_image": round(float(known.given.sum(1).mean()), 3) if n else None,
        "per_class": {
            name: {
                "average_precision": float(precision[i]) if m.counts.n[i] else None,
                "threshold": round(float(limits[i]), 4),
            }
            for i, name in enumerate(known.classes)
        },
    }


def _positive_facts(m: Measured) -> dict[str, Any]:
    task, counts = m.known.task, m.counts
    p, n_others = task.positive, int(counts.n[1 - task.positive])
    n, n_given, n_correct = (int(values[p]) for values in (counts.n, counts.n_predicted, counts.n_correct))
    return {
        "class": m.known.classes[p],
        "threshold": float(task.limits(2)[p]),
        "recall": n_correct / n if n else None,
        "precision": n_correct / n_given if n_given else None,
        "false_positive_rate": (n_given - n_correct) / n_others if n_others else None,
    }


@dataclass(frozen=True, eq=False)
class _Counts:
    """(C,) images (or their weights) per class: of it, predicted as it, and both."""

    n: NDArray[Any]
    n_predicted: NDArray[Any]
    n_correct: NDArray[Any]

    @staticmethod
    def of(cells: Ints, n_classes: int) -> _Counts:
        true, predicted, count = cells[:, 0], cells[:, 1], cells[:, 2]
        right = true == predicted
        return _Counts(
            _sums(true, count, n_classes),
            _sums(predicted, count, n_classes),
            _sums(true[right], count[right], n_classes),
        )

    @property
    def mean_recall(self) -> float | None:
        """Mean recall of the classes present."""
        present = self.n > 0
        return _mean(self.n_correct[present] / self.n[present])

    @property
    def macro_f1(self) -> float | None:
        """Mean F1 of the classes present."""
        present = self.n > 0
        return _mean(2 * self.n_correct[present] / (self.n + self.n_predicted)[present])

    @property
    def micro_f1(self) -> float | None:
        """F1 over all classes together; None without any true or predicted label."""
        pairs = float(self.n.sum() + self.n_predicted.sum())
        return 2 * float(self.n_correct.sum()) / pairs if pairs else None


def _sums(labels: Ints, count: Ints, n_classes: int) -> Ints:
    return np.bincount(labels, weights=count, minlength=n_classes).astype(np.int64)


def _class_scores(
    classes: tuple[str, ...], counts: _Counts, n_train: Mapping[str, int] | None
) -> tuple[dict[str, ClassScores], dict[str, dict[str, Interval]]]:
    """Scores and their intervals by class name."""
    scores, intervals = {}, {}
    rows = zip(classes, counts.n.tolist(), counts.n_predicted.tolist(), counts.n_correct.tolist(), strict=True)
    for name, n, n_predicted, n_correct in rows:
        precision = n_correct / n_predicted if n_predicted else None
        recall, f1 = (n_correct / n, 2 * n_correct / (n + n_predicted)) if n else (None, None)
        scores[name] = ClassScores(None if n_train is None else int(n_train.get(name, 0)), n, precision, recall, f1)
        intervals[name] = {} if precision is None else {"precision": wilson(precision, n_predicted)}
        if recall is not None:
            intervals[name] |= {"recall": wilson(recall, n), "f1": f1_interval(n_correct, n, n_predicted)}
    return scores, intervals


def positive_scores(known: Predictions) -> tuple[Bools, NDArray[np.float64]]:
    """For two classes: which images are positive, and the score of each.

    The score is the difference of logits, because confident probabilities round to 1 and would tie.
    """
    logits, positive = known.logits.astype(np.float64), known.task.positive
    return np.asarray(known.labels == positive), logits[:, positive] - logits[:, 1 - positive]


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def rank_correlation(first: ArrayLike, second: ArrayLike, seed: int = 0) -> tuple[float, float] | None:
    """Spearman's rank correlation of (N,) values, and its p-value (two-sided permutation test).

    None for fewer than three values, or if one is constant.
    """
    ranks = [mean_ranks(np.asarray(values)) for values in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    length = np.sqrt((a**2).sum() * (b**2).sum())
    if len(a) < 3 or not length:
        return None
    rng, seen = np.random.default_rng(seed), float(a @ b / length)
    by_chance = np.array([rng.permutation(a) @ b / length for _ in range(_PERMUTATIONS)])
    return seen, float(((np.abs(by_chance) >= abs(seen) - 1e-12).sum() + 1) / (_PERMUTATIONS + 1))
