"""Predictions for a new domain from stored features, with labels of the source and few or no labels of the target.

In: features of the source (N, D) with labels and of the target (M, D). Out: probabilities (M, C) on the target. Each
function is one published method. ``guards.py`` decides which to trust; ``adapted_head.py`` then fits one head for both
domains. The network itself is not trained here.

Notation: z are features after alignment, p (M, C) probabilities on the target, H the entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.evaluation import similarity
from topwork.evaluation.domains import MCC_TEMPERATURE, energy_distance
from topwork.evaluation.perturb import blur, edges, gray
from topwork.evaluation.predictions import softmax
from topwork.evaluation.similarity import unit_rows
from topwork.features.logistic import SoftmaxRegression

Rows = NDArray[np.float32]
Shares = NDArray[np.float64]
Ints = NDArray[np.int64]
Loss = Callable[[NDArray[np.floating]], tuple[float, Shares]]

RANK = 256  # dimensions of the aligned features; more only add noise and time
FLOOR = 0.1  # of the mean standard deviation, added to each, so that nearly constant features are not amplified
PENALTY = 1e-2
N_NEIGHBORS = 5
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Domains:
    """Two domains with the same features.

    Attributes:
        source: (N, D).
        labels: (N,) of the source, 0 to C - 1.
        target: (M, D).
        known: (M,) labels of the target given by the user, or -1.
    """

    source: Rows
    labels: Ints
    target: Rows
    known: Ints
    n_classes: int


# ---- alignment


def standardized(domains: Domains, restyled: Rows | None = None) -> Domains:
    """Each domain centered and scaled by its own statistics, then each row normalized to length sqrt(D).

    Like adapting batch-norm statistics (Li et al. 2016, arXiv 1603.04779), but on features: ``(x - mean_d) /
    deviation_d``. This assumes that both domains have a similar class mix.

    Args:
        restyled: (N, D) restyled source images (see the end of this file): a third domain with the source's labels.
    """
    parts = [domains.source, domains.target] + ([] if restyled is None else [restyled])
    source, target, *more = (_unit((x - x.mean(0)) / _deviation(x.var(0))) for x in parts)
    labels = np.concatenate([domains.labels] * (1 + len(more)))
    return _reduced(replace(domains, source=np.concatenate([source, *more]), labels=labels, target=target))


def class_mix_matched(domains: Domains, probabilities: Shares) -> Domains:
    """Both domains scaled alike, the target shifted to match a source with the target's class mix.

    The shift is ``mean_t - sum_c pi_c m_c``, with m_c the class means of the source and pi the mean of the probabilities,
    so that a different class mix is not mistaken for a shift. It is shrunk towards zero according to its noise
    (positive-part James-Stein, 1961).
    """
    mean, deviation = domains.source.mean(0), _deviation(domains.source.var(0))
    source, target = (domains.source - mean) / deviation, (domains.target - mean) / deviation
    pi = (probabilities.sum(0) + 2.0 / domains.n_classes) / (len(probabilities) + 2.0)
    shift = target.mean(0) - pi @ class_means(source, domains.labels, domains.n_classes)
    noise = target.var(0).sum() / len(target) + source.var(0).sum() / len(source)
    kept = max(0.0, 1.0 - noise / max(float(np.square(shift).sum()), _TINY))
    return _reduced(replace(domains, source=_unit(source), target=_unit(target - kept * shift)))


def class_means(rows: Rows, labels: Ints, n_classes: int) -> Shares:
    """(C, D) mean of each class; of all rows if a class has none."""
    means = np.tile(rows.mean(0, dtype=np.float64), (n_classes, 1))
    for label in np.unique(labels):
        means[label] = rows[labels == label].mean(0, dtype=np.float64)
    return means


def _deviation(variance: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.asarray(np.sqrt(variance) + FLOOR * max(float(np.sqrt(variance.mean())), 1e-6))


def _unit(rows: NDArray[np.floating]) -> Rows:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * (np.sqrt(rows.shape[1]) / np.maximum(lengths, 1e-6)), np.float32)


def _reduced(domains: Domains) -> Domains:
    """Both domains projected onto joint principal axes, with equal weight."""
    halves = [x * np.float32(np.sqrt(0.5 / len(x))) for x in (domains.source, domains.target)]
    joint = np.concatenate(halves)
    n, d = joint.shape
    values, vectors = np.linalg.eigh(joint @ joint.T if n < d else joint.T @ joint)
    kept = np.flatnonzero(values > 1e-6 * max(values[-1], _TINY))[::-1][:RANK]
    axes = joint.T @ (vectors[:, kept] / np.sqrt(values[kept])) if n < d else vectors[:, kept]
    axes = axes / np.sqrt(max(float(values[kept].mean()), _TINY))
    return replace(
        domains, source=(domains.source @ axes).astype(np.float32), target=(domains.target @ axes).astype(np.float32)
    )


# ---- losses on the target


def class_confusion(logits: NDArray[np.floating]) -> tuple[float, Shares]:
    """Minimum class confusion: the off-diagonal share of the target's class correlation.

    Jin et al. 2020, arXiv 1912.03699, eq. 3 to 6: with y = softmax(logits / T), weights ``w_i ~ 1 + exp(-H(y_i))`` of
    mean 1, and ``K = y' diag(w) y`` with its rows divided by their sums, the loss is ``(sum(K) - trace(K)) / C``. As in
    the authors' code, the weights get no gradient. Ours uses all images of the target at once, not batches.

    Returns:
        The loss, 0 to 1, and its gradient (M, C) with respect to the logits.
    """
    y = softmax(logits / MCC_TEMPERATURE)
    w = 1 + np.exp(-entropy(y))
    w = (w * (len(y) / w.sum()))[:, None]
    rows, diagonal = (w * y).sum(0) + 1e-9, (w * y * y).sum(0)
    n_classes = y.shape[1]
    loss = 1 - float((diagonal / rows).sum()) / n_classes
    by_y = -(2 * w * y / rows - w * diagonal / rows**2) / n_classes
    return loss, _through_softmax(y, by_y) / MCC_TEMPERATURE


def information_maximization(logits: NDArray[np.floating]) -> tuple[float, Shares]:
    """Confident on every image, and balanced over the classes: ``mean_i H(p_i) - H(mean_i p_i)``.

    Liang et al. 2020 (SHOT), arXiv 2002.08546, eq. 3 and 4. They train the network, we a linear head.

    Returns:
        The loss and its gradient (M, C) with respect to the logits.
    """
    p = softmax(logits)
    mean = p.mean(0)
    loss = float(entropy(p).mean() + (mean * np.log(mean + _TINY)).sum())
    by_p = (np.log(mean + _TINY) - np.log(p + _TINY)) / len(p)
    return loss, _through_softmax(p, by_p)


def entropy(probabilities: Shares) -> Shares:
    """(M,) entropy of each row in nats."""
    return np.asarray(-(probabilities * np.log(probabilities + _TINY)).sum(1))


def _through_softmax(p: Shares, by_p: Shares) -> Shares:
    return np.asarray(p * (by_p - (p * by_p).sum(1, keepdims=True)))


# ---- heads


class AlignedHead:
    """A linear head on aligned features; every :meth:`fit` starts from the head fitted on the labels only.

    Minimizes cross-entropy on the labeled images (total weight: 1 for the source, :func:`trust_in` for the target) plus
    a loss on the target with weight 1.
    """

    def __init__(self, domains: Domains) -> None:
        self.domains = domains
        n, labels = len(domains.source), np.concatenate([domains.labels, np.maximum(domains.known, 0)])
        self._weights = np.concatenate([np.full(n, 1 / n), _known_weights(domains)])
        self._problem = SoftmaxRegression(
            np.concatenate([domains.source, domains.target]), labels, domains.n_classes, self._weights[None]
        )
        self._start = self._problem.w
        self._probabilities = self.fit()
        self._start = self._problem.w

    def probabilities(self) -> Shares:
        """(M, C) of the head fitted on the labels only."""
        return self._probabilities

    def fit(self, loss: Loss | None = None, pseudo: tuple[Ints, Ints] | None = None) -> Shares:
        """(M, C) probabilities on the target, after fitting with another loss or pseudo-labels.

        Args:
            loss: maps the target's logits to a value and its gradient.
            pseudo: rows of the target and their pseudo-labels; all classes weigh the same.
        """
        n, problem = len(self.domains.source), self._problem
        weights, labels = self._weights.copy(), np.maximum(self.domains.known, 0)
        if pseudo is not None and len(pseudo[0]):
            share = 1 / np.bincount(pseudo[1], minlength=self.domains.n_classes)[pseudo[1]]
            labels[pseudo[0]] = pseudo[1]
            weights[n + pseudo[0]] += share / share.sum()
        total = float(weights.sum())
        problem.w = self._start
        problem.label(np.concatenate([self.domains.labels, labels]))
        problem.weigh(weights[None])

        def on_target(logits: NDArray[np.floating]) -> tuple[float, Shares]:
            value, by_target = loss(logits[n:]) if loss else (0.0, np.zeros(0))
            by_logits = np.zeros(logits.shape)
            by_logits[n:] = by_target / total
            return value / total, by_logits

        problem.extra_loss = on_target if loss else None
        problem.solve(PENALTY / total, tolerance=1e-6, max_steps=200)
        return softmax(problem.logits()[0, n:])


def _known_weights(domains: Domains) -> Shares:
    is_known = domains.known >= 0
    n_known = int(is_known.sum())
    return np.where(is_known, trust_in(n_known, domains.n_classes) / max(n_known, 1), 0.0)


def trust_in(n_known: int, n_classes: int) -> float:
    """Total weight of the known target labels, relative to 1 for the source: one half at 5 per class."""
    return n_known / (n_known + 5.0 * n_classes)


def self_training(head: AlignedHead, n_rounds: int = 4) -> Shares:
    """The most confident images of each predicted class become training images, more in every round.

    Class-balanced self-training: Zou et al. 2018, arXiv 1810.07911, eq. 5: the same share of every class, so that large
    or easy classes do not dominate. Ours refits a linear head.
    """
    probabilities = head.probabilities()
    for number in range(n_rounds):
        share = 0.8 * (number + 1) / n_rounds
        predicted = probabilities.argmax(1)
        rows = []
        for label in np.unique(predicted):
            members = np.flatnonzero((predicted == label) & (head.domains.known < 0))
            best = members[np.argsort(-probabilities[members, label], kind="stable")]
            rows.append(best[: int(np.ceil(share * len(best)))])
        chosen = np.concatenate(rows)
        probabilities = head.fit(pseudo=(chosen, predicted[chosen]))
    return probabilities


def soft_prototypes(domains: Domains, probabilities: Shares, n_rounds: int = 10, sharpness: float = 20.0) -> Shares:
    """Each class becomes the mean direction of the target's images, weighted by probability; the nearest class wins.

    The centroids of SHOT (arXiv 2002.08546, eq. 5) and of T3A (Iwasawa and Matsuo 2021), with soft weights and known
    labels: ``k_c = sum_i p_ic z_i + pull * m_c``, ``p_ic ~ exp(sharpness * cos(z_i, k_c))``. Ours pulls towards the
    source's class mean m_c, worth 5 images, so that classes with few images stay in place.
    """
    pull = 5.0
    means = class_means(domains.source, domains.labels, domains.n_classes)
    z = unit_rows(domains.target)
    typical = float(np.linalg.norm(domains.target, axis=1).mean())
    for _ in range(n_rounds):
        p = clamped(probabilities, domains.known)
        prototypes = p.T @ domains.target + pull * means
        prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-6 * typical)
        probabilities = softmax(sharpness * (z @ prototypes.T))
    return probabilities


def clamped(probabilities: Shares, known: Ints) -> Shares:
    """The probabilities, with 1 for known labels."""
    rows = np.flatnonzero(known >= 0)
    result = np.array(probabilities, np.float64)
    result[rows] = np.eye(result.shape[1])[known[rows]]
    return result


def averaged(probabilities: list[Shares]) -> Shares:
    """Mean of several methods' probabilities; low confidence if they disagree."""
    return np.asarray(np.mean(probabilities, axis=0))


# ---- neighbors


def nearest(rows: Rows, k: int = N_NEIGHBORS) -> Ints:
    """(M, k) the most similar other images by cosine; fewer than k if there are no more."""
    every = np.arange(len(rows))
    return similarity.nearest(unit_rows(rows), every, every, k)[0]


def neighbor_agreement(predicted: Ints, neighbors: Ints) -> Shares:
    """(M,) share of each image's neighbors with the same predicted class."""
    if not neighbors.shape[1]:
        return np.zeros(len(predicted))
    return np.asarray((predicted[neighbors] == predicted[:, None]).mean(1))


# ---- restyled source images
# To a network trained on photographs, drawings look very different; line drawings made from the photographs lie in between.
# A small sample decides which style is tried: the one that brings it clearly nearest to the target.

N_SAMPLE = 60
NEARER = 0.8  # relative distance to the target below which a style is worth embedding all images
LEVELS = 4  # per channel, of flat colors


def flat_colors(images: Pixels) -> Pixels:
    """A few colors without fine detail, as in cartoons and posters: (N, H, W, 3)."""
    step = 256 // LEVELS
    return np.asarray(blur(images, 0.008) // step * step + step // 2, np.uint8)


def inverted(images: Pixels) -> Pixels:
    """Negatives."""
    return np.asarray(255 - images, np.uint8)


STYLES: dict[str, Callable[[Pixels], Pixels]] = {
    "line drawings": edges,
    "gray": gray,
    "flat colors": flat_colors,
    "blurred": lambda images: blur(images, 0.015),
    "inverted": inverted,
}


def nearest_style(plain: Rows, styled: Mapping[str, Rows], target: Rows, seed: int = 0) -> str | None:
    """The restyling whose images are nearest to the target, if they are clearly nearer than the plain ones.

    Args:
        plain: (n, D) features of a sample of the source.
        styled: the same images in each style.
    """

    def distance(rows: Rows) -> float:
        return energy_distance(rows, target, seed=seed, n_permutations=1).energy

    found = {name: distance(rows) for name, rows in styled.items()}
    best = min(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] < NEARER * distance(plain) else None
