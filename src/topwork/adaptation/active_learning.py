"""Which images of a new domain are most worth labeling.

With few labels, typical images help most (Hacohen et al. 2022, TypiClust, arXiv 2202.02794). The target is clustered
into as many clusters as images are requested. Of the half of a cluster nearest to its center, the image on which the
methods disagree most is chosen. TypiClust takes the most typical image; here, an existing model adds its uncertainty.
"""

from __future__ import annotations

import numpy as np

from topwork.adaptation.align import Domains, Ints, entropy, standardized
from topwork.adaptation.guards import Choice
from topwork.evaluation.similarity import k_means, unit_rows


def images_to_label(domains: Domains, choice: Choice, n: int, seed: int = 0) -> Ints:
    """(n,) rows of unlabeled target images, largest disagreement first; fewer if there are not enough."""
    free = np.flatnonzero(domains.known < 0)
    n = min(n, len(free))
    if not n:
        return np.empty(0, np.int64)
    disputed = entropy(choice.votes)
    z = unit_rows(standardized(domains).target[free])
    cosine = z @ k_means(z, n, np.random.default_rng([seed, 13]), n_steps=10).T
    cluster, closeness = cosine.argmax(1), cosine.max(1)
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
