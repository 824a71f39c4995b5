"""The inputs of a study: a balanced, split sample of the images, and a pretrained backbone.

In: a path, or nothing (then colored shapes on noisy backgrounds are drawn: easy for a pretrained backbone, learnable for
a small network; results do not transfer to photographs). Out: :class:`Bench`. Methods are compared on the held-out
images, on which nothing is selected.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, scan
from topwork.data.samples import rules_of
from topwork.data.split import split
from topwork.data.transforms import Pixels
from topwork.errors import UsageError
from topwork.features.embed import Embedder, Features, FeatureStore, embed, embed_changed
from topwork.features.engine import load_engine
from topwork.features.probe import Probe, fit_probe
from topwork.files import atomic_file
from topwork.models.backbone import Backbone, load_backbone
from topwork.progress import Reporter, default_reporter
from topwork.settings import StudySettings, cache_folder, check

QUICK_IMAGES = 120
SHAPES = ("disc", "square", "cross", "stripes")
SIDE = 128  # of a drawn image, in pixels
T = TypeVar("T")
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Bench:
    """Images and tools of one study.

    Attributes:
        train: training rows, round-robin over the classes, so that every prefix is balanced.
        held_out: rows to evaluate on: the test part, else valid, else drawn by the seed; round-robin as well.
    """

    manifest: Manifest
    labels: Ints
    train: Ints
    held_out: Ints
    backbone: Backbone
    settings: StudySettings
    reporter: Reporter

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.manifest.classes

    @property
    def seed(self) -> int:
        """The random seed."""
        return self.settings.seed

    def pick(self, usual: T, quick: T) -> T:
        """One of two values, for usual or quick studies."""
        return quick if self.settings.quick else usual

    def scaled(self, usual: int, quick: int | None = None) -> Backbone:
        """The backbone for square inputs of ``--size`` pixels, else of the usual or quick size."""
        side = self.settings.size or self.pick(usual, quick or usual)
        return self.backbone.with_spec(height=side, width=side)

    def features(self, backbone: Backbone) -> Features:
        """Features of all images, from the store if available."""
        return embed(
            backbone, self.manifest, embedder=self.embedder(backbone), n_threads=self.settings.workers,
            on_progress=self.reporter.progress,
        )  # fmt: skip

    def embedder(self, backbone: Backbone, store: FeatureStore | None = None) -> Embedder:
        """The embedder of ``fit``, to share its features; in quick studies PyTorch instead of OpenVINO."""
        # converting a network does not pay off for few images
        return Embedder(backbone, load_engine(backbone, "torch") if self.settings.quick else None, store)

    def embedded(self, rows: Ints, pixels: Pixels, what: str, backbone: Backbone) -> Features:
        """Features of changed images (N, H, W, 3) of some rows, stored under the name of the change.

        Rows of the result are 0 to N - 1.
        """
        hashes = [self.manifest.samples[row].content_hash for row in rows]
        return embed_changed(self.embedder(backbone), hashes, pixels, f"{what} {backbone.spec.height}")

    def probe(self, features: Features, rows: Ints | None = None, labels: Ints | None = None) -> Probe:
        """A plain head fitted on some rows of the features, by default the training images, and chosen by cross-validation.

        Args:
            labels: (N,) of all rows of the features; by default those of the images.
        """
        rows, labels = self.train if rows is None else rows, self.labels if labels is None else labels
        return fit_probe(features, labels, len(self.classes), rows=rows, head="plain", seed=self.seed)

    def correct(self, probe: Probe, features: Features) -> Bools:
        """(n_held_out,) whether the prediction of each held-out image is correct."""
        blocks = features.blocks(probe.head.transform.blocks, self.held_out)
        return np.asarray(probe.head.logits(blocks).argmax(1) == self.labels[self.held_out])

    def pixels(self, rows: Ints, backbone: Backbone) -> Pixels:
        """Decoded images, uint8 (N, H, W, 3), in the backbone's input size."""
        from topwork.training.batches import decode_all

        return decode_all(self.manifest, rows, backbone.spec, n_threads=self.settings.workers)

    def facts(self, **more: object) -> dict[str, object]:
        """The conditions of the study, for its record."""
        return {
            "backbone": self.backbone.name, "n_classes": len(self.classes), "n_train": len(self.train),
            "n_held_out": len(self.held_out), "data_digest": self.manifest.digest, "seed": self.seed,
            "quick": self.settings.quick, **more,
        }  # fmt: skip


def prepare(
    path: str | os.PathLike[str] | None,
    settings: StudySettings,
    reporter: Reporter | None = None,
) -> Bench:
    """Scans, splits and subsamples the images; draws some if no path is given.

    Raises:
        UsageError: nothing to train on, fewer than two classes, or no image to evaluate on.
    """
    check(settings)
    reporter = reporter or default_reporter()
    if path is None:
        path = draw_folder(cache_folder() / "drawn-shapes", 30, settings.seed)
        reporter.note("No images given; using drawn shapes.")
    manifest = scan(path, n_threads=settings.workers, on_progress=reporter.progress, rules=rules_of(settings))
    if len(manifest.classes) < 2:
        raise UsageError(f"{path}: a study needs at least two classes, one folder per class.")
    labels = np.array(manifest.labels, np.int64)
    parts = split(manifest, 0.0, settings.test_fraction, settings.seed)
    held_out = parts.test if len(parts.test) else parts.valid
    if not len(held_out):
        raise UsageError(f"{path}: no images are left for evaluation; use --test-fraction or more images.")
    n = settings.n_images or (QUICK_IMAGES if settings.quick else len(labels))
    kept = min(1.0, n / (len(parts.train) + len(held_out)))
    train = round_robin(parts.train, labels, settings.seed)[: _at_least(kept * len(parts.train), manifest)]
    kept_out = round_robin(held_out, labels, settings.seed)[: _at_least(kept * len(held_out), manifest)]
    rows = np.concatenate([train, kept_out])
    thin = replace(manifest, samples=tuple(manifest.samples[row] for row in rows))
    places = np.arange(len(rows))
    return Bench(
        thin, labels[rows], places[: len(train)], places[len(train) :], load_backbone(settings.backbone), settings,
        reporter,
    )  # fmt: skip


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


# ---- drawn shapes


def draw_folder(folder: Path, n_each: int, seed: int = 0) -> Path:
    """Draws ``n_each`` JPEG files of each shape in a folder for this seed, and returns it; existing files are kept."""
    root = folder / f"{n_each}-{seed}"
    for number, shape in enumerate(SHAPES):
        (root / shape).mkdir(parents=True, exist_ok=True)
        for image in range(n_each):
            path = root / shape / f"{shape}-{image}.jpg"
            if not path.exists():
                with atomic_file(path) as partial:
                    partial.write_bytes(simplejpeg.encode_jpeg(draw(number, [seed, number, image]), quality=92))
    return root


def draw(shape: int, seed: list[int]) -> Pixels:
    """One shape with random position, size and color: uint8 (SIDE, SIDE, 3)."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(60, 190, 3) + rng.normal(0, 14, (SIDE, SIDE, 3))
    color = rng.integers(0, 255, 3)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    (cy, cx), radius = rng.uniform(SIDE / 3, 2 * SIDE / 3, 2), rng.uniform(SIDE / 7, SIDE / 3)
    image = np.where(_inside(shape, (x - cx) / radius, (y - cy) / radius)[..., None], color, ground)
    return np.ascontiguousarray(np.clip(image, 0, 255).astype(np.uint8))


def _inside(shape: int, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
    box = (abs(x) < 1) & (abs(y) < 1)
    return np.asarray([x**2 + y**2 < 1, box, box & ((abs(x) < 0.3) | (abs(y) < 0.3)), box & (np.sin(9 * x) > 0)][shape])
