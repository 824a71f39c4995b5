"""Fine-tuning the network on both domains, and whether to keep the result.

In: a backbone, the head for both domains (``adapted_head.py``), labeled images of the source and pseudo-labeled images
of the target. Out: a fine-tuned backbone and head, from the usual training loop with the target's losses as additional
terms. :func:`is_better` decides without labels of the target whether to keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import Domains, Ints, Shares, nearest, neighbor_agreement, standardized
from topwork.adaptation.guards import GAIN_ERRORS, Choice
from topwork.data.manifest import Manifest
from topwork.models.backbone import Backbone
from topwork.models.head import LinearHead
from topwork.paired import is_clearly_better, paired
from topwork.text import percent
from topwork.training.finetune import data_facts, trained_from, training_dataset, tune
from topwork.training.loop import TrainerContext
from topwork.training.losses import TargetTerms
from topwork.training.recipe import TuneSettings, plan

SURE = 0.75  # minimum share of votes for a pseudo-label; with all images the network got worse
CONFUSION = 0.5  # weight of class confusion relative to the cross-entropy of the pseudo-labels


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a domain: rows of a manifest, with a class (N,) or probabilities (N, C) for each."""

    manifest: Manifest
    rows: NDArray[np.int64]
    targets: NDArray[Any]


@dataclass(frozen=True, eq=False)
class TunedNetwork:
    """Backbone and head after training, one record per epoch, and why training ended (see ``training/loop.py``)."""

    backbone: Backbone
    head: LinearHead
    history: list[dict[str, Any]]
    ending: str


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
) -> TunedNetwork:
    """Fine-tunes on both domains, starting from the head for both: labels of the source, pseudo-labels of the target.

    Nothing is selected on valid, which contains only source images; the EMA weights are used.

    Raises:
        TopworkError: an image is gone, or training failed.
    """
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
    tuned, tuned_head = done.backbone_and_head()
    return TunedNetwork(tuned, tuned_head, done.result.history, done.result.ending)


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
