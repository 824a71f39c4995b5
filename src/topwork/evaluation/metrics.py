"""How good the answers are: in go predictions, out come numbers with 95 % intervals.

``evaluate_part`` gives everything that ``evaluation.json`` holds about one part of a split; the other functions give
the mistakes to look at. Images whose true class the model does not have (label -1) are counted and left
out of every number. A number that cannot be measured is None, never NaN.

Not here: the intervals themselves (``intervals``), curves and calibration error (``curves``), several labels per
image (``multilabel``), comparing two models (``compare``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.errors import UsageError
from topwork.evaluation.curves import (
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
    macro_f1_interval,
    mean_interval,
    wilson,
)
from topwork.evaluation.predictions import Bools, Ints, Predictions

TOP_K = 5
LARGEST_DENSE_CONFUSION = 2_000
"""With more classes than this the confusion matrix is kept as its cells only: 10,000 classes would take 800 MB."""


@dataclass(frozen=True)
class ClassScores:
    """The scores of one class; None where there is nothing to measure.

    ``precision`` needs an image that was given the class, ``recall`` and ``f1`` an image that is of the class.
    """

    n_train: int | None
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, eq=False)
class PartEvaluation:
    """Everything measured on one part (valid or test) of a split.

    Attributes:
        n: Images behind the numbers.
        n_unknown_class: Images left out because their true class is not one of the model's.
        accuracy: Share of right answers.
        accuracy_interval: Its Wilson interval.
        balanced_accuracy: Mean recall of the classes present in the part.
        top5_accuracy: Share of images with the true class among the best five (all, where there are fewer).
        cross_entropy: Mean of -log(probability of the true class), in nats.
        ece: Expected calibration error, see ``calibration_error``.
        macro_f1: Mean F1 of the classes present in the part.
        per_class: Scores by class name, in the order of ``classes``.
        confusion_cells: (M, 3) true label, predicted label, count, where the count is not 0.
        classes: The C class names.
        roc_auc: Area under the ROC curve; two classes only, the second being the positive one.
        average_precision: Area under the steps of the precision-recall curve, likewise.
        intervals: 95 % intervals of the numbers beside accuracy, by name.
        class_intervals: 95 % intervals of precision, recall and F1 by class name, where they were measured.
    """

    n: int
    n_unknown_class: int
    accuracy: float | None
    accuracy_interval: Interval | None
    balanced_accuracy: float | None
    top5_accuracy: float | None
    cross_entropy: float | None
    ece: float | None
    macro_f1: float | None
    per_class: dict[str, ClassScores]
    confusion_cells: Ints
    classes: tuple[str, ...]
    roc_auc: float | None
    average_precision: float | None
    intervals: dict[str, Interval]
    class_intervals: dict[str, dict[str, Interval]]

    @property
    def confusion(self) -> Ints:
        """(C, C) confusion matrix, rows true, columns predicted."""
        matrix = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        matrix[self.confusion_cells[:, 0], self.confusion_cells[:, 1]] = self.confusion_cells[:, 2]
        return matrix

    def most_confused(self, n: int) -> tuple[Confusion, ...]:
        """The ``n`` most frequent mistakes, as ``most_confused``, for any number of classes."""
        return _most_confused(self.confusion_cells, self.classes, n)

    def as_dict(self) -> dict[str, Any]:
        """The part as ``evaluation.json`` holds it: plain values, None where nothing was measured.

        With more than 2,000 classes ``confusion`` is None and ``confusion_cells`` holds its [true, predicted, count].
        """
        accuracy = {"value": self.accuracy, "low": None, "high": None}
        if self.accuracy_interval is not None:
            accuracy |= self.accuracy_interval.as_dict()
        part: dict[str, Any] = {
            "n": self.n,
            "n_unknown_class": self.n_unknown_class,
            "accuracy": accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "top5_accuracy": self.top5_accuracy,
            "cross_entropy": self.cross_entropy,
            "ece": self.ece,
            "macro_f1": self.macro_f1,
            "per_class": {name: asdict(scores) for name, scores in self.per_class.items()},
            "classes": list(self.classes),
            "intervals": {name: interval.as_dict() for name, interval in self.intervals.items()},
            "per_class_intervals": {
                name: {key: interval.as_dict() for key, interval in found.items()}
                for name, found in self.class_intervals.items()
            },
        }
        if len(self.classes) == 2:
            part |= {"roc_auc": self.roc_auc, "average_precision": self.average_precision}
        is_dense = len(self.classes) <= LARGEST_DENSE_CONFUSION
        part["confusion"] = self.confusion.tolist() if is_dense else None
        if not is_dense:
            part["confusion_cells"] = self.confusion_cells.tolist()
        return part


def evaluate_part(
    predictions: Predictions, n_train: Mapping[str, int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> PartEvaluation:
    """Measure one part of a split.

    Args:
        predictions: The model's answers, with calibrated logits where the probabilities are to count.
        n_train: Training images by class name, if known; a class that is not named had none.
        n_resamples: Resamples behind the interval of the calibration error; the other intervals need none.
            0 leaves that interval out.
        seed: Of those resamples.
    """
    known = predictions.labeled()
    cells = _confusion_cells(known)
    counts = _Counts.of(cells, known.n_classes)
    present = counts.n > 0
    areas = _areas_of(known)
    has_any = len(known) > 0
    return PartEvaluation(
        n=len(known),
        n_unknown_class=len(predictions) - len(known),
        accuracy=_mean(known.correct),
        accuracy_interval=wilson(float(known.correct.mean()), len(known)) if has_any else None,
        balanced_accuracy=_mean(counts.n_correct[present] / counts.n[present]),
        top5_accuracy=_mean(known.rank < TOP_K),
        cross_entropy=_mean(known.loss),
        ece=calibration_error(known.confidence, known.correct),
        macro_f1=_mean(counts.f1[present]),
        per_class=_per_class(known.classes, counts, n_train),
        confusion_cells=cells,
        classes=known.classes,
        roc_auc=areas[0],
        average_precision=areas[1],
        intervals=_intervals(known, cells, counts, areas, n_resamples, seed) if has_any else {},
        class_intervals=_class_intervals(known.classes, counts),
    )


@dataclass(frozen=True, eq=False)
class _Counts:
    """(C,) images per class: of it, given it, and both."""

    n: Ints
    n_predicted: Ints
    n_correct: Ints

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
    def f1(self) -> NDArray[np.float64]:
        """(C,) F1; 0 where the class is absent and was given to no image."""
        return np.asarray(2 * self.n_correct / np.maximum(self.n + self.n_predicted, 1))


def _sums(labels: Ints, count: Ints, n_classes: int) -> Ints:
    return np.bincount(labels, weights=count, minlength=n_classes).astype(np.int64)


def _confusion_cells(predictions: Predictions) -> Ints:
    # By pairs that occur and not by matrix, so that the cost depends on the images and not on the classes squared.
    pairs, count = np.unique(predictions.labels * predictions.n_classes + predictions.predicted, return_counts=True)
    return np.stack([pairs // predictions.n_classes, pairs % predictions.n_classes, count], axis=1).astype(np.int64)


def _per_class(classes: tuple[str, ...], counts: _Counts, n_train: Mapping[str, int] | None) -> dict[str, ClassScores]:
    scores = {}
    rows = zip(classes, counts.n.tolist(), counts.n_predicted.tolist(), counts.n_correct.tolist(), strict=True)
    for name, n, n_predicted, n_correct in rows:
        scores[name] = ClassScores(
            n_train=None if n_train is None else int(n_train.get(name, 0)),
            n=n,
            precision=n_correct / n_predicted if n_predicted else None,
            recall=n_correct / n if n else None,
            f1=2 * n_correct / (n + n_predicted) if n else None,
        )
    return scores


def _intervals(
    known: Predictions,
    cells: Ints,
    counts: _Counts,
    areas: tuple[float | None, float | None],
    n_resamples: int,
    seed: int,
) -> dict[str, Interval]:
    present = counts.n > 0
    intervals = {
        "balanced_accuracy": balanced_accuracy_interval(counts.n_correct[present], counts.n[present]),
        "top5_accuracy": wilson(float((known.rank < TOP_K).mean()), len(known)),
        "macro_f1": macro_f1_interval(cells, counts.n_correct, counts.n, counts.n_predicted),
    }
    if n_resamples > 0:
        intervals["ece"] = calibration_error_interval(known.confidence, known.correct, n_resamples, seed)
    entropy = mean_interval(known.loss)
    if entropy is not None:  # a single image has no spread
        intervals["cross_entropy"] = Interval(max(0.0, entropy.low), entropy.high)
    if areas[0] is not None:
        intervals["roc_auc"] = auc_interval(areas[0], int(counts.n[1]), int(counts.n[0]))
    if areas[1] is not None:
        intervals["average_precision"] = average_precision_interval(areas[1], int(counts.n[1]))
    return intervals


def _class_intervals(classes: tuple[str, ...], counts: _Counts) -> dict[str, dict[str, Interval]]:
    found: dict[str, dict[str, Interval]] = {}
    rows = zip(classes, counts.n.tolist(), counts.n_predicted.tolist(), counts.n_correct.tolist(), strict=True)
    for name, n, n_predicted, n_correct in rows:
        measured = {}
        if n_predicted:
            measured["precision"] = wilson(n_correct / n_predicted, n_predicted)
        if n:
            measured |= {"recall": wilson(n_correct / n, n), "f1": f1_interval(n_correct, n, n_predicted)}
        found[name] = measured
    return found


def positive_scores(known: Predictions) -> tuple[Bools, NDArray[np.float64]]:
    """Of two classes: which images are of the second, and how far each is on its side.

    The score is the difference of logits and not the probability: confident probabilities round to 1 and would tie.
    """
    logits = known.logits.astype(np.float64)
    return np.asarray(known.labels == 1), logits[:, 1] - logits[:, 0]


def _areas_of(known: Predictions) -> tuple[float | None, float | None]:
    """Areas under the ROC and the precision-recall curve, of two classes."""
    if known.n_classes != 2:
        return None, None
    is_positive, scores = positive_scores(known)
    area, drawn = roc_auc(is_positive, scores), precision_recall_curve(is_positive, scores)
    return area, drawn.average_precision if drawn and area is not None else None


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


@dataclass(frozen=True)
class Confusion:
    """One kind of mistake: images of class ``true`` called ``predicted``, and their share of all images of ``true``."""

    true: str
    predicted: str
    count: int
    fraction: float


@dataclass(frozen=True)
class TopLoss:
    """One image that the model finds least likely to be what it is.

    ``position`` is its row in the predictions, ``sample_index`` its row in the manifest.
    """

    position: int
    sample_index: int
    true: str
    predicted: str
    confidence: float
    loss: float


@dataclass(frozen=True)
class ClassSizeEffect:
    """How the accuracy of a class goes with its training images.

    Attributes:
        names: The classes with images in the part.
        n_train: Training images of each.
        accuracy: Share of right answers of each, with ``accuracy_intervals``.
        rank_correlation: Spearman's, between the two; None with fewer than three classes or where one of them does
            not vary.
        p_value: Chance of a correlation this far from 0 if the two were unrelated (two-sided permutation test).
    """

    names: tuple[str, ...]
    n_train: tuple[int, ...]
    accuracy: tuple[float, ...]
    accuracy_intervals: tuple[Interval, ...]
    rank_correlation: float | None
    p_value: float | None


def most_confused(confusion: Ints, classes: Sequence[str], n: int) -> tuple[Confusion, ...]:
    """The ``n`` most frequent mistakes, most frequent first, then by share of the true class.

    Args:
        confusion: (C, C) counts, rows true, columns predicted.
        classes: The C class names.
        n: How many to give at most.
    """
    true, predicted = np.nonzero(confusion)
    return _most_confused(np.stack([true, predicted, confusion[true, predicted]], axis=1), classes, n)


def _most_confused(cells: Ints, classes: Sequence[str], n: int) -> tuple[Confusion, ...]:
    per_class = _sums(cells[:, 0], cells[:, 2], len(classes))
    wrong = cells[cells[:, 0] != cells[:, 1]]
    fraction = wrong[:, 2] / per_class[wrong[:, 0]]
    order = np.lexsort((-fraction, -wrong[:, 2]))[:n]
    return tuple(
        Confusion(classes[wrong[i, 0]], classes[wrong[i, 1]], int(wrong[i, 2]), float(fraction[i])) for i in order
    )


def top_losses(predictions: Predictions, n: int) -> tuple[TopLoss, ...]:
    """The ``n`` labeled images with the highest loss, highest first."""
    positions = np.flatnonzero(predictions.labels >= 0)
    positions = positions[np.argsort(-predictions.loss[positions], kind="stable")[:n]]
    return tuple(
        TopLoss(
            position=int(i),
            sample_index=int(predictions.sample_indices[i]),
            true=predictions.classes[predictions.labels[i]],
            predicted=predictions.classes[predictions.predicted[i]],
            confidence=float(predictions.confidence[i]),
            loss=float(predictions.loss[i]),
        )
        for i in positions
    )


def accuracy_by_class_size(evaluation: PartEvaluation, n_permutations: int = 2000, seed: int = 0) -> ClassSizeEffect:
    """Relate the accuracy of each class to its number of training images; the evaluation must know ``n_train``.

    Raises:
        UsageError: The evaluation was made without ``n_train``.
    """
    rows = [(name, s.n_train, s.recall, s.n) for name, s in evaluation.per_class.items() if s.recall is not None]
    if any(n_train is None for _, n_train, _, _ in rows):
        raise UsageError("accuracy by class size needs the number of training images per class (n_train)")
    sizes = tuple(n_train or 0 for _, n_train, _, _ in rows)
    accuracy = tuple(recall for _, _, recall, _ in rows)
    correlation, p_value = _spearman(np.array(sizes), np.array(accuracy), n_permutations, seed)
    return ClassSizeEffect(
        names=tuple(name for name, _, _, _ in rows),
        n_train=sizes,
        accuracy=accuracy,
        accuracy_intervals=tuple(wilson(recall, n) for _, _, recall, n in rows),
        rank_correlation=correlation,
        p_value=p_value,
    )


def _spearman(
    first: NDArray[Any], second: NDArray[Any], n_permutations: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """Spearman's rank correlation and its p-value by permutation; (None, None) where it is not defined."""
    if len(first) < 3 or (first == first[0]).all() or (second == second[0]).all():
        return None, None
    a, b = (ranks - ranks.mean() for ranks in (mean_ranks(first), mean_ranks(second)))
    a, b = a / np.sqrt((a**2).sum()), b / np.sqrt((b**2).sum())
    seen = float(a @ b)
    rng = np.random.default_rng(seed)
    by_chance = np.array([rng.permutation(a) @ b for _ in range(n_permutations)])
    n_as_far = int((np.abs(by_chance) >= abs(seen) - 1e-12).sum())
    return seen, (n_as_far + 1) / (n_permutations + 1)
