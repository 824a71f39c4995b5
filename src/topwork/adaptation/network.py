"""The network moved to a second domain, and whether to believe what came of it.

In: a backbone, the head that already answers for both domains (``adaptation/adapted_head.py``), labeled images of the source
and those of the target with what the methods on features believe of them. Out: another backbone and head. Either the one
loop trains with the losses of the features as further terms (:func:`move_network`), or batch-norm statistics are taken
again (``adaptation/batch_norm.py``). :func:`believed` decides without labels of the target.
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
from topwork.training.finetune import data_facts, stage_names, trained_from, training_dataset, tune
from topwork.training.loop import TrainerContext
from topwork.training.losses import TargetTerms
from topwork.training.recipe import TuneSettings, plan

SURE = 0.75  # share of the methods' votes from which on an image is trained on: with all images the network got worse
CONFUSION = 0.5  # of class confusion against the cross-entropy of the sure images


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a domain: rows of a manifest, with a class (N,) or probabilities (N, C) for each."""

    manifest: Manifest
    rows: NDArray[np.int64]
    wanted: NDArray[Any]


@dataclass(frozen=True, eq=False)
class MovedNetwork:
    """Backbone and head after training, one record an epoch, and why it ended (see ``training/loop.py``)."""

    backbone: Backbone
    head: LinearHead
    history: list[dict[str, Any]]
    ending: str


@dataclass(frozen=True)
class Belief:
    """Whether the moved network is taken, why, and the numbers behind it."""

    is_kept: bool
    reason: str
    checks: dict[str, float]


def beliefs(choice: Choice, known: Ints) -> Shares:
    """(M, C) what the network is to learn of each image: its adapted answer where the methods agree, else nothing.

    Rows of zeros take no part in the cross-entropy. Labels that the user gave are certain.
    """
    answer = choice.probabilities.argmax(1)
    is_sure = (choice.consensus[np.arange(len(answer)), answer] >= SURE) | (known >= 0)
    wanted = np.eye(choice.probabilities.shape[1])[np.where(known >= 0, known, answer)]
    return np.asarray(wanted * is_sure[:, None])


def move_network(
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
) -> MovedNetwork:
    """Fine-tunes on both domains from the head that answers for both: labels of the source, beliefs about the target.

    Nothing is chosen on valid, whose images are of the source alone; the moving average of the weights is taken.

    Raises:
        TopworkError: an image vanished, or training failed, with the cause.
    """
    n_classes = len(head.bias)
    settings = TuneSettings(strategy="lp-ft", epochs=epochs, interpolate=False)
    recipe = plan(settings, data_facts(source.wanted, n_classes, 0), stage_names(backbone.skeleton(n_classes)), seed)
    train, other = (
        training_dataset(images.manifest, images.rows, images.wanted, backbone, recipe, n_threads, on_progress)
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
    moved, tuned_head = done.backbone_and_head()
    return MovedNetwork(moved, tuned_head, done.result.history, done.result.ending)


def believed(before: Domains, choice: Choice, after: Domains, answers: Shares) -> Belief:
    """Keeps the moved network only where its answers fit the images' neighborhoods clearly better.

    Two comparisons, since a network that was trained on answers draws the images together by them: among the neighbors
    that the moved network sees, its answers must agree more than the earlier ones do (by two standard errors); and more
    than the earlier ones did among the neighbors of the unmoved network.

    Args:
        before, after: both domains on the columns of the unmoved and of the moved network.
        answers: (M, C) those of the moved network on the target.
    """
    old, new = choice.probabilities.argmax(1), answers.argmax(1)
    then, now = (nearest(standardized(domains).target) for domains in (before, after))
    old_then, old_now, new_now = (neighbor_agreement(*pair) for pair in ((old, then), (old, now), (new, now)))
    gain = paired(new_now, old_now)
    checks = {
        "moved: agreement": float(new_now.mean()),
        "moved: agreement of the earlier answers": float(old_now.mean()),
        "moved: agreement before": float(old_then.mean()),
    }
    is_kept = is_clearly_better(gain, GAIN_ERRORS) and new_now.mean() > old_then.mean()
    words = (
        f"among the neighbors that the moved network sees, {100 * new_now.mean():.0f} % get one class, with the earlier "
        f"answers {100 * old_now.mean():.0f} %; {100 * old_then.mean():.0f} % before it was moved"
    )
    return Belief(bool(is_kept), words, checks)


def moved_choice(choice: Choice, answers: Shares, belief: Belief, method: str) -> Choice:
    """The choice with the moved network's answers. The votes stay: who was trained on them is no further witness."""
    return replace(
        choice,
        method=f"{choice.method}, {method}",
        reason=f"{choice.reason} The network was moved, too: {belief.reason}.",
        probabilities=answers,
        checks=choice.checks | belief.checks,
    )
