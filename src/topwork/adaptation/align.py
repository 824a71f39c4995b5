"""Answers for a new domain from stored features: labels of the source, none (or a few) of the target.

In: columns of the source (N, D) with labels and of the target (M, D). Out: probabilities (M, C) for the images of the
target and, from :func:`distil`, one linear head that answers for both domains. Every function is one method on arrays;
which of them may be believed is decided in ``adaptation/guards.py``. Nothing here moves the network.

Notation: z are columns after alignment, p (M, C) probabilities on the target, H the entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.evaluation.domains import MCC_TEMPERATURE
from topwork.evaluation.predictions import softmax

Rows = NDArray[np.float32]
Shares = NDArray[np.float64]
Ints = NDArray[np.int64]
Loss = Callable[[Shares], tuple[float, Shares]]

RANK = 256  # columns kept of the aligned features: the rest is noise to a head and time to a solver
FLOOR = 0.1  # of the typical deviation, added to each column's: a column that hardly varies must not be blown up

PENALTY = 1e-2
N_NEIGHBORS = 5
MAX_STEPS = 200
_TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Domains:
    """Two domains on the same columns.

    Attributes:
        source: (N, D).
        labels: (N,) of the source, 0 to C - 1.
        target: (M, D).
        known: (M,) labels of the target that the user gave; -1 elsewhere.
    """

    source: Rows
    labels: Ints
    target: Rows
    known: Ints
    n_classes: int

    def moved(self, source: Rows, target: Rows) -> Domains:
        """The same images on other columns."""
        return Domains(source, self.labels, target, self.known, self.n_classes)


# ---- alignment


def standardized(domains: Domains) -> Domains:
    """Each domain centered and scaled by its own statistics, every image then brought to length sqrt(D).

    What batch-norm statistics of the target do inside a network (Li et al. 2016, arXiv 1603.04779), on features:
    ``(x - mean_d) / deviation_d``. It takes the class mix of the domains to be alike.
    """
    moved = [_unit((x - x.mean(0)) / _deviation(x.var(0))) for x in (domains.source, domains.target)]
    return _reduced(domains.moved(moved[0], moved[1]))


def same_mix(domains: Domains, probabilities: Shares) -> tuple[Domains, float]:
    """The target moved to where the source would lie had it the target's class mix.

    The shift is ``mean_t - sum_c pi_c m_c``, with m_c the means of the source's classes and pi the mean of the present
    probabilities, so that a target of few classes is not taken for one that is shifted. It is shrunk towards zero by
    its own noise (James and Stein 1961, positive part): a target that equals the source stays where it is.

    Returns:
        The moved domains, and the share of the shift that was believed, 0 to 1.
    """
    mean, deviation = domains.source.mean(0), _deviation(domains.source.var(0))
    source, target = (domains.source - mean) / deviation, (domains.target - mean) / deviation
    pi = (probabilities.sum(0) + 2.0 / domains.n_classes) / (len(probabilities) + 2.0)
    means = class_means(source, domains.labels, domains.n_classes)
    within = np.square(source - means[domains.labels]).mean(0)
    expected = pi @ means
    variance = within + pi @ np.square(means - expected)
    shift = target.mean(0) - expected
    noise = target.var(0).sum() / len(target) + variance.sum() / len(source)
    believed = float(max(0.0, 1.0 - noise / max(float(np.square(shift).sum()), _TINY)))
    floor = FLOOR * variance.mean()
    ratio = np.log((variance + floor) / (target.var(0) + floor + _TINY)) / 2
    noise_of_ratio = 0.5 / len(target) + 0.5 / len(source)
    ratio *= max(0.0, 1.0 - noise_of_ratio / max(float(np.square(ratio).mean()), _TINY))
    center = target.mean(0)
    target = (target - center) * np.exp(ratio) + center - believed * shift
    return _reduced(domains.moved(_unit(source), _unit(target))), believed


def class_means(rows: Rows, labels: Ints, n_classes: int) -> Shares:
    """(C, D) mean of each class; of all rows where a class has none."""
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
    """Both domains on their joint principal axes, each domain counting as much as the other."""
    halves = [x * np.float32(np.sqrt(0.5 / len(x))) for x in (domains.source, domains.target)]
    joint = np.concatenate(halves)
    n, d = joint.shape
    values, vectors = np.linalg.eigh(joint @ joint.T if n < d else joint.T @ joint)
    kept = np.flatnonzero(values > 1e-6 * max(values[-1], _TINY))[::-1][:RANK]
    axes = joint.T @ (vectors[:, kept] / np.sqrt(values[kept])) if n < d else vectors[:, kept]
    axes = axes / np.sqrt(max(float(values[kept].mean()), _TINY))
    return domains.moved(np.asarray(domains.source @ axes, np.float32), np.asarray(domains.target @ axes, np.float32))


# ---- losses on the target


def class_confusion(logits: Shares) -> tuple[float, Shares]:
    """Minimum class confusion: the share of the target's class correlation that lies off the diagonal.

    Jin et al. 2020, arXiv 1912.03699, eq. 3 to 6: with y = softmax(logits / T), weights ``w_i ~ 1 + exp(-H(y_i))`` of
    mean 1, and ``K = y' diag(w) y`` with its rows divided by their sums, the loss is ``(sum(K) - trace(K)) / C``. As in
    the authors' code no gradient goes through the weights. Ours takes all images of the target at once, not batches.

    Returns:
        The loss, 0 to 1, and its gradient (M, C) by the logits.
    """
    y = softmax(logits / MCC_TEMPERATURE)
    w = 1 + np.exp(-entropy(y))
    w = (w * (len(y) / w.sum()))[:, None]
    rows, diagonal = (w * y).sum(0) + 1e-9, (w * y * y).sum(0)
    n_classes = y.shape[1]
    loss = 1 - float((diagonal / rows).sum()) / n_classes
    by_y = -(2 * w * y / rows - w * diagonal / rows**2) / n_classes
    return loss, _through_softmax(y, by_y) / MCC_TEMPERATURE


def information_maximization(logits: Shares) -> tuple[float, Shares]:
    """Sure of every image, and of all classes alike: ``mean_i H(p_i) - H(mean_i p_i)``.

    Liang et al. 2020 (SHOT), arXiv 2002.08546, eq. 3 and 4. Ours moves a linear head where theirs moves the network.

    Returns:
        The loss and its gradient (M, C) by the logits.
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


def fit_head(
    domains: Domains, loss: Loss | None = None, start: Rows | None = None, extra: tuple[Ints, Ints] | None = None
) -> Rows:
    """(R + 1, C) weights and, last, biases: cross-entropy on what is labeled, and a loss on the target.

    Args:
        loss: of the target's logits, with its gradient; it counts as much as the cross-entropy of the source.
        extra: rows of the target and labels for them, on top of the known ones (self-training); each class counts alike.
    """
    z, targets, weights = _labeled(domains, extra)
    r, c = z.shape[1], domains.n_classes
    unlabeled = domains.target

    def value(flat: Shares) -> tuple[float, Shares]:
        v = flat.reshape(r + 1, c)
        logits = z @ v[:-1].astype(np.float32) + v[-1]
        top = logits.max(1, keepdims=True)
        total = np.exp(logits - top).sum(1, keepdims=True)
        found = float((weights * (top + np.log(total) - (logits * targets).sum(1, keepdims=True))).sum())
        by_logits = weights * (np.exp(logits - top) / total - targets)
        gradient = np.vstack([z.T @ by_logits.astype(np.float32), by_logits.sum(0)])
        if loss is not None:
            more, by_target = loss(unlabeled @ v[:-1].astype(np.float32) + v[-1])
            found += more
            gradient += np.vstack([unlabeled.T @ by_target.astype(np.float32), by_target.sum(0)])
        found += PENALTY / 2 * float(np.square(v[:-1]).sum())
        gradient[:-1] += PENALTY * v[:-1]
        return found, np.asarray(gradient, np.float64).ravel()

    from scipy.optimize import minimize

    begin = np.zeros((r + 1) * c) if start is None else np.asarray(start, np.float64).ravel()
    found = minimize(value, begin, jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS, "maxcor": 10})
    return np.asarray(found.x.reshape(r + 1, c), np.float32)


def answers(head: Rows, rows: Rows) -> Shares:
    """(M, C) probabilities of a head of :func:`fit_head`."""
    return softmax(rows @ head[:-1] + head[-1])


def _labeled(domains: Domains, extra: tuple[Ints, Ints] | None) -> tuple[Rows, Shares, Shares]:
    """Columns, one-hot targets and weights (n, 1) of the source, the known and the extra images."""
    eye = np.eye(domains.n_classes)
    z, targets = [domains.source], [eye[domains.labels]]
    weights = [np.full(len(domains.source), 1 / len(domains.source))]
    known = np.flatnonzero(domains.known >= 0)
    if len(known):
        z.append(domains.target[known])
        targets.append(eye[domains.known[known]])
        weights.append(np.full(len(known), trust_in(len(known), domains.n_classes) / len(known)))
    if extra is not None and len(extra[0]):
        rows, labels = extra
        counts = np.bincount(labels, minlength=domains.n_classes)
        share = 1 / counts[labels]
        z.append(domains.target[rows])
        targets.append(eye[labels])
        weights.append(share / share.sum())
    return np.concatenate(z), np.concatenate(targets), np.concatenate(weights)[:, None]


def trust_in(n_known: int, n_classes: int) -> float:
    """Weight of all known labels of the target together, against 1 for those of the source: half at 5 a class."""
    return n_known / (n_known + 5.0 * n_classes)


def self_training(domains: Domains, probabilities: Shares, n_rounds: int = 4) -> Shares:
    """The surest images of each predicted class become training images, more of them in every round.

    Class-balanced self-training: Zou et al. 2018, arXiv 1810.07911, eq. 5: the same share of every class is taken, so
    that large or easy classes do not swallow the others. Ours refits a linear head.
    """
    for number in range(n_rounds):
        share = 0.8 * (number + 1) / n_rounds
        predicted = probabilities.argmax(1)
        rows = []
        for label in np.unique(predicted):
            members = np.flatnonzero((predicted == label) & (domains.known < 0))
            surest = members[np.argsort(-probabilities[members, label], kind="stable")]
            rows.append(surest[: int(np.ceil(share * len(surest)))])
        chosen = np.concatenate(rows)
        probabilities = answers(fit_head(domains, extra=(chosen, predicted[chosen])), domains.target)
    return probabilities


def soft_prototypes(domains: Domains, probabilities: Shares, n_rounds: int = 10, sharpness: float = 20.0) -> Shares:
    """Each class is the mean direction of the target's images weighted by their probabilities; nearest one answers.

    The centroids of SHOT (arXiv 2002.08546, eq. 5) and of T3A (Iwasawa and Matsuo 2021), with soft weights and known
    labels: ``k_c = sum_i p_ic z_i + pull * m_c``, ``p_ic ~ exp(sharpness * cos(z_i, k_c))``. Ours keeps a pull towards
    the mean m_c of the source's class, worth 5 images, so that a class with few images stays where it was.
    """
    pull = 5.0
    means = class_means(domains.source, domains.labels, domains.n_classes)
    z = domains.target / np.maximum(np.linalg.norm(domains.target, axis=1, keepdims=True), 1e-6)
    typical = float(np.linalg.norm(domains.target, axis=1).mean())
    for _ in range(n_rounds):
        p = clamped(probabilities, domains.known)
        prototypes = p.T @ domains.target + pull * means
        prototypes /= np.maximum(np.linalg.norm(prototypes, axis=1, keepdims=True), 1e-6 * typical)
        probabilities = softmax(sharpness * (z @ prototypes.T))
    return probabilities


def clamped(probabilities: Shares, known: Ints) -> Shares:
    """The probabilities, with certainty where the label is known."""
    rows = np.flatnonzero(known >= 0)
    result = np.array(probabilities, np.float64)
    result[rows] = np.eye(result.shape[1])[known[rows]]
    return result


def combined(answers_of: list[Shares]) -> Shares:
    """Mean of several methods' probabilities: where they disagree, nobody is sure."""
    return np.asarray(np.mean(answers_of, axis=0))


# ---- neighbors


def nearest(rows: Rows, k: int = N_NEIGHBORS) -> Ints:
    """(M, k) the most similar other images by cosine; fewer than k where there are no more."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    k = max(0, min(k, len(rows) - 1))
    found = np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -2
        found[start : start + 1024] = np.argpartition(-similarity, max(k - 1, 0), axis=1)[:, :k]
    return found


def neighbor_agreement(predicted: Ints, neighbors: Ints) -> Shares:
    """(M,) share of an image's neighbors that are given its own class."""
    if not neighbors.shape[1]:
        return np.zeros(len(predicted))
    return np.asarray((predicted[neighbors] == predicted[:, None]).mean(1))


# ---- one head for both domains


def distil(
    source: Rows, source_answers: Shares, target: Rows, target_answers: Shares, penalty: float, share: float = 0.5
) -> Rows:
    """(D + 1, C) one linear head that gives the labels of the source and the adapted answers on the target.

    Hinton et al. 2015, arXiv 1503.02531, at temperature 1: cross-entropy with the teacher's probabilities. Teacher and
    head see different columns: the methods above center each domain by itself, which at test time would ask which
    domain an image is from. Some hundred features tell the domains apart on their own, so one head can answer for
    both.

    Args:
        source, target: (N, D), (M, D) the columns that the head will see.
        source_answers, target_answers: (N, C), (M, C) labels as one-hot rows, or probabilities.
        penalty: of the squared weights, for columns scaled to a mean variance of 1.
        share: of the target in the loss.
    """
    from topwork.features.logistic import SoftmaxRegression

    joint = np.concatenate([source, target]).astype(np.float32)
    wanted = np.concatenate([source_answers, target_answers])
    center = joint.mean(0, dtype=np.float64).astype(np.float32)
    spread = np.sqrt(np.mean(np.square(joint - center), axis=0, dtype=np.float64))
    scale = (spread + FLOOR * max(float(np.sqrt(np.mean(spread**2))), 1e-6)).astype(np.float32)
    weights = np.concatenate(
        [np.full(len(source), (1 - share) / len(source)), np.full(len(target), share / len(target))]
    )
    problem = SoftmaxRegression((joint - center) / scale, wanted.argmax(1), wanted.shape[1], weights[None, :])
    problem.target = np.asarray(wanted[:, None, :], np.float32)
    for step in (1.0, 0.1):
        if step > penalty:
            problem.solve(step, tolerance=1e-2)
    problem.solve(penalty, tolerance=1e-5, max_steps=200)
    weight, bias = problem.solution()
    weight = weight[0] / scale
    return np.asarray(np.vstack([weight.T, bias[0] - weight @ center]), np.float32)
