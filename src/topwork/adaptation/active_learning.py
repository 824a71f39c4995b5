"""Which images of a new domain are most worth labeling.

Few labels bring most on typical images (Hacohen et al. 2022, TypiClust, arXiv 2202.02794): the target is cut into as many
clusters as images are asked for, and in each, of the half nearest to its center, the image is taken on which the
methods disagree most. Theirs takes the most typical one; a model that exists already knows where it is in doubt.
"""

from __future__ import annotations

import numpy as np

from topwork.adaptation.align import Domains, Ints, Rows, Shares, entropy, standardized
from topwork.adaptation.guards import Choice

_K_MEANS_STEPS = 10


def images_to_label(domains: Domains, choice: Choice, n: int, seed: int = 0) -> Ints:
    """(n,) rows of the target without a known label, the most disputed first; fewer if there are not so many."""
    free = np.flatnonzero(domains.known < 0)
    n = min(n, len(free))
    if not n:
        return np.empty(0, np.int64)
    disputed = entropy(choice.votes)
    target = standardized(domains).target[free]
    z = target / np.maximum(np.linalg.norm(target, axis=1, keepdims=True), 1e-6)
    cluster, closeness = _clusters(z, n, np.random.default_rng([seed, 13]))
    chosen = []
    for number in range(n):
        members = np.flatnonzero(cluster == number)
        if len(members):
            central = members[np.argsort(-closeness[members], kind="stable")[: (len(members) + 1) // 2]]
            chosen.append(int(free[central[np.argmax(disputed[free[central]])]]))
    rest = np.setdiff1d(free, chosen)
    rest = rest[np.argsort(-disputed[rest], kind="stable")][: n - len(chosen)]
    rows = np.array([*chosen, *rest], np.int64)
    return rows[np.argsort(-disputed[rows], kind="stable")]


def _clusters(z: Rows, n: int, rng: np.random.Generator) -> tuple[Ints, Shares]:
    """Cluster of each row by spherical k-means, and its cosine with the center."""
    centers = z[rng.choice(len(z), n, replace=False)]
    for _ in range(_K_MEANS_STEPS):
        nearest = (z @ centers.T).argmax(1)
        sums = (nearest == np.arange(n)[:, None]).astype(np.float32) @ z
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(lengths > 0, sums / np.maximum(lengths, 1e-6), centers)
    similarity = z @ centers.T
    return similarity.argmax(1).astype(np.int64), similarity.max(1)
