"""The classifier after adapting: one linear head for both domains, its temperature and thresholds.

In: the source model, what was chosen, the columns of both domains. Out: a :class:`Classifier` like any other, so that
prediction, export, server and timm need to know nothing of domains (docs/decisions/0040-one-head-for-two-domains.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import Domains, Ints, Rows, Shares, clamped, distil, trust_in
from topwork.adaptation.guards import Choice
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.decisions import fit_ambiguous
from topwork.evaluation.predictions import softmax
from topwork.evaluation.unknown import fit_unknown
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead
from topwork.paired import Gain, paired

LARGEST_DROP = 0.02  # of accuracy on held-out images of the source; more than that is no adaptation but a trade


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images of the source that the head was not fitted on: columns (K, D) and labels (K,); may be empty."""

    columns: Rows
    labels: Ints


def adapted_head(head: LinearHead, domains: Domains, choice: Choice, penalty: float) -> LinearHead:
    """One head on the columns of the old one.

    Adapted answers count as much as the labels of the source. Where only some labels of the target are known and
    nothing else was believed, those images alone count, by their number (:func:`trust_in`).
    """
    eye = np.eye(domains.n_classes)
    if choice.method == "labels only":
        rows = np.flatnonzero(domains.known >= 0)
        weight = trust_in(len(rows), domains.n_classes)
        target, wanted, share = domains.target[rows], eye[domains.known[rows]], weight / (1 + weight)
    else:
        target, wanted, share = domains.target, clamped(choice.probabilities, domains.known), 0.5
    found = distil(domains.source, eye[domains.labels], target, wanted, penalty, share)
    return replace(head, weight=np.ascontiguousarray(found[:-1].T), bias=found[-1].copy())


def source_drop(before: LinearHead, after: LinearHead, held_out: HeldOut, moved: HeldOut | None = None) -> Gain:
    """Accuracy lost on held-out images of the source, and its standard error; 0 if there are none.

    Args:
        moved: the same images as the network of the second head sees them, where it is another.
    """
    if not len(held_out.labels):
        return Gain(0.0, 0.0)
    seen = ((before, held_out), (after, moved or held_out))
    right = [(score(head, images.columns).argmax(1) == images.labels).astype(float) for head, images in seen]
    return paired(*right)


def loss_on_source(
    before: LinearHead, after: LinearHead, held_out: HeldOut, moved: HeldOut | None = None
) -> str | None:
    """Why a head is no adaptation but a trade: its drop is beyond ``LARGEST_DROP`` and two standard errors; else None."""
    drop = source_drop(before, after, held_out, moved)
    if drop.mean > LARGEST_DROP + 2 * drop.error:
        return f"would lose {100 * drop.mean:.1f} points on held-out images of the source"
    return None


def adapted_classifier(
    classifier: Classifier,
    head: LinearHead,
    domains: Domains,
    choice: Choice,
    held_out: HeldOut,
    last: tuple[NDArray[np.float16], NDArray[np.float16]],
) -> Classifier:
    """The classifier with a new head, calibrated on held-out images of the source and on what the target predicts.

    Args:
        last: last features of the source's training images and of the target's, for the unknown score.
    """
    target_logits = score(head, domains.target)
    temperature = fit_temperature(target_logits, choice.consensus)
    if len(held_out.labels):
        temperature = max(temperature, fit_temperature(score(head, held_out.columns), held_out.labels))
    head = head.divided_by(temperature)
    thresholds = dict(classifier.thresholds)
    if len(held_out.labels) and thresholds.get("set_coverage"):
        probabilities = softmax(score(head, held_out.columns))
        thresholds |= fit_ambiguous(probabilities, held_out.labels, float(thresholds["set_coverage"]))
    labels = np.concatenate([domains.labels, target_logits.argmax(1)])
    rate = float(thresholds.get("unknown_false_alarm_rate") or 0.01)
    detector = fit_unknown(np.concatenate(last), labels, rate)
    thresholds["unknown"] = max(detector.threshold, thresholds.get("unknown") or 0.0)
    arrays = classifier.arrays | {"unknown_centres": detector.centers}
    return replace(
        classifier, head=head, temperature=classifier.temperature * temperature, thresholds=thresholds, arrays=arrays
    )


def score(head: LinearHead, columns: Rows) -> Shares:
    """(N, C) logits from columns that the head's transform has made."""
    return np.asarray(columns.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias)
