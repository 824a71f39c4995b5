"""Likely label errors and outliers, from out-of-fold probabilities, labels and features.

The probabilities of an image must come from a head that was not trained on it, or wrong labels go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.evaluation.predictions import Bools, Ints
from topwork.evaluation.similarity import nearest, unit_rows

_LARGEST_REFERENCE = 2048


@dataclass(frozen=True)
class SuspectedLabel:
    """An image whose label may be wrong.

    Attributes:
        position: Row in the given arrays.
        label: The given label.
        suggested: The more likely label.
        score: -2 to 2, higher is more suspicious; used for ranking.
        label_probability: Out-of-fold probability of ``label``.
        suggested_probability: Out-of-fold probability of ``suggested``.
        is_confident: Whether confident learning flags it as a label error.
        neighbors: Rows of the most similar images, nearest first; empty without features.
        neighbor_agreement: Share of neighbors with the same label; None without features.
    """

    position: int
    label: int
    suggested: int
    score: float
    label_probability: float
    suggested_probability: float
    is_confident: bool
    neighbors: tuple[int, ...]
    neighbor_agreement: float | None


@dataclass(frozen=True)
class Outlier:
    """An outlier: its row, and its mean cosine distance to the most similar images."""

    position: int
    distance: float
    neighbors: tuple[int, ...]


def suspected_labels(
    probabilities: ArrayLike,
    labels: ArrayLike,
    features: ArrayLike | None = None,
    n: int | None = None,
    n_neighbors: int = 5,
) -> tuple[SuspectedLabel, ...]:
    """The images whose labels are most likely wrong, most suspicious first.

    Confident learning (Northcutt, Jiang & Chuang 2021, 1911.00068): a class is a candidate for an image if its
    probability reaches t_j, the mean probability of class j over the images labeled j (eq. 2); if the most likely
    candidate is not the label, the image is flagged (eq. 1). Images are ranked by ``max_{j != label}(p_j - t_j) -
    (p_label - t_label)``, the margin relative to the class means. With 5% flipped labels, the first 7% of the ranking
    contain 100% of them on 20 Caltech classes, 90% on PACS paintings (plain margin: 86%), 89% on ants/bees and 50% on
    solar cells (head accuracy 85%). Neighbors are shown as evidence but not part of the score: including them made no
    significant difference.

    Args:
        probabilities: (N, C) out-of-fold probabilities.
        labels: (N,) given labels; images with -1 are ignored.
        features: (N, D) to find neighbors with, or None.
        n: Maximum number; None for as many as confident learning flags.
        n_neighbors: Neighbors per image.
    """
    stated, given = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if stated.ndim != 2 or len(stated) != len(given):
        raise ValueError(f"probabilities of shape {stated.shape} do not match {len(given)} labels")
    labeled = np.flatnonzero(given >= 0)
    if len(labeled) == 0 or stated.shape[1] < 2:
        return ()
    scores, suggested, confident = _label_doubt(stated[labeled], given[labeled])
    n_wanted = int(confident.sum()) if n is None else n
    order = np.argsort(-scores, kind="stable")[:n_wanted]
    chosen = labeled[order]
    near = _neighbors(features, chosen, n_neighbors)
    return tuple(
        SuspectedLabel(
            position=int(row),
            label=int(given[row]),
            suggested=int(suggested[i]),
            score=float(scores[i]),
            label_probability=float(stated[row, given[row]]),
            suggested_probability=float(stated[row, suggested[i]]),
            is_confident=bool(confident[i]),
            neighbors=tuple(near_rows.tolist()),
            neighbor_agreement=float((given[near_rows] == given[row]).mean()) if len(near_rows) else None,
        )
        for i, row, near_rows in zip(order, chosen, near, strict=True)
    )


def outliers(features: ArrayLike, n: int, n_neighbors: int = 5, seed: int = 0) -> tuple[Outlier, ...]:
    """Outliers, most isolated first, each with its most similar images.

    The distance is the mean cosine distance to the nearest images; above 2,048 images, among that many random ones, so
    that the time is linear.

    Args:
        features: (N, D).
        n: Maximum number.
        n_neighbors: Number of nearest images to average over.
        seed: Random seed.
    """
    rows = unit_rows(np.asarray(features))
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1))
    reference = usable
    if len(usable) > _LARGEST_REFERENCE:
        reference = np.sort(np.random.default_rng(seed).choice(usable, _LARGEST_REFERENCE, replace=False))
    near, similarity = nearest(rows, usable, reference, n_neighbors)
    if near.shape[1] == 0:
        return ()
    distance = 1 - similarity.mean(axis=1)
    order = np.argsort(-distance, kind="stable")[:n]
    return tuple(Outlier(int(usable[i]), float(distance[i]), tuple(near[i].tolist())) for i in order)


def _label_doubt(stated: NDArray[np.float64], labels: Ints) -> tuple[NDArray[np.float64], Ints, Bools]:
    """(N,) score, suggested label, and whether confident learning flags the image."""
    n, n_classes = stated.shape
    rows, counts = np.arange(n), np.bincount(labels, minlength=n_classes)
    usual = np.bincount(labels, weights=stated[rows, labels], minlength=n_classes) / np.maximum(counts, 1)
    # A class without labeled images is never suggested.
    usual = np.where(counts > 0, usual, np.inf)
    margins = stated - usual
    own = margins[rows, labels]
    margins[rows, labels] = -np.inf
    suggested = margins.argmax(axis=1)
    best = margins[rows, suggested]
    scores = np.where(np.isfinite(best), best - own, -2.0)  # with one labeled class there is nothing to suggest
    candidates = np.where(stated >= usual, stated, -1.0)
    likeliest = candidates.argmax(axis=1)
    confident = (candidates[rows, likeliest] >= 0) & (likeliest != labels)
    return scores, np.where(confident, likeliest, suggested), confident


def _neighbors(features: ArrayLike | None, chosen: Ints, n_neighbors: int) -> list[Ints]:
    if features is None:
        return [np.empty(0, dtype=np.int64)] * len(chosen)
    rows = unit_rows(np.asarray(features))
    return list(nearest(rows, chosen, np.flatnonzero(np.isfinite(rows).all(axis=1)), n_neighbors)[0])
