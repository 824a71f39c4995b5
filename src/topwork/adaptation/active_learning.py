"""Which images of a new domain are most worth labeling.

Few labels bring most on typical images (Hacohen et al. 2022, TypiClust, arXiv 2202.02794): the target is cut into as many
clusters as images are asked for, and in each, of the half nearest to its center, the image is taken on which the
methods disagree most. Theirs takes the most typical one; a model that exists already knows where it is in doubt.
"""

from __future__ import annotations

import numpy as np

from topwork.adaptation.align import Domains, Ints, entropy, standardized
from topwork.adaptation.guards import Choice
from topwork.evaluation.similarity import k_means, unit_rows


def images_to_label(domains: Domains, choice: Choice, n: int, seed: int = 0) -> Ints:
    """(n,) rows of unlabeled target images, those with most disagreement first; fewer if there are not enough."""
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
