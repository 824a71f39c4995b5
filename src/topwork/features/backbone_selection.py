"""Compares backbones by cross-validated probes on the same sample of training images.

In: names, training rows, a way to embed. Out: :class:`Choice`: the fastest candidate that is not clearly worse than the
best. Transferability scores are not used: they rank no better than ImageNet accuracy, and a probe on cached features
takes seconds (``docs/decisions``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.errors import UsageError
from topwork.features.embed import Features
from topwork.features.engine import BATCH, Engine
from topwork.features.probe import Probe, fit_probe
from topwork.models.backbone import Backbone
from topwork.paired import is_clearly_better, paired

MAX_IMAGES = 500


@dataclass(frozen=True)
class Candidate:
    """A backbone and the results of its probe; ``images_per_second`` is the speed of the network on this machine."""

    name: str
    accuracy: float
    standard_error: float
    cross_entropy: float
    images_per_second: float
    n_parameters: int
    n_images: int
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """The chosen name, all candidates in the given order, and the reason in words."""

    name: str
    candidates: tuple[Candidate, ...]
    words: str


def names_of(backbone: str) -> list[str]:
    """The names in ``a,b,c``.

    Raises:
        UsageError: an empty or repeated name.
    """
    names = [name.strip() for name in backbone.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--backbone {backbone}: must be different names, joined by commas.")
    return names


def subsample(
    labels: NDArray[np.int64], rows: NDArray[np.int64], seed: int, most: int = MAX_IMAGES
) -> NDArray[np.int64]:
    """At most this many rows, proportional to class size but at least two per class."""
    if len(rows) <= most:
        return rows
    rng = np.random.default_rng([seed, 5])
    kept: list[int] = []
    for label in np.unique(labels[rows]):
        own = rng.permutation(rows[labels[rows] == label])
        kept += own[: max(2, round(most * len(own) / len(rows)))].tolist()
    return np.sort(np.array(kept, np.int64))


def choose(
    backbones: Sequence[Backbone],
    embedded: Callable[[Backbone], tuple[Features, Engine]],
    labels: NDArray[np.int64],
    n_classes: int,
    groups: Sequence[int],
    seed: int = 0,
) -> Choice:
    """Cross-validates a probe on each.

    Args:
        embedded: features of the chosen rows, in order, and the engine that computed them.
        labels, groups: of those rows.
    """
    probes, candidates = [], []
    for backbone in backbones:
        features, engine = embedded(backbone)
        probe = fit_probe(features, labels, n_classes, groups=groups, seed=seed)
        best = next(trial for trial in probe.trials if trial.chosen)
        probes.append(probe)
        candidates.append(
            Candidate(
                backbone.name, best.accuracy, best.standard_error, best.cross_entropy, _rate(engine, backbone),
                backbone.n_parameters, best.n_images,
            )
        )  # fmt: skip
    return decide(candidates, [_right(probe, labels) for probe in probes])


def decide(candidates: Sequence[Candidate], right: Sequence[NDArray[np.bool_]]) -> Choice:
    """The fastest of those within one standard error of the most accurate (Breiman et al. 1984, section 3.4.3).

    Args:
        right: (N,) for each candidate: whether its cross-validated prediction of each image is correct.
    """
    best = max(range(len(candidates)), key=lambda n: (candidates[n].accuracy, -candidates[n].cross_entropy))
    good = [number for number, own in enumerate(right) if not is_clearly_better(paired(right[best], own))]
    chosen = max(good, key=lambda n: candidates[n].images_per_second)
    marked = tuple(replace(candidate, chosen=number == chosen) for number, candidate in enumerate(candidates))
    return Choice(candidates[chosen].name, marked, _words(marked, best, chosen))


def _words(candidates: Sequence[Candidate], best: int, chosen: int) -> str:
    told = "; ".join(
        f"{c.name} {100 * c.accuracy:.1f}% at {c.images_per_second:.0f} images/s" for c in candidates
    )  # fmt: skip
    n_images = candidates[0].n_images
    if best == chosen:
        why = "the most accurate; no faster one is within one standard error of it"
    else:
        why = f"the fastest of those within one standard error of the most accurate one ({candidates[best].name})"
    return f"Backbone: {candidates[chosen].name}, {why}. Cross-validated probes on {n_images} training images: {told}."


def _right(probe: Probe, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray(probe.out_of_fold_logits.argmax(1) == labels[probe.rows])


def _rate(engine: Engine, backbone: Backbone) -> float:
    images = np.zeros((BATCH, backbone.spec.height, backbone.spec.width, 3), np.uint8)
    engine.run(images)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        engine.run(images)
        seconds.append(time.perf_counter() - began)
    return BATCH / min(seconds)
