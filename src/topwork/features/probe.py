"""The probe: a linear head on frozen features, with everything about it chosen by cross-validation on train.

In: Features, labels. Out: :class:`Probe`: the head, the table of what was tried, and out-of-fold logits for whatever
needs honest predictions on training images (temperature, suspected labels). Valid and test are never looked at.

Multinomial logistic regression with an L2 penalty. The features are first rotated onto the eigenvectors of their
covariance, which leaves the penalty as it is and makes the curvature of the loss nearly diagonal (for each class about
the covariance times the mean of p (1 - p); Böhning 1992, doi 10.1007/BF00048682, bounds it so), so that a diagonal
preconditioner lets L-BFGS converge in few steps; and all folds are fitted at once, so the features are read once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.errors import UsageError
from topwork.features.embed import Features
from topwork.models.head import FeatureTransform, Floats, LinearHead, Power, powered

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4)  # strong to weak, on the mean loss
BALANCE_RATIO = 3.0  # class weights when the largest class is more than this many times the smallest
# Cross-validation sees at most this many multiply-adds a step: above, fewer folds and then fewer images.
STEP_BUDGET = 1.2e9
MAX_FOLDS = 5
# An extended head is no timm model, so it has to be ahead by more than this many standard errors of the difference in
# cross-entropy (the score that everything here is chosen by; accuracy alone is too coarse to tell heads apart).
STANDARD_ERRORS = 1.0
SMALL_LOSS = 0.1  # below this, a step's gain is compared with it instead of with the loss


@dataclass(frozen=True)
class Candidate:
    """One way to build the columns of the head."""

    name: str
    blocks: tuple[str, ...]
    power: Power
    scale: bool

    @property
    def plain(self) -> bool:
        """Whether it reads the last features through an affine map alone."""
        return self.blocks == ("last",) and self.power == "none"


CANDIDATES = (
    Candidate("z-score", ("last",), "none", True),
    Candidate("raw", ("last",), "none", False),
    Candidate("square root", ("last",), "sqrt", True),
    Candidate("unit length", ("last",), "unit", False),
    Candidate("square root, with earlier stages", ("last", "stages"), "sqrt", True),
)


@dataclass(frozen=True)
class Trial:
    """What cross-validation found for a candidate at one penalty. ``standard_error`` is of the accuracy."""

    candidate: str
    plain: bool
    penalty: float
    accuracy: float
    standard_error: float
    cross_entropy: float
    n_images: int
    n_folds: int
    chosen: bool = False


@dataclass(frozen=True)
class Probe:
    """A fitted probe.

    Attributes:
        head: fitted on all training rows.
        trials: everything tried, in order; one is marked chosen.
        rows: (M,) positions among the training rows that cross-validation used.
        out_of_fold_logits: (M, C) logits for those rows from heads that did not see them.
        reason: one sentence on why this head.
    """

    head: LinearHead
    trials: tuple[Trial, ...]
    rows: NDArray[np.int64]
    out_of_fold_logits: NDArray[np.float64]
    class_weights: NDArray[np.float64] | None
    reason: str


def fit_probe(
    features: Features,
    labels: Sequence[int] | NDArray[np.int64],
    n_classes: int,
    *,
    rows: NDArray[np.int64] | None = None,
    groups: Sequence[int] | None = None,
    head: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    balance: str = "auto",
) -> Probe:
    """Chooses and fits a linear head on the training rows.

    Args:
        labels: (N,) class indices for all of ``features``.
        rows: training rows; all by default.
        groups: (N,) group of each row; a group never straddles two folds.
        head: ``plain``, ``extended``, or ``auto``: an extended one wins only when it is clearly ahead of the best plain
            one (more than one standard error of the paired difference in cross-entropy, and ahead in accuracy).

        balance: ``auto``, ``none``, or ``weights`` inverse to the class counts (``sampler`` is the same for a probe, which
            sees all images at once).

    Raises:
        UsageError: fewer than two classes in the training rows.
    """
    rows = np.arange(len(features)) if rows is None else np.asarray(rows)
    y = np.asarray(labels, np.int64)[rows]
    if len(np.unique(y)) < 2:
        raise UsageError("Training needs images of at least two classes.")
    group = np.asarray(groups)[rows] if groups is not None else np.arange(len(rows))
    candidates = [c for c in CANDIDATES if c.plain or head != "plain"]
    data = _Blocks(features, rows)
    if not data.has_stages:
        candidates = [c for c in candidates if "stages" not in c.blocks]
    folds, chosen_rows = _folds(y, group, n_classes, data.width(candidates[0]), seed)
    weights = class_weights(y, n_classes, balance)
    search = _Search(data, y, n_classes, chosen_rows, folds, weights)
    for number, candidate in enumerate(candidates):
        search.try_candidate(candidate)
        if on_progress:
            on_progress(number + 1, len(candidates) + 1)
    best, reason = search.choose(head)
    # The penalty is on the mean loss, so with more images than a fold saw, proportionally less of it is right.
    n_seen = len(chosen_rows) * (1 - 1 / (folds.max() + 1))
    fitted = _fit_final(data, best.candidate, y, n_classes, best.penalty * n_seen / len(y), weights)
    if on_progress:
        on_progress(len(candidates) + 1, len(candidates) + 1)
    return Probe(fitted, search.trials(best), chosen_rows, best.logits, weights, reason)


def class_weights(y: NDArray[np.int64], n_classes: int, balance: str = "auto") -> NDArray[np.float64] | None:
    """(C,) weights inverse to the class counts, or None when ``auto`` finds the classes balanced well enough."""
    counts = np.bincount(y, minlength=n_classes)
    present = counts[counts > 0]
    if balance == "none" or (balance == "auto" and present.max() <= BALANCE_RATIO * present.min()):
        return None
    return np.where(counts > 0, len(y) / (len(present) * np.maximum(counts, 1)), 0.0)


# ---- choosing


class _Blocks:
    """Feature blocks of the training rows, read from the store once each."""

    def __init__(self, features: Features, rows: NDArray[np.int64]) -> None:
        self._features = features
        self._rows = rows
        self._read: dict[str, NDArray[np.float16]] = {}
        self.has_stages = self["stages"].shape[1] > 0 if len(rows) else False

    def __getitem__(self, name: str) -> NDArray[np.float16]:
        if name not in self._read:
            self._read[name] = self._features.block(name, self._rows)
        return self._read[name]

    def width(self, candidate: Candidate) -> int:
        return sum(self[name].shape[1] for name in candidate.blocks)

    def columns(self, candidate: Candidate, rows: NDArray[np.int64] | slice) -> tuple[Floats, FeatureTransform]:
        """Centred and scaled columns of some rows, and the transform fitted on those rows."""
        x = powered({name: self[name][rows] for name in candidate.blocks}, candidate.blocks, candidate.power)
        mean = x.mean(0, dtype=np.float64).astype(np.float32)
        x -= mean
        spread = np.sqrt(np.mean(np.square(x), axis=0, dtype=np.float64))
        typical = float(np.sqrt(np.mean(spread**2))) or 1.0
        # A column that hardly varies must not be blown up to unit variance: it is mostly rounding.
        scale = spread + 1e-2 * typical if candidate.scale else np.full(len(spread), typical)
        transform = FeatureTransform(candidate.blocks, candidate.power, mean, scale.astype(np.float32))
        return x / transform.scale, transform


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    penalty: float
    logits: NDArray[np.float64]
    correct: NDArray[np.bool_]
    losses: NDArray[np.float64]

    @property
    def cross_entropy(self) -> float:
        """Mean loss out of fold."""
        return float(self.losses.mean())


class _Search:
    """Cross-validates candidates along the path of penalties, on the same rows and folds."""

    def __init__(
        self,
        data: _Blocks,
        y: NDArray[np.int64],
        n_classes: int,
        rows: NDArray[np.int64],
        folds: NDArray[np.int64],
        weights: NDArray[np.float64] | None,
    ) -> None:
        self.data, self.rows, self.folds = data, rows, folds
        self.y, self.n_classes = y[rows], n_classes
        each = np.ones(len(rows)) if weights is None else weights[self.y]
        self.sample_weights = each * (folds[None, :] != np.arange(folds.max() + 1)[:, None])
        self.tried: list[_Tried] = []

    def try_candidate(self, candidate: Candidate) -> None:
        """The whole path for the first candidate, its neighbourhood for the others."""
        x, _ = self.data.columns(candidate, self.rows)
        problem = SoftmaxRegression(x, self.y, self.n_classes, self.sample_weights)
        path: tuple[float, ...] = PENALTIES
        if self.tried:
            best = PENALTIES.index(min(self.tried, key=lambda t: t.cross_entropy).penalty)
            path = PENALTIES[max(0, best - 1) : best + 2]
        lowest = np.inf
        for penalty in path:
            problem.solve(penalty, tolerance=1e-3)
            tried = self._judge(candidate, penalty, problem.logits())
            self.tried.append(tried)
            if tried.cross_entropy > lowest * 1.02:
                break  # past the best penalty of this path
            lowest = min(lowest, tried.cross_entropy)

    def choose(self, head: str) -> tuple[_Tried, str]:
        """The best plain one, unless an extended one is clearly ahead."""
        plain = min((t for t in self.tried if t.candidate.plain), key=lambda t: t.cross_entropy)
        others = [t for t in self.tried if not t.candidate.plain]
        if head == "plain" or not others:
            return (
                plain,
                f"Plain head ({plain.candidate.name}), the best of its kind by cross-entropy in cross-validation.",
            )
        best = min(others, key=lambda t: t.cross_entropy)
        if head == "extended":
            return best, f"Extended head ({best.candidate.name}), as asked for."
        gain, error = paired(plain.losses - best.losses)
        ahead, _ = paired(best.correct.astype(float) - plain.correct)
        numbers = f"cross-entropy lower by {gain:.4f}, standard error {error:.4f}; accuracy {100 * ahead:+.2f} points"
        if gain > STANDARD_ERRORS * error and ahead > 0:
            return (
                best,
                f"Extended head ({best.candidate.name}): ahead of the best plain one in cross-validation: {numbers}.",
            )
        name = plain.candidate.name
        return plain, f"Plain head ({name}): an extended one ({best.candidate.name}) is not clearly better: {numbers}."

    def trials(self, chosen: _Tried) -> tuple[Trial, ...]:
        return tuple(
            Trial(
                candidate=t.candidate.name,
                plain=t.candidate.plain,
                penalty=t.penalty,
                accuracy=float(t.correct.mean()),
                standard_error=float(t.correct.std() / np.sqrt(len(t.correct))),
                cross_entropy=t.cross_entropy,
                n_images=len(self.rows),
                n_folds=int(self.folds.max()) + 1,
                chosen=t is chosen,
            )
            for t in self.tried
        )

    def _judge(self, candidate: Candidate, penalty: float, logits: NDArray[np.float32]) -> _Tried:
        n = np.arange(len(self.y))
        own = logits[self.folds, n].astype(np.float64)
        return _Tried(candidate, penalty, own, own.argmax(1) == self.y, cross_entropies(own, self.y))


def cross_entropies(logits: NDArray[np.float64], y: NDArray[np.int64]) -> NDArray[np.float64]:
    """(N,) losses of (N, C) logits."""
    shifted = logits - logits.max(1, keepdims=True)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return losses


def paired(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Mean of paired differences and its standard error."""
    return float(differences.mean()), float(differences.std() / np.sqrt(len(differences)))


def _folds(
    y: NDArray[np.int64], group: NDArray[Any], n_classes: int, width: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fold of each chosen row, and the chosen rows: stratified, whole groups, small enough for the step budget."""
    rng = np.random.default_rng([seed, 1])
    cost = len(y) * min(width, len(y)) * n_classes
    n_folds = int(np.clip(STEP_BUDGET // max(cost, 1), 3, MAX_FOLDS))
    order = _grouped_order(group, rng)
    share = min(1.0, STEP_BUDGET / (cost * n_folds))
    if share < 1:
        kept = np.zeros(len(y), bool)
        for label in np.unique(y):
            of_class = order[y[order] == label]
            kept[of_class[: max(2, int(np.ceil(share * len(of_class))))]] = True
        order = order[kept[order]]
    fold_of_group: dict[Any, int] = {}
    for label in np.unique(y):
        start = int(rng.integers(n_folds))
        fresh = [g for g in dict.fromkeys(group[order[y[order] == label]].tolist()) if g not in fold_of_group]
        fold_of_group |= {g: (start + number) % n_folds for number, g in enumerate(fresh)}
    rows = np.sort(order)
    folds = np.array([fold_of_group[g] for g in group[rows].tolist()], np.int64)
    return np.unique(folds, return_inverse=True)[1].astype(np.int64), rows


def _grouped_order(group: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of the rows in which groups stay together."""
    _, number = np.unique(group, return_inverse=True)
    lot = rng.permutation(number.max() + 1)
    return np.argsort(lot[number], kind="stable")


def _fit_final(
    data: _Blocks,
    candidate: Candidate,
    y: NDArray[np.int64],
    n_classes: int,
    penalty: float,
    weights: NDArray[np.float64] | None,
) -> LinearHead:
    x, transform = data.columns(candidate, slice(None))
    sample_weights = np.ones((1, len(y))) if weights is None else weights[y][None, :]
    problem = SoftmaxRegression(x, y, n_classes, sample_weights)
    for step in (p for p in (*PENALTIES, 0.0) if p > penalty):
        problem.solve(step, tolerance=1e-2)  # warm start along the path
    problem.solve(penalty, tolerance=1e-6, max_steps=200)
    weight, bias = problem.solution()
    return LinearHead(transform, weight[0], bias[0])


# ---- solving


class SoftmaxRegression:
    """K weighted multinomial logistic regressions on the same rows, minimised side by side.

    For each problem k: ``sum_i w_ki * -log softmax(x_i W_k + b_k)[y_i] / sum_i w_ki + penalty / 2 * |W_k|^2``.

    Args:
        x: (N, D) float32, centred.
        y: (N,) labels.
        sample_weights: (K, N), not negative; a zero leaves a row out of a problem.
    """

    history = 8

    def __init__(self, x: Floats, y: NDArray[np.int64], n_classes: int, sample_weights: NDArray[np.float64]) -> None:
        self.z, self.back, self.variance = _rotated(x)
        self.n_problems, self.n_classes = len(sample_weights), n_classes
        self.target = np.zeros((len(y), 1, n_classes), np.float32)
        self.target[np.arange(len(y)), 0, y] = 1
        share = sample_weights / sample_weights.sum(1, keepdims=True)
        self.share = share.T.astype(np.float32)[:, :, None]
        # (D + 1, K, C): the last row is the bias
        self.w = np.zeros((self.z.shape[1] + 1, self.n_problems, n_classes), np.float32)

    def logits(self) -> NDArray[np.float32]:
        """(K, N, C) logits of every problem on every row."""
        return np.moveaxis(self._logits(self.w), 1, 0)

    def solution(self) -> tuple[Floats, Floats]:
        """Weights (K, C, D) on the columns of x, and biases (K, C)."""
        weight = np.einsum("dr,rkc->kcd", self.back, self.w[:-1], optimize=True)
        return weight.astype(np.float32), self.w[-1].copy()

    def solve(self, penalty: float, tolerance: float, max_steps: int = 60) -> None:
        """Moves the weights from where they are to the minimum.

        Args:
            tolerance: a problem rests when a step lowers its loss by less than this share.
        """
        precondition = self._precondition(penalty)
        v = np.asarray(self.w / precondition, np.float32)
        loss, gradient = self._loss(v, precondition, penalty)
        pairs: list[tuple[Floats, Floats, NDArray[np.float64]]] = []
        active = np.ones(self.n_problems, bool)
        for _ in range(max_steps):
            direction = _two_loop(gradient, pairs)
            slope = _dots(direction, gradient)
            direction[:, slope >= 0] = -gradient[:, slope >= 0]
            slope = _dots(direction, gradient)
            new_v, new_loss, new_gradient = self._line_search(v, loss, direction, slope, precondition, penalty, active)
            pairs = [*pairs, _pair(new_v - v, new_gradient - gradient)][-self.history :]
            moved = loss - new_loss
            v, gradient = new_v, new_gradient
            active &= moved > tolerance * np.maximum(np.abs(new_loss), SMALL_LOSS)
            loss = new_loss
            if not active.any():
                break
        self.w = v * precondition

    def _precondition(self, penalty: float) -> Floats:
        """(D + 1, K, C) inverse square roots of the curvature where the weights are now."""
        logits = self._logits(self.w)
        p = np.exp(logits - logits.max(2, keepdims=True))
        p /= p.sum(2, keepdims=True)
        spread = np.maximum((p * (1 - p) * self.share).sum(0), 1e-3)
        curvature = np.append(self.variance, 1.0)[:, None, None] * spread + penalty
        return np.asarray(1 / np.sqrt(curvature), np.float32)

    def _line_search(
        self,
        v: Floats,
        loss: NDArray[np.float64],
        direction: Floats,
        slope: NDArray[np.float64],
        precondition: Floats,
        penalty: float,
        active: NDArray[np.bool_],
    ) -> tuple[Floats, NDArray[np.float64], Floats]:
        """Halves the step of each problem until its loss falls enough (Armijo); resting problems stay put."""
        step = active.astype(np.float32)
        for _ in range(12):
            trial = v + step[None, :, None] * direction
            new_loss, new_gradient = self._loss(trial, precondition, penalty)
            bad = new_loss > loss + 1e-4 * step * slope
            if not bad.any():
                return trial, new_loss, new_gradient
            step = np.where(bad, step / 2, step).astype(np.float32)
        trial = v + np.where(bad, 0, step)[None, :, None].astype(np.float32) * direction
        new_loss, new_gradient = self._loss(trial, precondition, penalty)
        return trial, new_loss, new_gradient

    def _logits(self, w: Floats) -> Floats:
        flat: Floats = self.z @ w[:-1].reshape(len(w) - 1, -1)
        return np.asarray(flat.reshape(len(self.z), self.n_problems, self.n_classes) + w[-1], np.float32)

    def _loss(self, v: Floats, precondition: Floats, penalty: float) -> tuple[NDArray[np.float64], Floats]:
        """(K,) losses and their gradient with respect to the preconditioned weights."""
        w = v * precondition
        logits = self._logits(w)
        logits -= logits.max(2, keepdims=True)
        own = (logits * self.target).sum(2)
        np.exp(logits, out=logits)
        total = logits.sum(2)
        loss = -((own - np.log(total)) * self.share[:, :, 0]).sum(0, dtype=np.float64)
        loss += 0.5 * penalty * np.square(w[:-1]).sum((0, 2), dtype=np.float64)
        logits /= total[:, :, None]
        logits -= self.target
        logits *= self.share
        gradient = np.empty_like(w)
        gradient[:-1] = (self.z.T @ logits.reshape(len(logits), -1)).reshape(w[:-1].shape) + penalty * w[:-1]
        gradient[-1] = logits.sum(0)
        return loss, gradient * precondition


def _rotated(x: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Rows in the eigenbasis of the covariance (N, R), the basis (D, R), and the variances (R,).

    With fewer rows than columns the eigenvectors come from the smaller Gram matrix. Directions without variance are
    dropped: the penalty keeps their weights at zero anyway.
    """
    n, d = x.shape
    small = x @ x.T if n < d else x.T @ x
    values, vectors = np.linalg.eigh(small)
    kept = np.flatnonzero(values > max(values[-1], 1e-12) * 1e-6)[::-1]
    if n < d:
        lengths = np.sqrt(values[kept])
        z = vectors[:, kept] * lengths
        back = x.T @ (vectors[:, kept] / lengths)
    else:
        back = np.ascontiguousarray(vectors[:, kept])
        z = x @ back
    return np.ascontiguousarray(z), back, values[kept].astype(np.float64) / n


def _dots(a: Floats, b: Floats) -> NDArray[np.float64]:
    """(K,) inner products of (D, K, C) arrays."""
    return np.asarray(np.einsum("dkc,dkc->kc", a, b).sum(1, dtype=np.float64))


def _pair(s: Floats, y: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """One step of L-BFGS's memory; a problem without positive curvature gets no say."""
    curvature = _dots(s, y)
    return s, y, np.where(curvature > 1e-12, 1 / np.maximum(curvature, 1e-12), 0.0)


def _two_loop(gradient: Floats, pairs: list[tuple[Floats, Floats, NDArray[np.float64]]]) -> Floats:
    """The L-BFGS direction for every problem (Nocedal and Wright 2006, algorithm 7.4)."""
    q = gradient.copy()
    alphas = []
    for s, y, rho in reversed(pairs):
        alpha = (rho * _dots(s, q)).astype(np.float32)[None, :, None]
        q -= alpha * y
        alphas.append(alpha)
    if pairs:
        s, y, rho = pairs[-1]
        norm = _dots(y, y)
        scale = np.where(rho > 0, 1 / np.maximum(rho * norm, 1e-30), 1.0)
        q *= scale.astype(np.float32)[None, :, None]
    for (s, y, rho), alpha in zip(pairs, reversed(alphas), strict=True):
        beta = (rho * _dots(y, q)).astype(np.float32)[None, :, None]
        q += s * (alpha - beta)
    return -q
