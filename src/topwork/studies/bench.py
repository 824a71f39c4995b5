"""What a study works with: a bounded, balanced choice of the user's images, divided, and a pretrained backbone.

In: a path, or nothing (then shapes are drawn). Out: :class:`Bench`. Methods are compared on the held-out images, and nothing is
chosen on them; a study trains on ``train`` alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, scan
from topwork.data.samples import Rules
from topwork.data.split import split
from topwork.data.transforms import Pixels
from topwork.errors import UsageError
from topwork.features.embed import Embedder, Features, embed, embed_changed
from topwork.features.engine import load_engine
from topwork.features.probe import fit_probe
from topwork.features.store import FeatureStore
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.head import LinearHead
from topwork.settings import StudySettings, cache_folder
from topwork.studies.drawn import draw_folder

QUICK_IMAGES = 120
SMALLEST_SIDE = 32
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def _nothing(*_: object) -> None:
    """Ignores everything."""


@dataclass(frozen=True)
class Bench:
    """Images and tools of one study.

    Attributes:
        train: training rows, round-robin over the classes, so that every prefix is balanced.
        held_out: rows to evaluate on: the test part, else valid, else drawn by the seed; round-robin as well.
        say: called with what is being done.
        on_progress: called with (done, all).
    """

    manifest: Manifest
    labels: Ints
    train: Ints
    held_out: Ints
    backbone: Backbone
    settings: StudySettings
    say: Callable[[str], None] = _nothing
    on_progress: Callable[[int, int], None] = _nothing

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.manifest.classes

    @property
    def quick(self) -> bool:
        """Whether a rough answer within a minute is wanted."""
        return self.settings.quick

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.settings.seed

    def side(self, usual: int, quick: int) -> int:
        """Input side in pixels: as asked, else a usual one."""
        return self.settings.size or (quick if self.quick else usual)

    def scaled(self, side: int) -> Backbone:
        """The backbone for square inputs of this side."""
        return self.backbone.with_spec(height=side, width=side)

    def features(self, backbone: Backbone | None = None) -> Features:
        """Features of all images, from the store where known."""
        embedder = self.embedder(backbone or self.backbone)
        return embed(
            embedder.backbone,
            self.manifest,
            embedder=embedder,
            n_threads=self.settings.workers,
            on_progress=self.on_progress,
        )

    def embedder(self, backbone: Backbone, store: FeatureStore | None = None) -> Embedder:
        """The embedder of ``fit``, so that its features are found again; in quick studies PyTorch instead of OpenVINO."""
        # converting a network costs more than it saves on few images
        return Embedder(backbone, load_engine(backbone, "torch") if self.quick else None, store)

    def embedded(self, rows: Ints, pixels: Pixels, what: str, backbone: Backbone) -> Features:
        """Features of changed images (N, H, W, 3) of some rows, kept in the store under the name of the change.

        Rows of the result are 0 to N - 1.
        """
        hashes = [self.manifest.samples[row].content_hash for row in rows]
        return embed_changed(self.embedder(backbone), hashes, pixels, what)

    def probe(self, features: Features, rows: Ints | None = None, head: str = "plain") -> LinearHead:
        """A head fitted on training rows (all by default), chosen by cross-validation on them."""
        rows = self.train if rows is None else rows
        return fit_probe(features, self.labels, len(self.classes), rows=rows, head=head, seed=self.seed).head

    def probe_on(self, features: Features, rows: Ints, labels: Ints) -> LinearHead:
        """A plain head fitted on some rows of other features; ``labels`` are those of the rows."""
        every = np.zeros(len(features), np.int64)
        every[rows] = labels
        return fit_probe(features, every, len(self.classes), rows=rows, head="plain", seed=self.seed).head

    def probe_with(self, features: Features, labels: Ints, rows: Ints, groups: Ints) -> LinearHead:
        """A plain head on features that hold more than the images; a group never straddles two folds."""
        return fit_probe(
            features, labels, len(self.classes), rows=rows, groups=groups.tolist(), head="plain", seed=self.seed
        ).head

    def correct(self, head: LinearHead, features: Features) -> Bools:
        """(n_held_out,) whether a head is right on each held-out image."""
        blocks = features.blocks(head.transform.blocks, self.held_out)
        return np.asarray(head.logits(blocks).argmax(1) == self.labels[self.held_out])

    def pixels(self, rows: Ints, side: int, margin: float = 1.0) -> Pixels:
        """Decoded images, uint8 (N, side, side, 3), or larger by a margin for crops."""
        from topwork.training.batches import decode_all

        return decode_all(
            self.manifest.read, rows, self.scaled(side).spec, margin=margin,
            name=lambda row: self.manifest.samples[row].path, n_threads=self.settings.workers,
        )  # fmt: skip

    def facts(self, **more: object) -> dict[str, object]:
        """What was measured on what, for the record."""
        return {
            "backbone": self.backbone.name, "n_classes": len(self.classes), "n_train": len(self.train),
            "n_held_out": len(self.held_out), "data_digest": self.manifest.digest, "seed": self.seed, "quick": self.quick,
            **more,
        }  # fmt: skip


def prepare(
    path: str | os.PathLike[str] | None,
    settings: StudySettings,
    say: Callable[[str], None] = _nothing,
    on_progress: Callable[[int, int], None] = _nothing,
) -> Bench:
    """Scans, splits and subsamples the images; draws some if no path is given.

    Raises:
        UsageError: nothing to train on, fewer than two classes, or no image to evaluate on.
    """
    _check(settings)
    if path is None:
        path = draw_folder(cache_folder() / "drawn-shapes", 30, settings.seed)
        say("No images were given: the study runs on drawn shapes.")
    rules = Rules(
        root=settings.root, label_regex=settings.label_regex, group_by=settings.group_by,
        domain_by=settings.domain_by,
        limit_per_class=settings.limit_per_class, seed=settings.seed, corrections=settings.corrections,
    )  # fmt: skip
    manifest = scan(path, n_threads=settings.workers, on_progress=on_progress, rules=rules)
    if len(manifest.classes) < 2:
        raise UsageError(f"{path}: a study needs images of at least two classes, one folder per class.")
    labels = np.array(manifest.labels, np.int64)
    parts = split(manifest, 0.0, settings.test_fraction, settings.seed)
    held_out = parts.test if len(parts.test) else parts.valid
    if not len(held_out):
        raise UsageError(f"{path}: no image is left to evaluate on; give --test-fraction or more images.")
    n = settings.n_images or (QUICK_IMAGES if settings.quick else len(labels))
    kept = min(1.0, n / (len(parts.train) + len(held_out)))
    train = round_robin(parts.train, labels, settings.seed)[: _at_least(kept * len(parts.train), manifest)]
    kept_out = round_robin(held_out, labels, settings.seed)[: _at_least(kept * len(held_out), manifest)]
    rows = np.concatenate([train, kept_out])
    thin = replace(manifest, samples=tuple(manifest.samples[row] for row in rows))
    places = np.arange(len(rows))
    return Bench(
        thin, labels[rows], places[: len(train)], places[len(train) :], load_backbone(settings.backbone), settings, say,
        on_progress,
    )  # fmt: skip


def _check(settings: StudySettings) -> None:
    if settings.size is not None and settings.size < SMALLEST_SIDE:
        raise UsageError(f"--size {settings.size}: the studies' networks need at least {SMALLEST_SIDE} pixels.")
    if settings.n_images is not None and settings.n_images < 8:
        raise UsageError(f"--n-images {settings.n_images}: a study needs at least 8 images.")


def round_robin(rows: Ints, labels: Ints, seed: int) -> Ints:
    """The rows in a random order, round-robin over the classes."""
    shuffled = np.random.default_rng([seed, 3]).permutation(rows)
    rank = np.zeros(len(shuffled), np.int64)
    for label in np.unique(labels[shuffled]):
        own = labels[shuffled] == label
        rank[own] = np.arange(own.sum())
    return np.asarray(shuffled[np.argsort(rank, kind="stable")], np.int64)


def _at_least(n: float, manifest: Manifest) -> int:
    return max(round(n), 2 * len(manifest.classes))
