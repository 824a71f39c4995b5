"""Metrics of predictions, with 95% confidence intervals.

``METRICS`` is the table of all metrics, for one label per image and for several: evaluation, terminal, reports and help
read it, so a new metric is one entry. ``evaluate_part`` computes everything in ``evaluation.json`` about one part of a
split. Images whose true class the model does not have (label -1) are counted and excluded from all metrics. A metric
that cannot be computed is None, never NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topwork.evaluation.curves import (
    LabelRanking,
    calibration_error,
    calibration_error_interval,
    positive_scores,
    roc_auc,
    threshold_curve,
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
_RESAMPLES_OF_RANKINGS = 200  # only for the variance (``interval_from_variance``), so a few hundred are enough
Value = float | None


# ---- the table of metrics


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        key: Its name in ``evaluation.json``.
        hint: What it measures, in a few words.
        unit: ``percent`` for shares, ``number`` for other scores from 0 to 1, ``nats`` for losses.
        measure: Computes it and its 95% confidence interval, on at least one image; None if undefined.
        task: The kind of labels it is for; None for both.
        min_classes: Not shown with fewer classes than this.
        max_classes: Only measured with ``min_classes`` to this many classes.
    """

    key: str
    title: str
    hint: str
    unit: Literal["percent", "number", "nats"]
    measure: Callable[[Measured], tuple[Value, Interval | None]]
    task: Literal["softmax", "sigmoid"] | None = "softmax"
    min_classes: int = 0
    max_classes: int | None = None

    def applies(self, multi_label: bool, n_classes: int) -> bool:
        """Whether it applies to this kind of labels and this number of classes."""
        is_of_task = self.task is None or (self.task == "sigmoid") == multi_label
        return is_of_task and (self.max_classes is None or self.min_classes <= n_classes <= self.max_classes)

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
        true, predicted, n = self.cells.T
        right = true == predicted
        columns = ((true, n), (predicted, n), (true[right], n[right]))
        return _Counts(*(np.bincount(labels, k, known.n_classes).astype(np.int64) for labels, k in columns))

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
        for _ in range(min(self.n_resamples, _RESAMPLES_OF_RANKINGS)):
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

    def with_resampled(self, key: str, value: Value) -> tuple[Value, Interval | None]:
        """The value of one of these, with its interval."""
        if value is None or key not in self.resampled:
            return value, None
        return value, interval_from_variance(value, self.resampled[key], len(self.known))

    @cached_property
    def pairs(self) -> tuple[NDArray[np.float64], Bools]:
        """For several labels: probability of each (image, class) pair, and whether the image has the label."""
        stated, right = self.known.probabilities.ravel(), self.known.truth.ravel()
        order = np.lexsort((right, stated))  # sums must not depend on the order of the images
        return stated[order], right[order]


def _share(right: Bools) -> tuple[Value, Interval | None]:
    value = float(right.mean())
    return value, wilson(value, len(right))


def _accuracy(m: Measured) -> tuple[Value, Interval | None]:
    return _share(m.known.correct)


def _balanced_accuracy(m: Measured) -> tuple[Value, Interval | None]:
    present = m.counts.n > 0
    n_correct, n = m.counts.n_correct[present], m.counts.n[present]
    return float((n_correct / n).mean()), balanced_accuracy_interval(n_correct, n)


def _macro_f1(m: Measured) -> tuple[Value, Interval | None]:
    counts = m.counts
    if m.known.multi_label:
        return m.with_resampled("macro_f1", counts.macro_f1)
    return counts.macro_f1, macro_f1_interval(m.cells, counts.n_correct, counts.n, counts.n_predicted)


def _roc_auc(m: Measured) -> tuple[Value, Interval | None]:
    area, n_positive = roc_auc(*m.positive), int(m.positive[0].sum())
    return area, None if area is None else auc_interval(area, n_positive, len(m.known) - n_positive)


def _average_precision(m: Measured) -> tuple[Value, Interval | None]:
    curve = threshold_curve(*m.positive)
    if curve is None:
        return None, None
    return curve.average_precision, average_precision_interval(curve.average_precision, int(m.positive[0].sum()))


def _calibration_error(m: Measured) -> tuple[Value, Interval | None]:
    stated, right = m.known.confidence, m.known.correct
    has_interval = m.n_resamples > 0 and len(right) > 1
    interval = calibration_error_interval(stated, right, m.n_resamples, m.seed) if has_interval else None
    return calibration_error(stated, right), interval


def _cross_entropy(m: Measured) -> tuple[Value, Interval | None]:
    found = mean_interval(m.known.loss)  # a single image has no variance
    return float(m.known.loss.mean()), None if found is None else Interval(max(0.0, found.low), found.high)


def _hamming_loss(m: Measured) -> tuple[Value, Interval | None]:
    wrong = (m.known.truth != m.known.given).mean(axis=1)
    value, n = float(wrong.mean()), len(wrong)
    return value, interval_from_variance(value, float(wrong.var()) / n, n) if n > 1 else None


METRICS = (
    Metric("accuracy", "Accuracy", "fraction of correct answers", "percent", _accuracy),
    Metric("accuracy", "Exact match", "fraction of images with all labels correct", "percent", _accuracy, "sigmoid"),
    Metric(
        "balanced_accuracy", "Balanced accuracy", "mean recall over the classes, regardless of size", "percent",
        _balanced_accuracy,
    ),
    Metric(
        "top5_accuracy", "Top-5 accuracy", "the true class is among the top five", "percent",
        lambda m: _share(m.known.rank < TOP_K), min_classes=TOP_K + 1,
    ),
    Metric(
        "mean_average_precision", "Mean average precision", "quality of the ranking by each label, independent of thresholds",
        "percent",
        lambda m: m.with_resampled("mean_average_precision", _mean(m.average_precisions[m.counts.n > 0])), "sigmoid",
    ),
    Metric(
        "micro_f1", "Micro F1", "precision and recall combined, over all labels of all images", "percent",
        lambda m: m.with_resampled("micro_f1", m.counts.micro_f1), "sigmoid",
    ),
    Metric(
        "macro_f1", "Macro F1", "precision and recall combined, mean over the classes", "percent", _macro_f1, None,
    ),
    Metric(
        "roc_auc", "ROC AUC", "area under the ROC curve: 0.5 is chance, 1 is perfect", "number",
        _roc_auc, min_classes=2, max_classes=2,
    ),
    Metric(
        "average_precision", "Average precision", "area under the precision-recall curve", "number",
        _average_precision, min_classes=2, max_classes=2,
    ),
    Metric(
        "ece", "Calibration error", "mean gap between confidence and accuracy; lower is better", "percent",
        _calibration_error,
    ),
    Metric(
        "calibration_error", "Calibration error",
        "mean gap between predicted probability and observed frequency; lower is better", "percent",
        lambda m: (calibration_error(*m.pairs), None), "sigmoid",
    ),
    Metric(
        "cross_entropy", "Cross-entropy", "mean of −log(probability of the true class), in nats; lower is better",
        "nats", _cross_entropy,
    ),
    Metric(
        "hamming_loss", "Hamming loss", "fraction of wrong labels; lower is better", "percent", _hamming_loss, "sigmoid",
    ),
)  # fmt: skip
"""Every metric, in the order in which they are shown."""


# ---- one part of a split


def evaluate_part(
    predictions: Predictions, n_train: Mapping[str, int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Evaluates one part of a split (valid or test), as in ``evaluation.json``: plain values, None if undefined.

    With more than 2,000 classes ``confusion`` is None and ``confusion_cells`` holds its [true, predicted, count].

    Args:
        predictions: The predictions, with calibrated logits.
        n_train: Training images by class name, if known; 0 for missing classes.
        n_resamples: Resamples for the intervals that need them (calibration error; several labels: average precision
            and F1); 0 to omit them.
    """
    m = Measured(_sorted(predictions), n_resamples, seed)
    known, n_classes = m.known, m.known.n_classes
    metrics = [metric for metric in METRICS if metric.applies(known.multi_label, n_classes)]
    found = {metric.key: metric.measure(m) if len(known) else (None, None) for metric in metrics}
    values = {key: value for key, (value, _) in found.items()}
    intervals: dict[str, Any] = {
        key: interval.as_dict() for key, (_, interval) in found.items() if interval is not None
    }
    accuracy = {"value": values["accuracy"], **intervals.pop("accuracy", {"low": None, "high": None})}
    part: dict[str, Any] = {"multi_label": True} if known.multi_label else {}
    part |= {"n": len(known)}
    part |= {} if known.multi_label else {"n_unknown_class": len(predictions) - len(known)}
    part |= values | {"accuracy": accuracy, "intervals": intervals}
    part |= _class_scores(known.classes, m.counts, n_train) | {"classes": list(known.classes)}
    return part | (_several_labels(m, part["per_class"]) if known.multi_label else _one_label(m))


def _class_scores(
    classes: tuple[str, ...], counts: _Counts, n_train: Mapping[str, int] | None
) -> dict[str, dict[str, Any]]:
    """Scores and their intervals by class name: precision undefined without predictions, recall and F1 without images."""
    scores: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    rows = zip(classes, counts.n.tolist(), counts.n_predicted.tolist(), counts.n_correct.tolist(), strict=True)
    for name, n, n_predicted, n_correct in rows:
        scores[name] = {
            "n_train": None if n_train is None else int(n_train.get(name, 0)),
            "n": n,
            "precision": n_correct / n_predicted if n_predicted else None,
            "recall": n_correct / n if n else None,
            "f1": 2 * n_correct / (n + n_predicted) if n else None,
        }
        intervals[name] = {}
        if n_predicted:
            intervals[name]["precision"] = wilson(n_correct / n_predicted, n_predicted).as_dict()
        if n:
            intervals[name]["recall"] = wilson(n_correct / n, n).as_dict()
            intervals[name]["f1"] = f1_interval(n_correct, n, n_predicted).as_dict()
    return {"per_class": scores, "per_class_intervals": intervals}


def _one_label(m: Measured) -> dict[str, Any]:
    """The positive class of two, if there is one, and the confusion matrix: rows true, columns predicted."""
    task, n_classes = m.known.task, m.known.n_classes
    found = {} if task.thresholds is None else {"positive": _positive_facts(m)}
    if n_classes > LARGEST_DENSE_CONFUSION:
        return found | {"confusion": None, "confusion_cells": m.cells.tolist()}
    matrix = np.zeros((n_classes, n_classes), dtype=np.int64)
    matrix[m.cells[:, 0], m.cells[:, 1]] = m.cells[:, 2]
    return found | {"confusion": matrix.tolist()}


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


def _several_labels(m: Measured, per_class: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Labels per image; adds average precision and threshold to ``per_class``."""
    known, precision, limits = m.known, m.average_precisions, m.known.task.limits(m.known.n_classes)
    for i, scores in enumerate(per_class.values()):
        scores["average_precision"] = float(precision[i]) if m.counts.n[i] else None
        scores["threshold"] = round(float(limits[i]), 4)
    counts = {"n_labels_per_image": known.truth, "n_labels_given_per_image": known.given}
    return {key: round(float(labels.sum(1).mean()), 3) if len(known) else None for key, labels in counts.items()}


def _sorted(predictions: Predictions) -> Predictions:
    """For several labels, sorts the images, so that no metric depends on their order."""
    if not predictions.multi_label or not len(predictions):
        return predictions
    return predictions.take(np.lexsort(np.hstack([predictions.truth, predictions.probabilities]).T))


@dataclass(frozen=True, eq=False)
class _Counts:
    """(C,) images (or their weights) per class: of it, predicted as it, and both."""

    n: NDArray[Any]
    n_predicted: NDArray[Any]
    n_correct: NDArray[Any]

    @property
    def macro_f1(self) -> Value:
        """Mean F1 of the classes present."""
        present = self.n > 0
        return _mean(2 * self.n_correct[present] / (self.n + self.n_predicted)[present])

    @property
    def micro_f1(self) -> Value:
        """F1 over all classes together; None without any true or predicted label."""
        pairs = float(self.n.sum() + self.n_predicted.sum())
        return 2 * float(self.n_correct.sum()) / pairs if pairs else None


def _mean(values: NDArray[Any]) -> Value:
    return float(values.mean()) if len(values) else None


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
        found[name] = evaluate_part(part, n_train, seed=seed)
        is_leaked = np.isin(part.sample_indices, np.array(sorted(leaked), np.int64))
        if is_leaked.any():
            leaks[name] = {"n_leaked": int(is_leaked.sum())}
        clean = part.take(~is_leaked)
        if is_leaked.any() and len(clean.labeled()):
            found[f"{name}_without_leaks"] = evaluate_part(clean, n_train, seed=seed)
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
