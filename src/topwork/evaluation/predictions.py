"""Predictions of a model on a set of images: probabilities, predicted labels and losses from logits.

The network runs once; everything in ``evaluation/`` works on these arrays. An image has exactly one label or any number
of them, which :class:`Task` describes.

Values per image are computed in blocks, so that 10,000 images with 10,000 classes never need a second array of the size
of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.manifest import Manifest
from topwork.data.samples import LABEL_SEPARATOR
from topwork.data.shards import room_for
from topwork.errors import UsageError
from topwork.features.embed import Features
from topwork.models.classifier import Classifier
from topwork.text import Described, first_names, percent

Floats: TypeAlias = NDArray[np.floating[Any]]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

UNKNOWN_CLASS = -1
"""The label of an image whose true class the model does not have, or that came without one."""

_BLOCK_VALUES = 4_000_000  # 32 MB of float64 at a time


@dataclass(frozen=True, eq=False)
class Task:
    """Whether an image has exactly one label or any number of them, and when a label is predicted.

    Attributes:
        activation: ``softmax``: exactly one label; ``sigmoid``: any number of labels, with independent probabilities.
        thresholds: (C,) between 0 and 1, or None. With ``sigmoid``, a label is predicted if its probability reaches its
            threshold (None: 0.5). With ``softmax``, the class with the highest ratio of probability to threshold is
            predicted (None: the most probable one); of two classes with the thresholds 1 - t and t, the second is
            predicted from probability t.
        positive: For two classes, the label of the positive one.
    """

    activation: Literal["softmax", "sigmoid"] = "softmax"
    thresholds: NDArray[np.float64] | None = None
    positive: int = 1

    @staticmethod
    def of(classifier: Classifier) -> Task:
        """The task of a model."""
        if classifier.multi_label:
            return Task("sigmoid", np.asarray(classifier.thresholds["labels"], np.float64))
        return _with_positive(classifier.classes, classifier.thresholds.get("positive"))

    @staticmethod
    def of_part(part: Mapping[str, Any]) -> Task:
        """The task of a part of an ``evaluation.json``."""
        if part.get("multi_label"):
            return Task("sigmoid", np.array([part["per_class"][name]["threshold"] for name in part["classes"]]))
        return _with_positive(part["classes"], part.get("positive"))

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.activation == "sigmoid"

    def probabilities(self, logits: ArrayLike) -> NDArray[np.float64]:
        """(N, C) probabilities of (N, C) logits."""
        return sigmoid(logits) if self.multi_label else softmax(logits)

    def limits(self, n_classes: int) -> NDArray[np.float64]:
        """(C,) the thresholds; for None, equal ones."""
        return np.full(n_classes, 0.5) if self.thresholds is None else self.thresholds

    def given(self, probabilities: ArrayLike) -> Bools:
        """(N, C) the predicted labels of each image."""
        stated = np.asarray(probabilities, np.float64)
        limits = self.limits(stated.shape[1])
        if self.multi_label:
            return np.asarray(stated >= limits)
        return np.asarray(np.arange(stated.shape[1]) == (stated / limits).argmax(axis=1)[:, None])


ONE_LABEL = Task()


def _with_positive(classes: Sequence[str], positive: Mapping[str, Any] | None) -> Task:
    """One label per image, with the positive class of two and its ``threshold`` if a model has one."""
    if positive is None:
        return ONE_LABEL
    label, threshold = list(classes).index(positive["class"]), float(positive["threshold"])
    limits = np.full(2, 1 - threshold)
    limits[label] = threshold
    return Task("softmax", limits, label)


@dataclass(frozen=True, eq=False, repr=False)
class Predictions(Described):
    """The logits of one model for N images, with their true labels.

    Attributes:
        classes: The C class names; label c means ``classes[c]``.
        sample_indices: (N,) row of each image in the manifest.
        labels: (N,) true label, or -1 if it is missing or not a class of the model; (N, C) for several labels.
        logits: (N, C) finite scores, divided by the temperature for calibrated probabilities.
        task: One label per image (the default) or several.

    Raises:
        UsageError: The shapes do not fit together, a label is out of range, a logit is not finite, or a class
            name comes twice.
    """

    classes: tuple[str, ...]
    sample_indices: Ints
    labels: NDArray[Any]
    logits: Floats
    task: Task = field(default=ONE_LABEL)

    def __post_init__(self) -> None:
        """Converts and validates the arrays."""
        logits = np.asarray(self.logits)
        if logits.dtype.kind != "f":
            logits = logits.astype(np.float64)
        kind = np.bool_ if self.task.multi_label else np.int64
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "sample_indices", np.asarray(self.sample_indices, dtype=np.int64))
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=kind))
        object.__setattr__(self, "logits", logits)
        _check(self)

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        known = self.labeled()
        accuracy = percent(float(known.correct.mean())) if len(known) else "no labels"
        return {"Images": f"{len(self):,}", "Classes": first_names(self.classes, 6), "Accuracy": accuracy}

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def n_classes(self) -> int:
        """The number of classes of the model."""
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.task.multi_label

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """(N, C) probabilities of the classes."""
        found = room_for(self.logits.shape, np.float64)
        for rows in self.blocks():
            found[rows] = self.task.probabilities(self.logits[rows])
        return found

    def blocks(self) -> list[slice]:
        """The images in blocks, to bound memory."""
        step = max(1, _BLOCK_VALUES // self.n_classes)
        return [slice(start, start + step) for start in range(0, max(1, len(self)), step)]

    @cached_property
    def truth(self) -> Bools:
        """(N, C) the labels that each image has."""
        if self.multi_label:
            return self.labels
        return np.asarray(np.arange(self.n_classes) == self.labels[:, None])

    @cached_property
    def given(self) -> Bools:
        """(N, C) the predicted labels of each image."""
        if self.multi_label:
            return self.task.given(self.probabilities)
        return np.asarray(np.arange(self.n_classes) == self.predicted[:, None])

    @property
    def answers(self) -> list[str]:
        """The predicted class name of each image; several are joined as in tables."""
        if self.multi_label:
            return [join_labels(self.classes, row) for row in self.given]
        return [self.classes[label] for label in self.predicted.tolist()]

    @property
    def predicted(self) -> Ints:
        """(N,) predicted label; the first of ties. For several, that with the highest ratio to its threshold."""
        return self._facts.predicted

    @property
    def confidence(self) -> NDArray[np.float64]:
        """(N,) probability of the predicted label; for several labels, the lowest of the predicted ones.

        If none is predicted, that of the most probable label.
        """
        return self._facts.confidence

    @property
    def loss(self) -> NDArray[np.float64]:
        """(N,) cross-entropy of each image in nats, summed over several labels; NaN if the true label is -1."""
        return self._facts.loss

    @property
    def rank(self) -> Ints:
        """(N,) number of classes ranked above the true one (0 = correct); C if the true label is -1.

        For several labels: how many of the C predictions are wrong.
        """
        return self._facts.rank

    @property
    def correct(self) -> Bools:
        """(N,) whether the predicted label is correct (for several: every label); False if the true label is -1."""
        return np.asarray(self.rank == 0)

    def take(self, positions: ArrayLike) -> Predictions:
        """The predictions at these positions (integers or a mask), in that order."""
        chosen = np.asarray(positions)
        rows, labels, logits = self.sample_indices[chosen], self.labels[chosen], self.logits[chosen]
        return Predictions(self.classes, rows, labels, logits, self.task)

    def labeled(self) -> Predictions:
        """Only the images whose true class is one of the model's."""
        if self.multi_label or (known := self.labels >= 0).all():
            return self
        return self.take(known)

    @cached_property
    def _facts(self) -> _Facts:
        if self.multi_label:
            return _facts_of_several(self)
        shift = None if self.task.thresholds is None else -np.log(self.task.thresholds)
        found = [
            _facts_of_one(self.logits[rows].astype(np.float64), self.labels[rows], shift) for rows in self.blocks()
        ]
        return _Facts(*map(np.concatenate, zip(*found, strict=True)))


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


def sigmoid(logits: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * np.asarray(logits, dtype=np.float64))))


def join_labels(classes: Sequence[str], chosen: Bools) -> str:
    """The class names for which ``chosen`` (C,) is true, joined as in tables."""
    return LABEL_SEPARATOR.join(classes[number] for number in np.flatnonzero(chosen).tolist())


class _Facts(NamedTuple):
    """Values computed once per image; see the properties of ``Predictions`` with the same names."""

    predicted: Ints
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]
    rank: Ints


def _facts_of_one(scores: NDArray[np.float64], labels: Ints, shift: NDArray[np.float64] | None) -> _Facts:
    """Facts of a block of images, whose ``scores`` (B, C) are overwritten; they are ranked with ``shift`` added."""
    n, n_classes = scores.shape
    scores -= scores.max(axis=1, keepdims=True)
    ranked = scores if shift is None else scores + shift
    predicted = ranked.argmax(axis=1)
    known, every = labels >= 0, np.arange(n)
    true = np.maximum(labels, 0)
    # Ties go to the lower label, as in argmax, so that rank 0 means correct.
    own = ranked[every, true][:, None]
    before = (ranked > own).sum(axis=1) + ((ranked == own) & (np.arange(n_classes) < labels[:, None])).sum(axis=1)
    own_score, best_score = scores[every, true], scores[every, predicted]
    total = np.exp(scores, out=scores).sum(axis=1)
    loss = np.where(known, np.log(total) - own_score, np.nan)
    return _Facts(predicted, np.exp(best_score) / total, loss, np.where(known, before, n_classes))


def _facts_of_several(predictions: Predictions) -> _Facts:
    stated, given = predictions.probabilities, predictions.given
    least = np.where(given, stated, np.inf).min(axis=1, initial=np.inf)
    return _Facts(
        predicted=(stated / predictions.task.limits(predictions.n_classes)).argmax(axis=1),
        confidence=np.where(given.any(axis=1), least, stated.max(axis=1, initial=0.0)),
        loss=np.logaddexp(0, np.where(predictions.truth, -1.0, 1.0) * predictions.logits).sum(axis=1),
        rank=(given != predictions.labels).sum(axis=1),
    )


def _check(predictions: Predictions) -> None:
    n, n_classes = len(predictions.labels), len(predictions.classes)
    if n_classes == 0:
        raise UsageError("predictions need at least one class")
    if len(set(predictions.classes)) != n_classes:
        raise UsageError("predictions have a duplicate class name; class names must be unique")
    if predictions.logits.shape != (n, n_classes):
        found = predictions.logits.shape
        raise UsageError(f"predictions have {n} labels and {n_classes} classes, but logits of shape {found}")
    shape = (n, n_classes) if predictions.multi_label else (n,)
    if predictions.sample_indices.shape != (n,) or predictions.labels.shape != shape:
        raise UsageError(f"predictions have {n} labels but {predictions.sample_indices.size} sample indices")
    labels = predictions.labels
    if not predictions.multi_label and ((labels < UNKNOWN_CLASS) | (labels >= n_classes)).any():
        raise UsageError(f"predictions have a label outside -1 … {n_classes - 1}")
    if not all(np.isfinite(predictions.logits[rows]).all() for rows in predictions.blocks()):
        raise UsageError("predictions have a logit that is not finite; the model or its features are damaged")


def predict_features(
    classifier: Classifier, features: Features, rows: NDArray[np.int64], labels: NDArray[Any]
) -> Predictions:
    """Logits of some rows from stored features, a bounded number at a time.

    Args:
        labels: of all samples of the manifest, in the classifier's classes: (N,), or (N, C) for several labels.
    """
    blocks = classifier.head.transform.blocks
    logits = room_for((len(rows), len(classifier.classes)), np.float64)
    step = max(256, _BLOCK_VALUES // len(classifier.classes))
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        logits[some] = classifier.head.logits(features.blocks(blocks, rows[some]))
    return Predictions(classifier.classes, rows, labels[rows], logits, Task.of(classifier))


def labels_for(classifier: Classifier, manifest: Manifest) -> NDArray[Any]:
    """(N,) label of each sample among the model's classes, -1 if it has none of them; (N, C) for several labels."""
    index = {name: number for number, name in enumerate(classifier.classes)}
    if not classifier.multi_label:
        return np.array([index.get(sample.label, UNKNOWN_CLASS) for sample in manifest.samples], np.int64)
    matrix = np.zeros((len(manifest.samples), len(index)), np.bool_)
    known = [name for name in manifest.classes if name in index]
    own = {name: number for number, name in enumerate(manifest.classes)}
    matrix[:, [index[name] for name in known]] = manifest.label_matrix[:, [own[name] for name in known]]
    return matrix
