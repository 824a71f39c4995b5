"""Distribution shift between two sets of images, overall and per class, with permutation tests.

The distance is the energy distance (Székely and Rizzo 2013, "Energy statistics", J. Stat. Planning and Inference 143):
``2 E|a - b| - E|a - a'| - E|b - b'|``, 0 if and only if both sets have the same distribution. Its p-value comes from
random permutations of the images between the sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.evaluation.similarity import nearest_images

MCC_TEMPERATURE = 2.5  # of minimum class confusion: Jin et al. 2020, arXiv 1912.03699
N_PERMUTATIONS = 299
N_CLASS_PERMUTATIONS = 4999  # enough for one of a hundred classes to be significant
MAX_OF_CLASS = 200
MAX_IMAGES = 600  # of each set: relevant shifts are significant with far fewer
_FLOOR = 0.1


@dataclass(frozen=True)
class Distance:
    """Two sets of images.

    Attributes:
        energy: energy distance over the mean distance within the sets; 0 is no difference, 0.3 is a sketch of a photo.
        p_value: share of permutations with at least this distance.
        expected: mean over permutations: the distance of two sets of this size from one distribution.
        auc: of a linear classifier of the two sets, on held-out images: 0.5 is chance, 1 is perfect.
        n_a, n_b: number of images.
    """

    energy: float
    p_value: float
    expected: float
    auc: float
    n_a: int
    n_b: int


def energy_distance(
    a: NDArray[Any], b: NDArray[Any], *, seed: int = 0, n_permutations: int = N_PERMUTATIONS
) -> Distance:
    """Distance of two sets of features with a permutation test.

    Args:
        a, b: (N, D), (M, D); scaled together, so that no column dominates. At most MAX_IMAGES of each are used.
    """
    rng = np.random.default_rng([seed, 11])
    a, b = (_drawn(np.asarray(x, np.float32), rng) for x in (a, b))
    n, m = len(a), len(b)
    joint = np.concatenate([a, b])
    spread = joint.std(0)
    joint = (joint - joint.mean(0)) / (spread + _FLOOR * max(float(np.sqrt(np.mean(spread**2))), 1e-6))
    distances = _distances(joint)
    signs = _permuted_signs(n, m, n_permutations, rng)
    energies = -np.einsum("pn,pn->p", signs @ distances, signs)
    typical = float(distances.sum() / max((n + m) * (n + m - 1), 1)) or 1.0
    energy, expected = float(max(energies[0], 0) / typical), float(energies[1:].mean() / typical)
    return Distance(energy, _p_value(energies), expected, _auc(joint, n, rng), n, m)


def _permuted_signs(n: int, m: int, n_permutations: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(P + 1, n + m) weights of the images in the mean of the first set minus that of the second, then permuted."""
    base = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])
    return np.stack([base, *(base[rng.permutation(n + m)] for _ in range(n_permutations))])


def _p_value(statistics: NDArray[np.float64]) -> float:
    """Share of values at least as large as the first, the observed one."""
    return (1 + int((statistics[1:] >= statistics[0] * (1 - 1e-9)).sum())) / len(statistics)


def _drawn(rows: NDArray[np.float32], rng: np.random.Generator, n: int = MAX_IMAGES) -> NDArray[np.float32]:
    return rows if len(rows) <= n else rows[np.sort(rng.choice(len(rows), n, replace=False))]


def _distances(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, N) Euclidean distances."""
    gram = rows.astype(np.float64) @ rows.T.astype(np.float64)
    squares = np.diag(gram)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0.0))


def _auc(joint: NDArray[np.float32], n: int, rng: np.random.Generator) -> float:
    """Area under the ROC curve of a ridge classifier of the two sets, on the held-out half."""
    total = len(joint)
    side = np.where(np.arange(total) < n, 1.0, -1.0)
    half = np.zeros(total, bool)
    half[np.concatenate([part[::2] for part in (rng.permutation(n), n + rng.permutation(total - n))])] = True
    if min(half[:n].sum(), half[n:].sum(), (~half)[:n].sum(), (~half)[n:].sum()) < 1:
        return 0.5
    scores = []
    for fitted in (half, ~half):
        kernel = joint[fitted].astype(np.float64) @ joint[fitted].T
        weights = np.linalg.solve(
            kernel + max(0.1 * np.trace(kernel) / len(kernel), 1e-9) * np.eye(len(kernel)), side[fitted]
        )
        found = joint[~fitted] @ (joint[fitted].T @ weights)
        scores.append(found[side[~fitted] > 0][:, None] - found[side[~fitted] < 0][None, :])
    return float(np.mean([np.mean((s > 0) + 0.5 * (s == 0)) for s in scores]))


@dataclass(frozen=True)
class ClassShift:
    """Shift of a class: distance between its means, relative to the typical distance of its images from their mean."""

    shift: float
    p_value: float


def class_shifts(
    a: NDArray[Any], labels_a: NDArray[Any], b: NDArray[Any], labels_b: NDArray[Any], *, seed: int = 0
) -> dict[str, ClassShift]:
    """The shift of every class with at least three images in both sets, with a permutation test within the class.

    The shift is corrected for the noise of the two means, so that its mean is 0 for equal distributions.
    """
    rng = np.random.default_rng([seed, 23])
    found = {}
    for name in sorted(set(map(str, labels_a.tolist())) & set(map(str, labels_b.tolist()))):
        own = [
            _drawn(np.asarray(x[labels == name], np.float32), rng, MAX_OF_CLASS)
            for x, labels in ((a, labels_a), (b, labels_b))
        ]
        n, m = len(own[0]), len(own[1])
        if min(n, m) < 3 or name == "?":
            continue
        joint = np.concatenate(own)
        gram = (joint - joint.mean(0)) @ (joint - joint.mean(0)).T
        signs = _permuted_signs(n, m, N_CLASS_PERMUTATIONS, rng)
        squares = np.einsum("pn,pn->p", signs @ gram, signs)
        spread = np.mean([x.var(0).sum() for x in own])
        noise = float(squares[1:].mean())  # of the two means
        shift = float(np.sqrt(max(squares[0] - noise, 0.0) / max(spread, 1e-12)))
        found[name] = ClassShift(shift, _p_value(squares))
    return found


def farthest(a: NDArray[Any], b: NDArray[Any], k: int = 5) -> NDArray[np.int64]:
    """Rows of ``b`` by mean cosine with the k most similar images of ``a``, the least similar first."""
    return np.argsort(nearest_images(b, a, k)[1].mean(1), kind="stable").astype(np.int64)


def joint_map(
    a: NDArray[Any], labels_a: NDArray[np.int64], b: NDArray[Any], labels_b: NDArray[np.int64], n: int = 400
) -> dict[str, list[list[float]]]:
    """Both sets on their joint main axes: (x, y, label) of at most ``n`` images each, as ``source`` and ``target``."""
    rng = np.random.default_rng(19)
    rows = {name: np.sort(rng.permutation(len(x))[:n]) for name, x in (("source", a), ("target", b))}
    parts = {"source": a[rows["source"]].astype(np.float64), "target": b[rows["target"]].astype(np.float64)}
    together = np.concatenate([parts["source"], parts["target"]])
    _, _, directions = np.linalg.svd(together - together.mean(0), full_matrices=False)
    axes = np.zeros((together.shape[1], 2))
    axes[:, : min(2, len(directions))] = directions[:2].T
    labels = {"source": labels_a, "target": labels_b}
    return {
        name: [
            [round(float(x), 3), round(float(y), 3), int(label)]
            for (x, y), label in zip((part - together.mean(0)) @ axes, labels[name][rows[name]], strict=True)
        ]
        for name, part in parts.items()
    }
