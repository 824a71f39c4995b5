"""The outcome of an image: label, ambiguous or unknown, from probabilities and unknown scores.

The thresholds come from ``calibration`` and ``unknown``. Images that cannot be read have the outcome error
(``export``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.evaluation.calibration import fit_conformal, prediction_sets, target_precision_threshold
from topwork.evaluation.predictions import ONE_LABEL, Predictions, Task
from topwork.evaluation.unknown import UnknownDetector
from topwork.text import percent

if TYPE_CHECKING:
    from topwork.models.classifier import Classifier


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
    return UnknownDetector(centers, float(stored["unknown"]), float(stored["unknown_false_alarm_rate"]), 0)


def decide(probabilities: ArrayLike, unknown_scores: ArrayLike | None, thresholds: Thresholds) -> NDArray[np.str_]:
    """The outcome of each image.

    Unknown takes precedence over ambiguous: an image unlike all classes is unknown even if the head is confident,
    because its probabilities must sum to 100% over its classes.

    Args:
        probabilities: (N, C) calibrated probabilities.
        unknown_scores: (N,) higher = more unknown, or None without a detector.
        thresholds: The decision rule.

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
        ambiguous |= prediction_sets(stated, thresholds.set_probability).sum(axis=1) != 1
    decisions = np.where(ambiguous, Decision.AMBIGUOUS.value, Decision.LABEL.value)
    if unknown_scores is not None and thresholds.unknown is not None:
        decisions = np.where(np.asarray(unknown_scores) > thresholds.unknown, Decision.UNKNOWN.value, decisions)
    return decisions


def count_outcomes(
    classifier: Classifier, predictions: Predictions, features: ArrayLike | None
) -> tuple[NDArray[np.str_], dict[str, int]]:
    """The outcomes of a model, and the count of each.

    Args:
        features: (N, D) last features of the images, to detect unknown images; None to skip that.
    """
    detector = unknown_detector(classifier)
    scores = None if detector is None or features is None else detector.score(features)
    limits = Thresholds.of(classifier)
    answers = np.concatenate(
        [
            decide(predictions.probabilities[rows], None if scores is None else scores[rows], limits)
            for rows in predictions.blocks()
        ]
    )
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
