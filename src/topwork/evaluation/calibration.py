"""Calibration: temperatures and thresholds, and the outcome of an image: label, ambiguous or unknown.

Everything is fitted on images that the head was not trained on (out-of-fold logits, or the valid part), ignoring images
with the label -1. ``curves`` measures the calibration error. Images that cannot be read have the outcome error (``export``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, exp, floor, log
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.errors import UsageError
from topwork.evaluation.intervals import lower_bound
from topwork.evaluation.predictions import ONE_LABEL, Floats, Ints, Predictions, Task
from topwork.evaluation.similarity import UnknownDetector
from topwork.text import percent

if TYPE_CHECKING:
    from topwork.models.classifier import Classifier

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
_MADE_UP_IMAGES = 0.5
_PRIOR_IMAGES = 10.0  # weight of the average class in the threshold of each class, as a number of images
_GRID = np.round(np.arange(0.02, 0.981, 0.01), 2)  # thresholds to try for several labels
_LARGEST_FIT_VALUES = 4_000_000  # maximum number of logits; one parameter needs far fewer


def fit_temperature(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Temperature scaling (Guo et al. 2017, arXiv 1706.04599): the temperature to divide logits by.

    Minimizes the summed cross-entropy. Ours adds half a pseudo-image whose true class is the runner-up: if all
    predictions are correct, cross-entropy alone is lowest at T = 0, which would mean certainty; with it, N correct
    images give an error probability of about 1/(2N).

    Args:
        logits: (N, C) held-out logits.
        labels: (N,) class indices, -1 is ignored; (N, C) probabilities of the classes; or (N, C) booleans for several
            labels, with a sigmoid for each pair of image and label.
        weights: (N,) weights of the images.

    Returns:
        T between 0.05 and 20; 1 if there is nothing to fit.
    """
    relative, weight = _relative_logits(np.asarray(logits), np.asarray(labels), weights)
    if len(relative) == 0 or relative.shape[1] < 2:
        return 1.0
    runner_up = np.partition(relative, -2, axis=1)[:, -2]
    low, high = log(LOWEST_TEMPERATURE), log(HIGHEST_TEMPERATURE)
    position = 0.0
    # Newton's method on the slope, inside a shrinking bracket.
    for _ in range(60):
        slope, curvature = _loss_slope(relative, weight, runner_up, position)
        if abs(slope) < 1e-9:
            break
        low, high = (position, high) if slope < 0 else (low, position)
        step = position - slope / curvature if curvature > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - position) < 1e-7:
            break
        position = following
    return exp(position)


def _relative_logits(
    scores: NDArray[Any], labels: NDArray[Any], weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits minus that of the true class (the mean, for probabilities), and weights, of the images used."""
    weight = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    stride = max(1, scores.size // _LARGEST_FIT_VALUES)
    scores, labels, weight = scores[::stride].astype(np.float64), labels[::stride], weight[::stride]
    if labels.dtype == np.bool_:  # present or absent: two classes, one with logit 0
        pairs = np.where(labels, -scores, scores).reshape(-1, 1)
        return np.concatenate([np.zeros_like(pairs), pairs], 1), np.repeat(weight, scores.shape[1])
    if labels.ndim == 2:
        return scores - (labels * scores).sum(1, keepdims=True), weight
    scores, truth = _labeled(scores, labels)
    return scores - scores[np.arange(len(truth)), truth][:, None], weight[labels >= 0]


def _loss_slope(
    relative: NDArray[np.float64], weight: NDArray[np.float64], runner_up: NDArray[np.float64], log_temperature: float
) -> tuple[float, float]:
    """First and second derivative of the loss of ``fit_temperature`` with respect to log T."""
    # With z = logits / T and p their softmax, z_y - E_p[z] and E_p[z] - z_y + Var_p[z] for the true class y; z_y is 0 here.
    scaled = relative * exp(-log_temperature)
    p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    mean = np.einsum("nc,nc->n", p, scaled)
    variance = np.einsum("nc,nc,nc->n", p, scaled, scaled) - mean**2
    made_up = _MADE_UP_IMAGES * (weight * (mean - runner_up * exp(-log_temperature))).mean()
    slope = -(weight * mean).sum() - made_up
    curvature = (weight * (mean + variance)).sum() + made_up + _MADE_UP_IMAGES * (weight * variance).mean()
    return float(slope), float(curvature)


def fit_conformal(probabilities: ArrayLike, labels: ArrayLike, coverage: float = 0.9) -> float | None:
    """The probability threshold of prediction sets with this coverage (conformal prediction).

    Split conformal prediction with the smallest average set size (Sadinle, Lei & Wasserman 2019, arXiv 1609.00451): the
    set contains every class with a probability of at least t, the k-th smallest probability of the true class on
    held-out images, k = floor((N + 1)(1 - coverage)). For images from the same distribution, the true class is in the
    set with a probability between ``coverage`` and, without ties, ``coverage + 1/(N + 1)``. The adaptive sets of arXiv
    2009.14193 always contain the top class and so cover 97% instead of 90% for a model with 97% accuracy. In return, a
    set may be empty: even the top class is not likely enough.

    Args:
        probabilities: (N, C) held-out probabilities.
        labels: (N,) their labels; -1 is ignored.
        coverage: Share of sets that should contain the true class, between 0 and 1.

    Returns:
        t; None if N is too small for this coverage, which needs 1 / (1 - coverage) - 1 images.

    Raises:
        UsageError: The coverage is not between 0 and 1.
    """
    _check_share("coverage", coverage)
    stated, truth = _labeled(probabilities, labels)
    own = np.sort(stated[np.arange(len(truth)), truth])
    k = floor((len(own) + 1) * (1 - coverage) + 1e-9)  # (9 + 1)(1 - 0.9) is 1, not 0.9999
    return float(own[k - 1]) if k > 0 else None


def fit_thresholds(probabilities: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """(C,) the threshold of each label with the highest F1 on held-out images, for several labels.

    The counts of the average class, with the weight of ``_PRIOR_IMAGES`` images, are added to those of each class,
    because few images do not determine a threshold. If a range is optimal, its middle is used. (The optimal threshold
    is half of the best F1: Lipton et al. 2014, arXiv 1402.1892.)

    Args:
        probabilities: (N, C) held-out calibrated probabilities.
        truth: (N, C) which labels each image has.
    """
    stated, has = np.asarray(probabilities, np.float64), np.asarray(truth, np.bool_)
    given = np.stack([(stated >= threshold).sum(0) for threshold in _GRID]).astype(np.float64)
    both = np.stack([((stated >= threshold) & has).sum(0) for threshold in _GRID]).astype(np.float64)
    n_has = has.sum(0).astype(np.float64)
    scale = _PRIOR_IMAGES / max(float(n_has.sum()), 1.0)
    given += scale * given.sum(1, keepdims=True)
    both += scale * both.sum(1, keepdims=True)
    f1 = 2 * both / (n_has + _PRIOR_IMAGES + given)
    best = f1 >= f1.max(0) - 1e-9
    first, last = best.argmax(0), len(_GRID) - 1 - best[::-1].argmax(0)
    return np.asarray((_GRID[first] + _GRID[last]) / 2)


def target_precision_threshold(
    probabilities: ArrayLike, labels: ArrayLike, precision: float, *, cautious: bool = False
) -> float | None:
    """The lowest confidence threshold at which held-out predictions have the target precision.

    The smallest threshold that meets the target is selected on held-out images, so the precision on new images is below
    the target about half of the time, by about its standard error. With ``cautious``, the one-sided 95% lower limit
    (Wilson) of the precision must meet the target; for 95% that takes at least 52 correct predictions.

    Args:
        probabilities: (N, C) held-out calibrated probabilities.
        precision: Target share of correct predictions, between 0 and 1.
        cautious: Apply the target to the lower limit.

    Returns:
        The threshold (answer if confidence >= threshold), 0 if no threshold is needed, or None if none is sufficient.

    Raises:
        UsageError: The precision is not between 0 and 1.
    """
    _check_share("precision", precision)
    stated, truth = _labeled(probabilities, labels)
    if len(truth) == 0:
        return None
    confidence = stated.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    confidence, right = confidence[order], (stated.argmax(axis=1) == truth)[order]
    last_of_ties = np.flatnonzero(np.append(np.diff(confidence) != 0, True))
    n_answered = last_of_ties + 1
    reached = np.cumsum(right)[last_of_ties] / n_answered
    if cautious:
        reached = lower_bound(reached, n_answered)
    good = np.flatnonzero(reached >= precision)
    if len(good) == 0:
        return None
    return 0.0 if good[-1] == len(last_of_ties) - 1 else float(confidence[last_of_ties[good[-1]]])


def _labeled(values: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    """The rows whose true class is known, and their labels."""
    table, truth = np.asarray(values), np.asarray(labels, dtype=np.int64)
    if table.ndim != 2 or len(table) != len(truth):
        raise ValueError(f"values of shape {table.shape} do not match {len(truth)} labels")
    known = truth >= 0
    return (table, truth) if known.all() else (table[known], truth[known])


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise UsageError(f"{name} must be between 0 and 1, such as 0.9; got {share}")


# ---- decisions


class Decision(StrEnum):
    """The three possible outcomes of a readable image."""

    LABEL = "label"
    AMBIGUOUS = "ambiguous"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Thresholds:
    """The decision rule of a model; None switches a rule off.

    Attributes:
        unknown: An unknown score above this means unknown (``UnknownDetector.threshold``).
        confidence: A confidence below this means ambiguous (``target_precision_threshold``).
        set_probability: Classes with at least this probability form the prediction set (``fit_conformal``); any number
            of classes other than one means ambiguous.
        task: One label or several, with their thresholds.
        none_is_an_answer: With several labels, an image may have none; otherwise no label means ambiguous.
    """

    unknown: float | None = None
    confidence: float | None = None
    set_probability: float | None = None
    task: Task = field(default=ONE_LABEL)
    none_is_an_answer: bool = False

    @staticmethod
    def of(classifier: Classifier) -> Thresholds:
        """The rule stored in a model."""
        stored = classifier.thresholds
        values = {key: stored.get(key) for key in ("unknown", "confidence", "set_probability")}
        return Thresholds(**values, task=Task.of(classifier), none_is_an_answer=bool(stored.get("none_is_an_answer")))


def unknown_detector(classifier: Classifier) -> UnknownDetector | None:
    """The detector stored in a model, if any."""
    stored, centers = classifier.thresholds, classifier.arrays.get("unknown_centres")
    if centers is None or stored.get("unknown") is None:
        return None
    return UnknownDetector(centers, float(stored["unknown"]), float(stored["unknown_false_alarm_rate"]))


def decide(probabilities: ArrayLike, unknown_scores: ArrayLike | None, thresholds: Thresholds) -> NDArray[np.str_]:
    """The outcome of each image.

    Unknown takes precedence over ambiguous: an image unlike all classes is unknown even if the head is confident,
    because its probabilities must sum to 100% over its classes.

    Args:
        probabilities: (N, C) calibrated probabilities.
        unknown_scores: (N,) higher = more unknown, or None without a detector.

    Returns:
        (N,) strings: the values of ``Decision``.
    """
    stated = np.asarray(probabilities)
    ambiguous = np.zeros(len(stated), dtype=np.bool_)
    if thresholds.task.multi_label:
        ambiguous |= ~thresholds.task.given(stated).any(axis=1) & np.bool_(not thresholds.none_is_an_answer)
    if thresholds.confidence is not None:
        ambiguous |= stated.max(axis=1) < thresholds.confidence
    if thresholds.set_probability is not None:
        ambiguous |= (stated >= thresholds.set_probability).sum(axis=1) != 1
    decisions = np.where(ambiguous, Decision.AMBIGUOUS.value, Decision.LABEL.value)
    if unknown_scores is not None and thresholds.unknown is not None:
        decisions = np.where(np.asarray(unknown_scores) > thresholds.unknown, Decision.UNKNOWN.value, decisions)
    return decisions


def count_outcomes(
    classifier: Classifier, predictions: Predictions, features: ArrayLike
) -> tuple[NDArray[np.str_], dict[str, int]]:
    """The outcomes of a model, and the count of each; ``features`` are (N, D), the last ones of the images."""
    detector = unknown_detector(classifier)
    scores = None if detector is None else detector.score(features)
    answers = decide(predictions.probabilities, scores, Thresholds.of(classifier))
    return answers, {kind.value: int((answers == kind.value).sum()) for kind in Decision}


def fit_ambiguous(
    probabilities: ArrayLike, labels: ArrayLike, coverage: float, target_precision: float | None = None
) -> dict[str, Any]:
    """The thresholds between label and ambiguous, from held-out predictions, with their targets, as stored in a model.

    With a target precision only the confidence decides: by the cautious threshold (its lower limit meets the target),
    or the plain one if there are too few images. With too few images for the coverage, nothing is ambiguous;
    ``set_needs`` is the number required.

    Args:
        probabilities: (N, C) held-out calibrated probabilities.
        labels: (N,) their labels.
        coverage: share of prediction sets that should contain the true class.
        target_precision: share of correct labels among those given; None to use prediction sets.

    Raises:
        UsageError: a share is not between 0 and 1.
    """
    if target_precision is None:
        found = fit_conformal(probabilities, labels, coverage)
        if found is None:
            needed = ceil(1 / (1 - coverage) - 1 - 1e-9)
            return {"set_probability": None, "set_coverage": None, "confidence": None, "set_needs": needed}
        # A class more likely than all others together is never excluded; a lower threshold only increases the coverage.
        return {"set_probability": min(0.5, found), "set_coverage": coverage, "confidence": None}
    cautious = target_precision_threshold(probabilities, labels, target_precision, cautious=True)
    plain = target_precision_threshold(probabilities, labels, target_precision)
    found = cautious if cautious is not None else plain
    return {
        "set_probability": None,
        "set_coverage": None,
        "confidence": 1.0 if found is None else found,  # unattainable: only certainty would be sufficient
        "target_precision": target_precision,
        "target_precision_met": "surely" if cautious is not None else "about" if plain is not None else "no",
    }


def fit_positive(
    probabilities: ArrayLike, labels: ArrayLike, positive: int, *, recall: float | None, miss_cost: float | None
) -> tuple[float, str]:
    """The threshold of the positive class, and how it was chosen.

    By cost: if a missed positive costs ``miss_cost`` times as much as a false alarm, the expected cost is lowest with
    the threshold 1 / (1 + miss_cost) (Elkan 2001, "The foundations of cost-sensitive learning", eq. 2). By recall: the
    highest threshold that this share of the held-out positives reaches, corrected as in ``fit_conformal`` to hold for
    new images; with too few of them, the lowest probability.

    Args:
        probabilities: (N, 2) held-out calibrated probabilities.
        labels: (N,) their labels.
        positive: the label of the positive class.
        recall: target recall, between 0 and 1; or
        miss_cost: above 0; with neither, the more probable class is predicted.
    """
    if miss_cost is not None:
        return 1 / (1 + miss_cost), f"a miss costs {miss_cost:g} times as much as a false alarm"
    if recall is None:
        return 0.5, "the more probable class"
    own = np.sort(np.asarray(probabilities)[np.asarray(labels) == positive, positive])
    if not len(own):
        return 0.5, "the more probable class (no held-out images of the positive class)"
    k = floor((len(own) + 1) * (1 - recall) + 1e-9)
    threshold = min(max(float(own[max(k, 1) - 1]), 1e-6), 1 - 1e-6)
    few = "" if k >= 1 else f", but {len(own)} images are too few to guarantee it"
    return threshold, f"recall of at least {percent(recall)}{few}"


def outcome_sentence(outcomes: Mapping[str, int] | None) -> str:
    """A sentence on the fraction of ambiguous and unknown images; empty if there are none.

    Args:
        outcomes: number of images by ``Decision``.
    """
    n = sum(outcomes.values()) if outcomes else 0
    if not n or outcomes is None or outcomes[Decision.LABEL] == n:
        return ""
    ambiguous, unknown = (percent(outcomes[kind] / n) for kind in (Decision.AMBIGUOUS, Decision.UNKNOWN))
    return f"Abstains on {ambiguous} of the images as ambiguous and on {unknown} as unknown."


def too_few_sentence(thresholds: Mapping[str, Any]) -> str | None:
    """A sentence if there were too few images to calibrate the coverage; None otherwise.

    Args:
        thresholds: as a model stores them.
    """
    needed = thresholds.get("set_needs")
    if needed is None:
        return None
    return (
        f"Too few images to calibrate ambiguous answers (at least {needed} are needed), so every image of a known class gets a "
        "label."
    )
