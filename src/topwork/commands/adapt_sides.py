"""The two sides of an adaptation: images, features and labels of a source and of a target, and what a head sees of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.adapted_head import HeldOut
from topwork.adaptation.align import Domains
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.features.embed import Features
from topwork.models.classifier import Classifier

DEFAULT_PENALTY = 3e-3  # of heads whose recipe names none (tuned ones)
IMAGES_PER_SECOND = 400  # what choosing a method takes at worst on one slow core; turns a time budget into images
FEWEST_IMAGES = 400


@dataclass(frozen=True, eq=False)
class Source:
    """The run that is adapted: its images, their parts and features, in the model's classes."""

    run: Path
    classifier: Classifier
    manifest: Manifest
    parts: Split
    features: Features
    labels: NDArray[np.int64]

    def columns(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N, D) what the head of the classifier sees of some images."""
        return _columns(self.classifier, self.features, rows)


@dataclass(frozen=True, eq=False)
class Target:
    """The new domain: its images and features, labels known to the user, and labels for the report alone (-1: none)."""

    manifest: Manifest
    features: Features
    known: NDArray[np.int64]
    truth: NDArray[np.int64]
    is_labeled: bool

    def columns(self, classifier: Classifier, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N, D) what the head of a classifier sees of some images."""
        return _columns(classifier, self.features, rows)


def _columns(classifier: Classifier, features: Features, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    transform = classifier.head.transform
    return transform.apply(features.blocks(transform.blocks, rows))


def chosen_rows(
    source: Source, target: Target, budget: float | None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the source's train part and of the target that methods look at; all known ones are among them."""
    rng = np.random.default_rng([seed, 17])
    n_most = 4000 if budget is None else max(FEWEST_IMAGES, min(4000, int(budget * IMAGES_PER_SECOND / 2)))
    own = _some(source.parts.train, n_most, rng)
    rows = _some(np.arange(len(target.truth)), n_most, rng)
    rows = np.union1d(rows, np.flatnonzero(target.known >= 0)).astype(np.int64)
    return own, rows


def domains_of(source: Source, target: Target, own: NDArray[np.int64], rows: NDArray[np.int64]) -> Domains:
    """Columns that the head of the source's classifier sees, of these rows of both sides."""
    return Domains(
        source.columns(own), source.labels[own], target.columns(source.classifier, rows), target.known[rows],
        len(source.classifier.classes),
    )  # fmt: skip


def _some(rows: NDArray[np.int64], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))


def held_out(source: Source) -> HeldOut:
    """The valid part of the source, on which no head was fitted."""
    rows = source.parts.valid
    if not len(rows):
        width = len(source.classifier.head.transform.mean)
        return HeldOut(np.empty((0, width), np.float32), np.empty(0, np.int64))
    return HeldOut(source.columns(rows), source.labels[rows])


def penalty_of(run: Path) -> float:
    """The penalty that the run's probe was fitted with."""
    try:
        return float(json.loads((run / "recipe.json").read_text())["head"]["penalty"])
    except (OSError, ValueError, KeyError, TypeError):
        return DEFAULT_PENALTY
