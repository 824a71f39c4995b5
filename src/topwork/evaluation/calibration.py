"""Calibration: temperatures and thresholds from held-out logits or probabilities and labels.

Everything here is fitted on images that the head was not trained on (out-of-fold logits, or the valid part), ignoring
images with the label -1. ``curves`` measures the calibration error; ``decisions`` applies the thresholds.
"""

from __future__ import annotations

from math import exp, floor, log
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.errors import UsageError
from topwork.evaluation.intervals import lower_bound
from topwork.evaluation.predictions import Bools, Floats, Ints

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
    """First and second derivative of the loss of ``fit_temperature`` with respect to log T.

    With z = logits / T and p their softmax, for an image with true class y they are ``z_y - E_p[z]`` and ``E_p[z] - z_y
    + Var_p[z]``; in ``relative`` every z_y is 0.
    """
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


def prediction_sets(probabilities: ArrayLike, threshold: float, *, never_empty: bool = False) -> Bools:
    """(N, C) the classes in the prediction set of each image.

    Args:
        probabilities: (N, C).
        threshold: From ``fit_conformal``.
        never_empty: Add the top class to empty sets, which slightly increases the coverage.
    """
    stated = np.asarray(probabilities)
    sets = stated >= threshold
    if never_empty and len(stated):
        sets[np.arange(len(stated)), stated.argmax(axis=1)] = True
    return np.asarray(sets)


def target_precision_threshold(
    probabilities: ArrayLike, labels: ArrayLike, precision: float, *, cautious: bool = False
) -> float | None:
    """The lowest confidence threshold at which held-out predictions have the target precision.

    The smallest threshold that meets the target is selected on held-out images, so the precision on new images is below
    the target about half of the time, by about its standard error. With ``cautious``, the one-sided 95% lower limit
    (Wilson) of the precision must meet the target; for 95% that takes at least 52 correct predictions.

    Args:
        probabilities: (N, C) held-out calibrated probabilities.
        labels: (N,) their labels; -1 is left out.
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
