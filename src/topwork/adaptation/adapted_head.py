"""The adapted model: one linear head for both domains, and on request the network fine-tuned on both.

In: the source model, the choice, the features of both domains. Out: an ordinary :class:`Classifier` with temperature and
thresholds, so that prediction, export, server and timm need not know about domains
(docs/decisions/0040-one-head-for-two-domains.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import (
    FLOOR,
    Domains,
    Ints,
    Rows,
    Shares,
    clamped,
    nearest,
    neighbor_agreement,
    standardized,
    trust_in,
)
from topwork.adaptation.guards import GAIN_ERRORS, Choice
from topwork.data.manifest import Manifest
from topwork.evaluation.calibration import fit_ambiguous, fit_temperature
from topwork.evaluation.predictions import softmax
from topwork.evaluation.similarity import fit_unknown
from topwork.features.logistic import SoftmaxRegression
from topwork.models.backbone import Backbone
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead
from topwork.paired import is_clearly_better, paired
from topwork.settings import TuneSettings
from topwork.text import percent

if TYPE_CHECKING:
    from topwork.training.finetune import TunedClassifier
    from topwork.training.loop import TrainerContext

SURE = 0.75  # minimum share of votes for a pseudo-label; with all images the network got worse
CONFUSION = 0.5  # weight of class confusion relative to the cross-entropy of the pseudo-labels
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


# ---- the network


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a domain: rows of a manifest, with a class (N,) or probabilities (N, C) for each."""

    manifest: Manifest
    rows: NDArray[np.int64]
    targets: NDArray[Any]


@dataclass(frozen=True)
class Verdict:
    """Whether the tuned network is kept, why, and the numbers behind it."""

    is_kept: bool
    reason: str
    checks: dict[str, float]


def pseudo_labels(choice: Choice, known: Ints) -> Shares:
    """(M, C) one-hot: the adapted prediction of each image on which the methods agree, or the user's label.

    Rows of zeros are ignored by the cross-entropy.
    """
    predicted = choice.probabilities.argmax(1)
    is_sure = (choice.votes[np.arange(len(predicted)), predicted] >= SURE) | (known >= 0)
    one_hot = np.eye(choice.probabilities.shape[1])[np.where(known >= 0, known, predicted)]
    return np.asarray(one_hot * is_sure[:, None])


def tune_on_both(
    backbone: Backbone,
    head: LinearHead,
    source: Images,
    target: Images,
    *,
    epochs: int,
    seed: int = 0,
    n_threads: int | None = None,
    context: TrainerContext | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TunedClassifier:
    """Fine-tunes on both domains, starting from the head for both: labels of the source, pseudo-labels of the target.

    Nothing is selected on valid, which contains only source images; the EMA weights are used.

    Raises:
        TopworkError: an image is gone, or training failed.
    """
    from topwork.training.finetune import TunedClassifier, data_facts, trained_from, training_dataset, tune
    from topwork.training.losses import TargetTerms
    from topwork.training.recipe import plan

    n_classes = len(head.bias)
    settings = TuneSettings(strategy="lp-ft", epochs=epochs, interpolate=False)
    recipe = plan(settings, data_facts(source.targets, n_classes, 0), backbone.stage_names, seed)
    train, other = (
        training_dataset(images.manifest, images.rows, images.targets, backbone, recipe, n_threads, on_progress)
        for images in (source, target)
    )
    done = tune(
        backbone,
        recipe,
        train,
        None,
        head=trained_from(head, settings),
        probe=head,
        context=context,
        target=TargetTerms(other, recipe.batch_size, confusion=CONFUSION),
    )
    return TunedClassifier(*done.backbone_and_head(), done)


def is_better(before: Domains, choice: Choice, after: Domains, probabilities: Shares) -> Verdict:
    """Keeps the tuned network only if its predictions agree with similar images clearly more often.

    Training on predictions pulls images with the same prediction together. So the new predictions must agree more than
    the earlier ones among the neighbors found by the tuned network (by two standard errors), and more than the earlier
    ones did among the neighbors found by the untuned network.

    Args:
        before, after: both domains with the features of the untuned and of the tuned network.
        probabilities: (M, C) of the tuned network on the target.
    """
    old, new = choice.probabilities.argmax(1), probabilities.argmax(1)
    then, now = (nearest(standardized(domains).target) for domains in (before, after))
    old_then, old_now, new_now = (neighbor_agreement(*pair) for pair in ((old, then), (old, now), (new, now)))
    means = {"": new_now, " of the earlier predictions": old_now, " before tuning": old_then}
    checks = {f"tuned: agreement{name}": float(found.mean()) for name, found in means.items()}
    is_kept = is_clearly_better(paired(new_now, old_now), GAIN_ERRORS) and new_now.mean() > old_then.mean()
    new_share, old_share, first_share = (percent(value, 0) for value in checks.values())
    reason = (
        f"of the neighbors in its features {new_share} get the same class, with the earlier predictions {old_share}; "
        f"{first_share} before tuning"
    )
    return Verdict(bool(is_kept), reason, checks)


def tuned_choice(choice: Choice, probabilities: Shares, verdict: Verdict) -> Choice:
    """The choice with the tuned network's predictions and the same votes: training on them adds no evidence."""
    return replace(
        choice,
        method=f"{choice.method}, network fine-tuned",
        reason=f"{choice.reason} The network was also fine-tuned: {verdict.reason}.",
        probabilities=probabilities,
        checks=choice.checks | verdict.checks,
    )
