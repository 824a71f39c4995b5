"""Augmented views of training images for the probe: embedded once, kept in the feature store like any image.

In: a manifest, its features, the training rows and a pipeline. Out: :class:`WithViews`: the same features with the views
appended, each with the label and the group of its image, so that a view and its image never straddle two folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.data.augment import Pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.sources import shown
from topwork.data.transforms import Pixels
from topwork.errors import ImageError, TopworkError
from topwork.features.embed import Embedder, Features
from topwork.features.probe import Probe


@dataclass(frozen=True, eq=False)
class WithViews:
    """Features, labels and groups of all images and of the views after them; ``rows`` are those to train on.

    Attributes:
        n_images: how many of ``rows`` are images; they come first.
    """

    features: Features
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    rows: NDArray[np.int64]
    n_images: int

    def images_only(self, probe: Probe) -> Probe:
        """A probe whose out-of-fold logits are those of images: what is calibrated on views would doubt itself."""
        kept = probe.rows < self.n_images
        return replace(probe, rows=probe.rows[kept], out_of_fold_logits=probe.out_of_fold_logits[kept])


def with_views(
    manifest: Manifest,
    features: Features,
    labels: NDArray[np.int64],
    groups: Sequence[int],
    rows: NDArray[np.int64],
    embedder: Embedder,
    pipeline: Pipeline,
    n_views: int,
    seed: int = 0,
    n_threads: int | None = None,
) -> WithViews:
    """Embeds ``n_views`` views of each training row that the store does not know yet.

    Raises:
        TopworkError: an image changed or vanished since the scan.
    """
    wanted = [(int(row), view) for view in range(n_views) for row in rows] if pipeline.name != "none" else []
    keys = [_key(manifest.samples[row].content_hash, pipeline, seed, view) for row, view in wanted]
    first = {key: pair for key, pair in zip(keys, wanted, strict=True) if embedder.wants(key)}

    def load(item: tuple[str, tuple[int, int]]) -> tuple[str, Pixels]:
        key, (row, view) = item
        return key, _view(manifest, row, embedder, pipeline, seed, view)

    try:
        for key, pixels in in_order(load, list(first.items()), n_threads):
            embedder.take(key, pixels)
    finally:
        embedder.flush()
    sources = np.array([row for row, _ in wanted], np.int64)
    group = np.asarray(groups, np.int64)
    return WithViews(
        features=Features(features.hashes + tuple(keys), features.store),
        labels=np.concatenate([labels, labels[sources]]),
        groups=np.concatenate([group, group[sources]]),
        rows=np.concatenate([rows, np.arange(len(keys)) + len(features)]),
        n_images=len(rows),
    )


def _view(manifest: Manifest, row: int, embedder: Embedder, pipeline: Pipeline, seed: int, view: int) -> Pixels:
    sample = manifest.samples[row]
    try:
        data = manifest.read(row)
        if hashlib.sha256(data).hexdigest() != sample.content_hash:
            raise ImageError("it has changed")
        pixels = decode(data, min_side=embedder.spec.min_side).pixels
    except ImageError as error:
        raise TopworkError(f"{shown(sample.path)}: was fine when scanned, and now: {error}. Scan again.") from None
    return pipeline.view(pixels, embedder.spec, stream(seed, view, sample.content_hash))


def _key(content_hash: str, pipeline: Pipeline, seed: int, view: int) -> str:
    """Names a view in the store; everything it depends on beside the store's own fingerprint."""
    return hashlib.sha256(f"{content_hash} {pipeline!r} {seed} {view}".encode()).hexdigest()
