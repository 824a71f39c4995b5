"""Answers where an image may have any number of labels: from logits to sets of labels, and the numbers behind them.

In: (N, C) logits of one class against the rest each. Out: :class:`LabelPredictions`, the temperature and the threshold of
each class, and what is answered for an image. How good the answers are is ``multilabel``; one label an image is
``predictions``, ``calibration`` and ``decisions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.samples import LABEL_SEPARATOR
from topwork.evaluation.decisions import Decision
from topwork.evaluation.predictions import Bools, Ints

PRIOR_IMAGES = 10.0  # images with the label whose weight the average class has in the threshold of each class
GRID = np.round(np.arange(0.02, 0.981, 0.01), 2)  # thresholds that are tried


@dataclass(frozen=True, eq=False)
class LabelPredictions:
    """What a model answers for N images that may each have several of C labels.

    Attributes:
        classes: the C class names.
        sample_indices: (N,) rows of the manifest.
        truth: (N, C) which labels each image has.
        logits: (N, C) calibrated: probabilities are their sigmoid.
        thresholds: (C,) a label is given from this probability on.
    """

    classes: tuple[str, ...]
    sample_indices: Ints
    truth: Bools
    logits: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """(N, C), each 0 to 1 on its own."""
        return sigmoid(self.logits)

    @property
    def given(self) -> Bools:
        """(N, C) the labels that are given."""
        return np.asarray(self.probabilities >= self.thresholds)

    @property
    def correct(self) -> Bools:
        """(N,) every label right."""
        return np.asarray((self.given == self.truth).all(axis=1))

    def take(self, chosen: Bools) -> LabelPredictions:
        """The answers for some of the images."""
        rows = self.sample_indices[chosen]
        return LabelPredictions(self.classes, rows, self.truth[chosen], self.logits[chosen], self.thresholds)

    @property
    def answers(self) -> list[str]:
        """The labels given to each image, joined as in tables."""
        return [join_names(self.classes, row) for row in self.given]

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,) probability of the least probable label that is given; of the most probable class where none is."""
        stated = self.probabilities
        least = np.where(self.given, stated, np.inf).min(axis=1, initial=np.inf)
        return np.asarray(np.where(self.given.any(axis=1), least, stated.max(axis=1, initial=0.0)))


def join_names(classes: Sequence[str], chosen: Bools) -> str:
    """The class names where ``chosen`` (C,) is true, joined by ``|``."""
    return LABEL_SEPARATOR.join(classes[number] for number in np.flatnonzero(chosen).tolist())


def sigmoid(logits: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64))))


def label_sets_decision(
    probabilities: NDArray[np.float64],
    thresholds: NDArray[np.float64],
    unknown_scores: ArrayLike | None,
    unknown_threshold: float | None,
    none_is_an_answer: bool,
) -> NDArray[np.str_]:
    """(N,) ``label``, ``ambiguous`` (no label reaches its threshold, and none is no answer) or ``unknown``.

    Args:
        none_is_an_answer: training had images without any label.
    """
    nothing = ~(probabilities >= thresholds).any(axis=1) & (not none_is_an_answer)
    decisions = np.where(nothing, Decision.AMBIGUOUS.value, Decision.LABEL.value)
    if unknown_scores is not None and unknown_threshold is not None:
        decisions = np.where(np.asarray(unknown_scores) > unknown_threshold, Decision.UNKNOWN.value, decisions)
    return decisions


# ---- fitted on held-out logits


def fit_label_thresholds(probabilities: ArrayLike, truth: ArrayLike) -> NDArray[np.float64]:
    """(C,) the threshold of each class with the highest F1 on held-out answers.

    A class with few images cannot tell its best threshold from luck, so that the counts of the average class, with the
    weight of ``PRIOR_IMAGES`` images, are added to its own. Where the best of all thresholds is a range, its middle.
    (That the best threshold for F1 is half of the best F1 and seldom one half: Lipton et al. 2014, 1402.1892.)

    Args:
        probabilities: (N, C) held-out calibrated probabilities.
        truth: (N, C) which labels each image has.
    """
    stated, has = np.asarray(probabilities, np.float64), np.asarray(truth, np.bool_)
    n_classes = stated.shape[1]
    given = np.empty((len(GRID), n_classes))
    both = np.empty((len(GRID), n_classes))
    for row, threshold in enumerate(GRID):
        above = stated >= threshold
        given[row], both[row] = above.sum(0), (above & has).sum(0)
    n_has = has.sum(0).astype(np.float64)
    scale = PRIOR_IMAGES / max(float(n_has.sum()), 1.0)
    given += scale * given.sum(1, keepdims=True)
    both += scale * both.sum(1, keepdims=True)
    f1 = 2 * both / (n_has + PRIOR_IMAGES + given)
    best = f1 >= f1.max(0) - 1e-9
    first, last = best.argmax(0), len(GRID) - 1 - best[::-1].argmax(0)
    return np.asarray((GRID[first] + GRID[last]) / 2)
