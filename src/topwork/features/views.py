"""Augmented views of training images for the probe, embedded once and kept in the feature store.

In: a manifest, its features, the training rows and views. Out: the same features with those of the views appended, for
:func:`topwork.features.probe.fit_probe`, which keeps a view in the fold of its image.

:func:`buy_views` spends a time budget: first on horizontal flips, then on other scales; views are kept if
cross-validation on the training images is clearly better. Views do not slow down prediction.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.augment import Flip, Pipeline, pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.transforms import Pixels
from topwork.features.embed import Embedder, Features
from topwork.features.probe import Probe, cross_entropies
from topwork.paired import Gain, is_clearly_better, paired


@dataclass(frozen=True)
class View:
    """One view of every training image: the ``number``-th draw of a pipeline."""

    pipeline: Pipeline
    number: int = 0

    @property
    def name(self) -> str:
        """Pipeline and number, for the recipe."""
        return f"{self.pipeline.name} {self.number}"


# In this order.
BOUGHT = (
    (View(Pipeline("mirror", (Flip(1.0),))),),
    tuple(View(pipeline("light"), number) for number in range(2)),
)
SHARE_OF_BUDGET = 0.8  # the rest is for the head, evaluation and report


@dataclass(frozen=True)
class Probed:
    """A probe, the views that it was fitted with, and the cross-validation result of each set of views.

    Attributes:
        tried: sentences, in order.
    """

    probe: Probe
    views: tuple[View, ...]
    tried: tuple[str, ...]


def asked_views(name: str, n: int) -> list[View]:
    """``n`` views of the pipeline with this name; no views for ``none``."""
    chosen = pipeline(name)
    return [View(chosen, number) for number in range(n)] if chosen.steps else []


def buy_views(
    fitted: Callable[[Sequence[View]], Probe], labels: NDArray[Any], rate: float | None, seconds: float
) -> Probed:
    """Fits the probe without views, then with as many as the time allows, and selects by cross-validation.

    Args:
        fitted: function that fits the probe with given views.
        labels: (M,) classes of the training images, or (M, C) 0 or 1 for several labels.
        rate: images embedded per second; None if everything was in the store.
        seconds: remaining time.
    """
    began = time.monotonic()
    views: tuple[View, ...] = ()
    best, tried = Probed(fitted(()), (), ()), []
    probe_seconds = time.monotonic() - began
    for more in BOUGHT:
        left = SHARE_OF_BUDGET * seconds - (time.monotonic() - began)
        needed = len(more) * len(labels) / rate if rate else 0.0
        # with views there are more rows to fit
        if needed + (2 + len(views) + len(more)) * probe_seconds > left:
            tried.append(
                f"{more[0].pipeline.name}: not tried, because it would take {needed:.0f} s and {left:.0f} s are left."
            )
            break
        views = (*views, *more)
        probe = fitted(views)
        gain = _gain(best.probe, probe, labels)
        names = ", ".join(view.name for view in views)
        tried.append(f"{names}: cross-entropy {'lower' if gain.mean >= 0 else 'higher'} by {gain.words(4)}.")
        if is_clearly_better(gain):
            best = Probed(probe, views, ())
    return Probed(best.probe, best.views, tuple(tried))


def _gain(first: Probe, second: Probe, labels: NDArray[Any]) -> Gain:
    """Decrease in cross-validated cross-entropy from the first probe to the second, and its standard error."""
    rows, one, two = np.intersect1d(first.rows, second.rows, return_indices=True)
    before, after = (
        cross_entropies(probe.out_of_fold_logits[chosen], labels[rows])
        for probe, chosen in ((first, one), (second, two))
    )
    return paired(before, after)


def with_views(
    manifest: Manifest,
    features: Features,
    rows: NDArray[np.int64],
    embedder: Embedder,
    views: Sequence[View],
    seed: int = 0,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """The features, then those of one view of each training row in their order, then those of the next view, and so on.

    Views that are not in the store are embedded.

    Raises:
        TopworkError: an image was changed or deleted since the scan.
    """
    wanted = [(int(row), view) for view in views for row in rows]
    keys = [_key(manifest.samples[row].content_hash, view, seed) for row, view in wanted]
    first = {key: pair for key, pair in zip(keys, wanted, strict=True) if embedder.wants(key)}

    def load(item: tuple[str, tuple[int, View]]) -> tuple[str, Pixels]:
        key, (row, view) = item
        return key, _pixels(manifest, row, embedder, view, seed)

    try:
        for n_done, (key, pixels) in enumerate(in_order(load, list(first.items()), n_threads), start=1):
            embedder.take(key, pixels)
            if on_progress:
                on_progress(n_done, len(first))
    finally:
        embedder.flush()
    return Features(features.hashes + tuple(keys), features.store)


def _pixels(manifest: Manifest, row: int, embedder: Embedder, view: View, seed: int) -> Pixels:
    pixels = decode(manifest.read_unchanged(row), min_side=embedder.spec.min_side).pixels
    return view.pipeline.view(pixels, embedder.spec, stream(seed, view.number, manifest.samples[row].content_hash))


def _key(content_hash: str, view: View, seed: int) -> str:
    """Key of a view in the store: everything it depends on besides the store's fingerprint."""
    return hashlib.sha256(f"{content_hash} affine {view.pipeline!r} {seed} {view.number}".encode()).hexdigest()
