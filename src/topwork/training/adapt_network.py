"""The network moved to a second domain: the one loop, with the losses of the features as further terms.

In: source images with labels, target images with what the methods on features believe of them, the head that already
answers for both (``training/adapted.py``). Out: a backbone and a head that learnt from both. Training starts from that
head, so before the first step the answers are those of the adapted features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.models.backbone import Backbone
from topwork.models.head import HeadSpec, LinearHead
from topwork.training.finetune import facts_of, stage_names, streams_of, tune
from topwork.training.loop import Surroundings
from topwork.training.recipe import TuneSettings, plan
from topwork.training.terms import TargetTerms

EPOCHS = 6


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a domain: rows of a manifest, with a class (N,) or probabilities (N, C) for each."""

    manifest: Manifest
    rows: NDArray[np.int64]
    wanted: NDArray[Any]


@dataclass(frozen=True, eq=False)
class MovedNetwork:
    """Backbone and head after training, and one record an epoch."""

    backbone: Backbone
    head: LinearHead
    history: list[dict[str, Any]]
    ending: str


def move_network(
    backbone: Backbone,
    head: LinearHead,
    source: Images,
    target: Images,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    n_threads: int | None = None,
    around: Surroundings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> MovedNetwork:
    """Fine-tunes on both domains: labels of the source, beliefs about the target.

    Nothing is chosen on valid, whose images are of the source alone; the moving average of the weights is taken.

    Raises:
        TopworkError: an image vanished, or training failed, with the cause.
    """
    n_classes = len(head.bias)
    settings = TuneSettings(strategy="lp-ft", epochs=epochs, interpolate=False)
    facts = facts_of(source.wanted, n_classes, 0)
    recipe = plan(settings, facts, stage_names(backbone.skeleton(n_classes)), seed)
    streams = []
    for images in (source, target):
        stream, _ = streams_of(
            images.manifest, images.rows, np.empty(0, np.int64), backbone, recipe, n_threads, on_progress
        )
        stream.labels = images.wanted  # in the classes of the model, which may be more than those of the manifest
        streams.append(stream)
    done = tune(
        backbone,
        recipe,
        streams[0],
        None,
        head=HeadSpec("extended" if head.kind == "extended" else "linear"),
        probe=head,
        around=around,
        target=TargetTerms(streams[1], recipe.batch_size),
    )
    moved, tuned_head = done.backbone_and_head()
    return MovedNetwork(moved, tuned_head, done.tuned.history, done.tuned.ending)
