"""One linear head for both domains, its temperature and its thresholds.

In: the source model, the choice, the features of both domains. Out: an ordinary :class:`Classifier`, so that
prediction, export, server and timm need not know about domains (docs/decisions/0040-one-head-for-two-domains.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import FLOOR, Domains, Ints, Rows, Shares, clamped, trust_in
from topwork.adaptation.guards import Choice
from topwork.evaluation.calibration import fit_ambiguous, fit_temperature
from topwork.evaluation.predictions import softmax
from topwork.evaluation.similarity import fit_unknown
from topwork.features.logistic import SoftmaxRegression
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead
from topwork.paired import paired
from topwork.text import percent

LARGEST_DROP = 0.02  # in accuracy on held-out images of the source


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Images of the source that the head was not fitted on: features (K, D) and labels (K,); may be empty."""

    rows: Rows
    labels: Ints


def distil(
    source: Rows, source_targets: Shares, target: Rows, target_targets: Shares, penalty: float, share: float = 0.5
) -> Rows:
    """(D + 1, C) one linear head that reproduces the source's labels and the adapted predictions on the target.

    Hinton et al. 2015, arXiv 1503.02531, at temperature 1: cross-entropy with the teacher's probabilities. Teacher and
    head see different features: the methods center each domain separately, which at test time would require the domain
    of each image. A few hundred features encode the domain, so one head can serve both.

    Args:
        source, target: (N, D), (M, D) features as the head will see them.
        source_targets, target_targets: (N, C), (M, C) one-hot labels or probabilities.
        penalty: L2 penalty, for features scaled to a mean variance of 1.
        share: weight of the target in the loss, 0 to 1.
    """
    joint = np.concatenate([source, target]).astype(np.float32)
    center = joint.mean(0, dtype=np.float64).astype(np.float32)
    spread = np.sqrt(np.mean(np.square(joint - center), axis=0, dtype=np.float64))
    scale = (spread + FLOOR * max(float(np.sqrt(np.mean(spread**2))), 1e-6)).astype(np.float32)
    weights = np.repeat([(1 - share) / len(source), share / len(target)], [len(source), len(target)])
    targets = np.concatenate([source_targets, target_targets])
    problem = SoftmaxRegression((joint - center) / scale, targets, targets.shape[1], weights[None, :])
    for step in (1.0, 0.1):
        if step > penalty:
            problem.solve(step, tolerance=1e-2)
    problem.solve(penalty, tolerance=1e-5, max_steps=200)
    weight, bias = problem.solution()
    weight = weight[0] / scale
    return np.asarray(np.vstack([weight.T, bias[0] - weight @ center]), np.float32)


def adapted_head(head: LinearHead, domains: Domains, choice: Choice, penalty: float) -> LinearHead:
    """One head on the features that the old one sees.

    Adapted predictions weigh as much as the labels of the source. If only known labels of the target are used, they
    weigh :func:`trust_in`.
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


def loss_on_source(
    before: LinearHead, after: LinearHead, held_out: HeldOut, seen_after: HeldOut | None = None
) -> str | None:
    """Why a head is rejected: source accuracy drops by more than ``LARGEST_DROP`` and two standard errors; else None.

    Args:
        held_out: features for the first head.
        seen_after: features of the same images for the second head, if its network differs.
    """
    if not len(held_out.labels):
        return None
    seen = ((before, held_out), (after, seen_after or held_out))
    right = [(score(head, images.rows).argmax(1) == images.labels).astype(float) for head, images in seen]
    drop = paired(*right)
    if drop.mean <= LARGEST_DROP + 2 * drop.error:
        return None
    return f"accuracy on held-out images of the source would drop by {percent(drop.mean)}"


def adapted_classifier(
    classifier: Classifier,
    head: LinearHead,
    domains: Domains,
    choice: Choice,
    held_out: HeldOut,
    last: tuple[NDArray[np.float16], NDArray[np.float16]],
) -> Classifier:
    """The classifier with a new head, calibrated on held-out images of the source and on its predictions for the target.

    Args:
        last: last features of the source's training images and of the target's, for the unknown score.
    """
    logits = score(head, domains.target)
    temperature = fit_temperature(logits, choice.votes)
    if len(held_out.labels):
        temperature = max(temperature, fit_temperature(score(head, held_out.rows), held_out.labels))
    head = head.divided_by(temperature)
    thresholds = dict(classifier.thresholds)
    if len(held_out.labels) and thresholds.get("set_coverage"):
        probabilities = softmax(score(head, held_out.rows))
        thresholds |= fit_ambiguous(probabilities, held_out.labels, float(thresholds["set_coverage"]))
    labels = np.concatenate([domains.labels, logits.argmax(1)])
    detector = fit_unknown(np.concatenate(last), labels, float(thresholds.get("unknown_false_alarm_rate") or 0.01))
    thresholds["unknown"] = max(detector.threshold, thresholds.get("unknown") or 0.0)
    return replace(
        classifier,
        head=head,
        temperature=classifier.temperature * temperature,
        thresholds=thresholds,
        arrays=classifier.arrays | {"unknown_centres": detector.centers},
    )


def score(head: LinearHead, rows: Rows) -> Shares:
    """(N, C) logits from features transformed by the head."""
    return np.asarray(rows.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias)
