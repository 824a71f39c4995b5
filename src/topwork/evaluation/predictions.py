"""What a model said about a set of images: in go its logits, out come probabilities, answers and losses per image.

The network runs once; everything in ``evaluation/`` works on these arrays. Not here: reading and writing them
(``run``), choosing the temperature (``calibration``), judging them (``metrics``).

Facts per image are worked out block by block, so that 10,000 images of 10,000 classes never need a second
array of the size of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.errors import UsageError

Floats: TypeAlias = NDArray[np.floating[Any]]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

UNKNOWN_CLASS = -1
"""The label of an image whose true class the model does not have, or that came without one."""

_BLOCK_VALUES = 4_000_000  # 32 MB of float64 at a time


@dataclass(frozen=True, eq=False)
class Predictions:
    """The logits of one model for N images, with what the images are.

    Attributes:
        classes: The C class names; label c means ``classes[c]``.
        sample_indices: (N,) row of each image in the manifest.
        labels: (N,) true label, or -1 where the class is unknown to the model or not given.
        logits: (N, C) finite scores; probabilities are their softmax. Divide by the temperature first to have
            calibrated ones.

    Raises:
        UsageError: The shapes do not fit together, a label is out of range, a logit is not finite, or a class
            name comes twice.
    """

    classes: tuple[str, ...]
    sample_indices: Ints
    labels: Ints
    logits: Floats

    def __post_init__(self) -> None:
        """Bring the arrays to their types, and refuse what cannot be right."""
        logits = np.asarray(self.logits)
        if logits.dtype.kind != "f":
            logits = logits.astype(np.float64)
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "sample_indices", np.asarray(self.sample_indices, dtype=np.int64))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        object.__setattr__(self, "logits", logits)
        _check(self)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """The number of classes the model can answer."""
        return len(self.classes)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """(N, C) softmax of the logits."""
        return softmax(self.logits)

    @property
    def answers(self) -> list[str]:
        """The class name given to each image."""
        return [self.classes[label] for label in self.predicted.tolist()]

    @property
    def predicted(self) -> Ints:
        """(N,) label with the highest logit; the first of equals."""
        return self._facts.predicted

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,) probability of the predicted label."""
        return self._facts.confidence

    @property
    def loss(self) -> NDArray[np.float64]:
        """(N,) cross-entropy of each image in nats; NaN where the true label is -1."""
        return self._facts.loss

    @property
    def rank(self) -> Ints:
        """(N,) how many classes the model puts before the true one (0 = right); C where the true label is -1."""
        return self._facts.rank

    @property
    def correct(self) -> Bools:
        """(N,) whether the predicted label is the true one; False where the true label is -1."""
        return np.asarray(self.predicted == self.labels)

    def take(self, positions: ArrayLike) -> Predictions:
        """The predictions at these positions (integers or a mask), in that order."""
        chosen = np.asarray(positions)
        return Predictions(self.classes, self.sample_indices[chosen], self.labels[chosen], self.logits[chosen])

    def labeled(self) -> Predictions:
        """Only the images whose true class the model knows."""
        known = self.labels >= 0
        return self if known.all() else self.take(known)

    @cached_property
    def _facts(self) -> _Facts:
        n, n_classes = self.logits.shape
        facts = _Facts.empty(n)
        step = max(1, _BLOCK_VALUES // n_classes)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            _fill_facts(facts, rows, self.logits[rows].astype(np.float64), self.labels[rows])
        return facts


def softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Probabilities along the last axis, in float64; safe for logits of any size."""
    scores = np.asarray(logits, dtype=np.float64)
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(logits: ArrayLike) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, in float64; exact where ``log(softmax(...))`` would be -inf."""
    scores = np.asarray(logits, dtype=np.float64)
    scores = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, eq=False)
class _Facts:
    """What is worked out once per image; see the properties of ``Predictions`` of the same names."""

    predicted: Ints
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    rank: Ints

    @staticmethod
    def empty(n: int) -> _Facts:
        return _Facts(np.empty(n, np.int64), np.empty(n), np.empty(n), np.empty(n, np.int64))


def _fill_facts(facts: _Facts, rows: slice, scores: NDArray[np.float64], labels: Ints) -> None:
    """Work out one block of rows; ``scores`` (B, C) is scratch space and is overwritten."""
    n, n_classes = scores.shape
    predicted = scores.argmax(axis=1)
    scores -= scores.max(axis=1, keepdims=True)
    known = labels >= 0
    own = np.where(known, scores[np.arange(n), np.maximum(labels, 0)], np.nan)
    # Of equal scores the lower label comes first, as in argmax, so that rank 0 and "correct" are the same thing.
    before = (scores > own[:, None]).sum(axis=1)
    before += ((scores == own[:, None]) & (np.arange(n_classes) < labels[:, None])).sum(axis=1)
    total = np.exp(scores, out=scores).sum(axis=1)
    facts.predicted[rows] = predicted
    facts.confidence[rows] = 1.0 / total
    facts.loss[rows] = np.log(total) - own
    facts.rank[rows] = np.where(known, before, n_classes)


def _check(predictions: Predictions) -> None:
    n, n_classes = len(predictions.labels), len(predictions.classes)
    if n_classes == 0:
        raise UsageError("predictions need at least one class")
    if len(set(predictions.classes)) != n_classes:
        raise UsageError("predictions name a class twice; give every class a name of its own")
    if predictions.logits.shape != (n, n_classes):
        found = predictions.logits.shape
        raise UsageError(f"predictions hold {n} labels and {n_classes} classes, but logits of shape {found}")
    if predictions.sample_indices.shape != (n,) or predictions.labels.ndim != 1:
        raise UsageError(f"predictions hold {n} labels but {predictions.sample_indices.size} sample indices")
    if n and not (predictions.labels.min() >= UNKNOWN_CLASS and predictions.labels.max() < n_classes):
        raise UsageError(f"predictions hold a label outside -1 … {n_classes - 1}")
    if not np.isfinite(predictions.logits).all():
        raise UsageError("predictions hold a logit that is not a finite number; the model or its features are damaged")
