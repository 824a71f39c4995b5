"""Which images of a new domain are most worth labeling, and what labeling them should bring.

In: two domains and what was chosen without (more) labels. Out: rows of the target with the reason, and the gain to
expect. The gain is not known without labels: the methods that disagree are taken for the truth in turn, and what the
labels would bring under each of them is the range that is stated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from topwork.adaptation.align import (
    Domains,
    Ints,
    Shares,
    answers,
    clamped,
    class_confusion,
    entropy,
    fit_head,
    soft_prototypes,
    standardized,
)
from topwork.adaptation.guards import Choice

_K_MEANS_STEPS = 10


@dataclass(frozen=True, eq=False)
class Asked:
    """Images to label.

    Attributes:
        rows: (n,) of the target, the most useful first.
        uncertainty: (n,) entropy of the methods' votes, in nats.
        gain: expected gain in accuracy on the other images if they are labeled; low and high over what may be true.
    """

    rows: Ints
    uncertainty: Shares
    gain: float
    gain_low: float
    gain_high: float


def images_to_label(domains: Domains, choice: Choice, n: int, seed: int = 0) -> Asked:
    """The images most worth labeling: from every region of the target one, typical of it and disputed.

    Few labels bring most on typical images (Hacohen et al. 2022, TypiClust, arXiv 2202.02794): the target is cut into n
    clusters, and in each the most disputed image of the half nearest to its center is taken. Ours looks at disputes,
    too, because a model exists already.
    """
    aligned = standardized(domains)
    free = np.flatnonzero(domains.known < 0)
    n = min(n, len(free))
    if not n:
        return Asked(np.empty(0, np.int64), np.empty(0), 0.0, 0.0, 0.0)
    disputed = entropy(choice.consensus)
    z = aligned.target[free] / np.maximum(np.linalg.norm(aligned.target[free], axis=1, keepdims=True), 1e-6)
    cluster, closeness = _clusters(z, n, np.random.default_rng([seed, 13]))
    chosen = []
    for number in range(n):
        members = np.flatnonzero(cluster == number)
        if len(members):
            central = members[np.argsort(-closeness[members], kind="stable")[: (len(members) + 1) // 2]]
            chosen.append(int(free[central[np.argmax(disputed[free[central]])]]))
    rest = [row for row in free[np.argsort(-disputed[free], kind="stable")].tolist() if row not in set(chosen)]
    rows = np.array([*chosen, *rest[: n - len(chosen)]], np.int64)
    rows = rows[np.argsort(-disputed[rows], kind="stable")]
    gains = _expected_gains(aligned, rows)
    return Asked(rows, disputed[rows], float(np.mean(gains)), float(min(gains)), float(max(gains)))


def _clusters(
    z: np.ndarray[tuple[int, ...], np.dtype[np.float32]], n: int, rng: np.random.Generator
) -> tuple[Ints, Shares]:
    """Cluster of each row by spherical k-means, and its cosine with the center."""
    centers = z[rng.choice(len(z), n, replace=False)]
    for _ in range(_K_MEANS_STEPS):
        similarity = z @ centers.T
        nearest = similarity.argmax(1)
        sums = (nearest == np.arange(n)[:, None]).astype(np.float32) @ z
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(lengths > 0, sums / np.maximum(lengths, 1e-6), centers)
    similarity = z @ centers.T
    return similarity.argmax(1).astype(np.int64), similarity.max(1)


def _expected_gains(aligned: Domains, rows: Ints) -> list[float]:
    """Gain on the images not asked for, with each of the methods' answers taken for the truth."""
    start = fit_head(aligned)
    plain = answers(start, aligned.target)
    truths = [
        plain,
        soft_prototypes(aligned, plain),
        answers(fit_head(aligned, class_confusion, start), aligned.target),
    ]
    others = np.setdiff1d(np.flatnonzero(aligned.known < 0), rows)
    if not len(others):
        return [0.0]
    before = truths[-1].argmax(1)  # the method that is helped with labels, without them
    gains = []
    for truth in (clamped(t, aligned.known).argmax(1) for t in truths):
        known = aligned.known.copy()
        known[rows] = truth[rows]
        helped = replace(aligned, known=known)
        after = answers(fit_head(helped, class_confusion, start), aligned.target).argmax(1)
        gains.append(float((after[others] == truth[others]).mean() - (before[others] == truth[others]).mean()))
    return gains
