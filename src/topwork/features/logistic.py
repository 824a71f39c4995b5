"""The solvers of linear heads: many regularized logistic regressions on the same rows, minimized in parallel.

In: columns, targets, weights of the rows. Out: weights and biases. :class:`SoftmaxRegression` is for one label per
image, or probabilities; :class:`LogisticRegressions` for several labels (one vs. rest).

The rows are first rotated onto the eigenvectors of their covariance, which does not change the penalty and makes the
curvature of the loss nearly diagonal (for each class about the covariance times the mean of p (1 - p); Böhning 1992,
doi 10.1007/BF00048682, bounds it so), so that L-BFGS with a diagonal preconditioner converges in few steps. All
problems are fitted at once, so the rows are read once per step. :func:`ridge_out_of_fold` is the closed form that
tells which columns are worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.shards import IN_MEMORY, room_for
from topwork.models.head import Floats

Problems = NDArray[np.int64]

BLOCK = 1 << 25  # logits that are computed at a time: 128 MB
SMALL_PROBLEM = 100_000_000  # multiply-adds per step, from which rows without weight are skipped
SMALL_VALUES = 2_000_000  # for example, 1,500 images with 1,280 features
LARGE_MATRIX = 1000  # rows and columns
LEADING = 256  # directions of a large covariance that are rotated
MOST_RUNS = 100  # of rows that the same problems use
SMALL_LOSS = 0.1  # below this, gains are measured relative to it instead of the loss


class SoftmaxRegression:
    """K weighted multinomial logistic regressions on the same rows, minimized in parallel.

    For each problem k: ``sum_i w_ki * -log softmax(x_i W_k + b_k)[y_i] / sum_i w_ki + penalty / 2 * |W_k|^2``.

    Args:
        x: (N, D) float32, centered.
        y: (N,) labels, or (N, C) probabilities (soft targets).
        sample_weights: (K, N), not negative; 0 excludes a row from a problem. In large problems rows are skipped that
            are excluded, if they are consecutive, as when the rows are in order of the fold.
        basis: (D, R) orthonormal columns whose span contains the rows, such as ``basis`` of a problem with similar rows;
            by default the eigenvectors of the covariance, which take long for thousands of columns.

    Attributes:
        w: (R + 1, K, C) weights in the basis; the last row is the bias.
        extra_loss: an additional term of every problem: maps the (N, C) logits of all rows to its value and gradient.
    """

    history = 8
    extra_loss: Callable[[Floats], tuple[float, NDArray[Any]]] | None = None

    def __init__(
        self,
        x: Floats,
        y: NDArray[Any],
        n_classes: int,
        sample_weights: NDArray[np.float64],
        basis: Floats | None = None,
    ) -> None:
        self.z, self.basis, self.variance = _rotated(x) if basis is None else _projected(x, basis)
        self.n_problems, self.n_classes = len(sample_weights), n_classes
        self.label(y)
        self.weigh(sample_weights)
        self.w = np.zeros((self.z.shape[1] + 1, self.n_problems, n_classes), np.float32)

    def weigh(self, sample_weights: NDArray[np.float64]) -> None:
        """Sets or replaces the (K, N) weights of the rows."""
        share = sample_weights / sample_weights.sum(1, keepdims=True)
        self.share = share.T.astype(np.float32)[:, :, None]
        self._runs = self._runs_of(sample_weights > 0)
        self._steps: list[tuple[Floats, Floats]] = []  # of the weights, and how they changed the gradient of the loss

    def _runs_of(self, used: NDArray[np.bool_]) -> list[tuple[int, int, Problems]]:
        """Start and end of runs of rows, and the problems that use them, from (K, N)."""
        ends = [*(np.flatnonzero((used[:, 1:] != used[:, :-1]).any(0)) + 1).tolist(), len(self.z)]
        if self.z.size * self.n_problems * self.n_classes < SMALL_PROBLEM or len(ends) > MOST_RUNS:
            return [(0, len(self.z), np.arange(self.n_problems))]
        runs = [(start, end, np.flatnonzero(used[:, start])) for start, end in pairwise([0, *ends])]
        return [run for run in runs if len(run[2])]

    def _blocks(self) -> list[tuple[slice, Problems]]:
        """Blocks of rows, to bound the size of their logits, and the problems that use them."""
        if self.extra_loss is not None:
            return [(slice(None), np.arange(self.n_problems))]
        step = max(1, BLOCK // (self.n_problems * self.n_classes))
        return [
            (slice(at, min(at + step, end)), problems)
            for start, end, problems in self._runs
            for at in range(start, end, step)
        ]

    def label(self, y: NDArray[Any]) -> None:
        """Sets or replaces the labels."""
        self._y = y if y.ndim == 1 else np.asarray(y, np.float32)
        self._whole: Floats | None = None
        if len(y) * self.n_problems * self.n_classes <= BLOCK:
            self._whole = self._target(slice(None))

    def _target(self, rows: slice) -> Floats:
        """(N, 1, C) target probabilities."""
        if self._whole is not None:
            return self._whole[rows]
        y = self._y[rows]
        if y.ndim == 2:
            return np.asarray(y[:, None, :])
        target = np.zeros((len(y), 1, self.n_classes), np.float32)
        target[np.arange(len(y)), 0, y] = 1
        return target

    def _probabilities(self, logits: Floats) -> Floats:
        """The probabilities of (N, K, C) logits."""
        p = np.exp(logits - logits.max(2, keepdims=True))
        return np.asarray(p / p.sum(2, keepdims=True), np.float32)

    def logits(self) -> NDArray[np.float32]:
        """(K, N, C) logits of every problem on every row."""
        return np.moveaxis(self._logits(self.w), 1, 0)

    def solution(self) -> tuple[Floats, Floats]:
        """Weights (K, C, D) on the columns of x, and biases (K, C)."""
        weight = np.einsum("dr,rkc->kcd", self.basis, self.w[:-1], optimize=True)
        return weight.astype(np.float32), self.w[-1].copy()

    def solve(self, penalty: float, tolerance: float, max_steps: int = 60) -> None:
        """Minimizes the loss, starting from the current weights and from what the last steps told of the curvature.

        Args:
            tolerance: a problem has converged when a step lowers its loss by less than this share. Problems that have
                converged are not computed again.
        """
        precondition = self._precondition(penalty)

        def evaluate(v: Floats, problems: Problems) -> tuple[NDArray[np.float64], Floats]:
            return self._loss(v[:, problems], precondition[:, problems], penalty, problems)

        v = np.asarray(self.w / precondition, np.float32)
        active = np.arange(self.n_problems)
        loss, gradient = evaluate(v, active)
        pairs = [_pair(s / precondition, self._with_penalty(y, s, penalty) * precondition) for s, y in self._steps]
        for _ in range(max_steps):
            direction = _two_loop(gradient, pairs)
            uphill = _dots(direction, gradient) >= 0
            direction[:, uphill] = -gradient[:, uphill]
            before = v, loss, gradient
            v, loss, gradient = _line_search(evaluate, v, loss, gradient, direction, active)
            pairs = [*pairs, _pair(v - before[0], gradient - before[2])][-self.history :]
            active = active[(before[1] - loss > tolerance * np.maximum(np.abs(loss), SMALL_LOSS))[active]]
            if not len(active):
                break
        self.w = v * precondition
        steps = [(s * precondition, y / precondition) for s, y, _ in pairs]
        self._steps = [(s, self._with_penalty(y, s, -penalty)) for s, y in steps]

    @staticmethod
    def _with_penalty(gradient: Floats, w: Floats, penalty: float) -> Floats:
        """A gradient plus that of the penalty, which has no part in the bias."""
        return np.concatenate([gradient[:-1] + np.float32(penalty) * w[:-1], gradient[-1:]])

    def _precondition(self, penalty: float) -> Floats:
        """(D + 1, K, C) inverse square roots of the curvature at the current weights."""
        spread = np.zeros(self.w.shape[1:], np.float32)
        for rows, problems in self._blocks():
            p = self._probabilities(self._logits(self.w[:, problems], rows))
            spread[problems] += (p * (1 - p) * self.share[rows][:, problems]).sum(0)
        spread = np.maximum(spread, 1e-3)
        curvature = np.append(self.variance, 1.0)[:, None, None] * spread + penalty
        return np.asarray(1 / np.sqrt(curvature), np.float32)

    def _logits(self, w: Floats, rows: slice = slice(None)) -> Floats:
        z = self.z[rows]
        flat: Floats = z @ w[:-1].reshape(len(w) - 1, -1)
        return np.asarray(flat.reshape(len(z), *w.shape[1:]) + w[-1], np.float32)

    def _loss(
        self, v: Floats, precondition: Floats, penalty: float, problems: Problems
    ) -> tuple[NDArray[np.float64], Floats]:
        """(L,) losses of some problems, and their gradient with respect to the (D + 1, L, C) preconditioned weights."""
        w = v * precondition
        loss, gradient = np.zeros(len(problems)), np.zeros_like(w)
        for rows, users in self._blocks():
            own = np.flatnonzero(np.isin(problems, users))
            if not len(own):
                continue
            block_loss, errors = self._errors(w[:, own], rows, self.share[rows][:, problems[own]])
            loss[own] += block_loss
            gradient[:-1, own] += (self.z[rows].T @ errors.reshape(len(errors), -1)).reshape(-1, *errors.shape[1:])
            gradient[-1, own] += errors.sum(0)
        loss += 0.5 * penalty * np.square(w[:-1]).sum((0, 2), dtype=np.float64)
        return loss, self._with_penalty(gradient, w, penalty) * precondition

    def _errors(self, w: Floats, rows: slice, share: Floats) -> tuple[NDArray[np.float64], Floats]:
        """(K,) losses of some rows with (N, K, 1) shares, and their derivatives with respect to the (N, K, C) logits."""
        logits, target = self._logits(w, rows), self._target(rows)
        extra = [self.extra_loss(logits[:, k]) for k in range(logits.shape[1])] if self.extra_loss else []
        logits -= logits.max(2, keepdims=True)
        own = (logits * target).sum(2)
        np.exp(logits, out=logits)
        total = logits.sum(2)
        loss = -((own - np.log(total)) * share[:, :, 0]).sum(0, dtype=np.float64)
        logits /= total[:, :, None]
        logits -= target
        logits *= share
        for k, (value, by_logits) in enumerate(extra):
            loss[k] += value
            logits[:, k] += by_logits
        return np.asarray(loss), logits


class LogisticRegressions(SoftmaxRegression):
    """K weighted sets of C one-vs-rest logistic regressions, minimized in parallel.

    For each problem k: ``sum_i w_ki * sum_c -log sigmoid((2 y_ic - 1) (x_i W_kc + b_kc)) / sum_i w_ki + penalty / 2 *
    |W_k|^2``.

    Args:
        y: (N, C) which classes each row has.
    """

    def _probabilities(self, logits: Floats) -> Floats:
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)

    def _errors(self, w: Floats, rows: slice, share: Floats) -> tuple[NDArray[np.float64], Floats]:
        logits, target = self._logits(w, rows), self._target(rows)
        losses = np.maximum(logits, 0) - logits * target + np.log1p(np.exp(-np.abs(logits)))
        loss = (losses * share).sum((0, 2), dtype=np.float64)
        return loss, (self._probabilities(logits) - target) * share


def ridge_out_of_fold(
    x: Floats, target: Floats, folds: NDArray[np.int64], penalties: Sequence[float]
) -> Iterator[Floats]:
    """For each penalty the (N, C) predictions of ridge regressions on the other folds, from a single decomposition.

    The residuals of a fold that is left out are those of the fit on all rows, times the inverse of the fold's block of
    one minus the hat matrix (for single rows: PRESS, Allen 1974, doi 10.1080/00401706.1974.10489157).

    Args:
        x: (N, D) float32, centered.
        target: (N, C) float32, centered.
        penalties: relative to the mean square loss.
    """
    values, vectors = _eigenvectors(np.asarray(x @ x.T / len(x), np.float32))
    rotated = vectors.T @ target
    for penalty in penalties:
        shrunk = 1 / (np.maximum(values, 0) + penalty)
        predicted = target.copy()
        for own in (folds == fold for fold in range(folds.max() + 1)):
            scaled = vectors[own] * shrunk
            predicted[own] -= np.linalg.solve(scaled @ vectors[own].T, scaled @ rotated)
        yield predicted


def _rotated(x: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Rows in the eigenbasis of the covariance (N, R), the basis (D, R), and the variances (R,).

    With fewer rows than columns the eigenvectors come from the smaller Gram matrix. Directions without variance are
    dropped: the penalty keeps their weights at zero anyway. Of a large covariance only the leading directions are found.
    """
    n, d = x.shape
    if d >= LARGE_MATRIX and 4 * n >= 3 * d:
        return _projected(x, _leading_first(x.T @ x))
    values, vectors = _eigenvectors(x @ x.T if n < d else x.T @ x)
    kept = np.flatnonzero(values > max(values[-1], 1e-12) * 1e-6)[::-1]
    if not len(kept):  # all rows are identical: one direction without weight, so that only the bias is fitted
        return np.zeros((n, 1), x.dtype), np.zeros((d, 1), x.dtype), np.ones(1)
    if n < d:
        lengths = np.sqrt(values[kept])
        z = np.ascontiguousarray(vectors[:, kept] * lengths)
        basis = np.asarray(x.T @ (vectors[:, kept] / lengths), x.dtype)
        return z, basis, values[kept].astype(np.float64) / n
    return _projected(x, np.ascontiguousarray(vectors[:, kept]))


def _leading_first(covariance: Floats) -> Floats:
    """(D, D) orthonormal columns: about the leading eigenvectors, then other directions, whose variances differ little.

    By randomized subspace iteration (Halko et al. 2011, doi 10.1137/090771806), completed to a basis by a block
    reflector. The solver takes as many steps as with all eigenvectors, which take 3 s for 2,768 columns instead of 0.5.
    """
    d = len(covariance)
    with one_thread():
        found = np.random.default_rng(0).standard_normal((d, LEADING), dtype=np.float32)
        for _ in range(2):
            found = np.linalg.qr(covariance @ found)[0]
        leading = (found @ np.linalg.eigh(found.T @ covariance @ found)[1])[:, ::-1]
        left, _, right = np.linalg.svd(leading[:LEADING])
        mirror = leading.copy()
        mirror[:LEADING] += left @ right
        basis = np.eye(d, dtype=np.float32) - 2 * mirror @ np.linalg.solve(mirror.T @ mirror, mirror.T)
        basis[:, :LEADING] = leading
    return np.asarray(basis, np.float32)


def _eigenvectors(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues in increasing order, and eigenvectors; scipy's LAPACK takes half of numpy's time (docs/lab-log.md)."""
    if len(matrix) < LARGE_MATRIX:  # importing scipy would take longer
        return np.linalg.eigh(matrix)
    from scipy.linalg import eigh

    with one_thread():
        values, vectors = eigh(matrix, driver="evd", check_finite=False, overwrite_a=True)
    return values, vectors


def _projected(x: Floats, basis: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """Rows in a basis (N, R), the basis (D, R), and the mean squares (R,)."""
    z = room_for((len(x), basis.shape[1]), x.dtype)
    step = len(x) if z.nbytes <= IN_MEMORY else BLOCK // x.shape[1]
    squares = np.zeros(basis.shape[1])
    for start in range(0, len(x), step):
        some = np.matmul(x[start : start + step], basis, out=z[start : start + step])
        squares += np.einsum("nr,nr->r", some, some, dtype=np.float64)
    return z, basis, squares / len(x)


def _dots(a: Floats, b: Floats) -> NDArray[np.float64]:
    """(K,) inner products of (D, K, C) arrays."""
    return np.asarray(np.einsum("dkc,dkc->kc", a, b).sum(1, dtype=np.float64))


def _pair(s: Floats, y: Floats) -> tuple[Floats, Floats, NDArray[np.float64]]:
    """One step of L-BFGS's memory; problems without positive curvature are skipped."""
    curvature = _dots(s, y)
    return s, y, np.where(curvature > 1e-12, 1 / np.maximum(curvature, 1e-12), 0.0)


def _line_search(
    evaluate: Callable[[Floats, Problems], tuple[NDArray[np.float64], Floats]],
    v: Floats,
    loss: NDArray[np.float64],
    gradient: Floats,
    direction: Floats,
    active: Problems,
) -> tuple[Floats, NDArray[np.float64], Floats]:
    """New weights, losses and gradients after a step of the active problems.

    The step of a problem whose loss does not fall enough (Armijo) is shortened to the minimum of a parabola; if that does
    not help, the problem stays where it is.
    """
    slope = _dots(direction, gradient)
    step, left = np.ones(len(loss)), active
    new_v, new_loss, new_gradient = v.copy(), loss.copy(), gradient.copy()
    for _ in range(12):
        new_v[:, left] = v[:, left] + step[None, left, None].astype(np.float32) * direction[:, left]
        new_loss[left], new_gradient[:, left] = evaluate(new_v, left)
        excess = new_loss - loss - step * slope  # over the tangent
        left = left[(excess > (1e-4 - 1) * step * slope)[left]]
        if not len(left):
            break
        step *= np.clip(-step * slope / np.maximum(2 * excess, 1e-30), 0.1, 0.5)
    new_v[:, left], new_loss[left], new_gradient[:, left] = v[:, left], loss[left], gradient[:, left]
    return new_v, new_loss, new_gradient


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


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps linear algebra to one thread: for decompositions, whose threads wait for each other at every column.

    A matrix of 2,768 columns takes 1.3 s with two threads on two idle cores and 2.1 s with one; on busy cores 28 and 3.1 s.
    """
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def few_threads(n_values: int) -> AbstractContextManager[None]:
    """:func:`one_thread` for at most ``SMALL_VALUES`` values, else nothing: threads gain nothing in small products.

    With 32 other processes on two cores, a refit of 398 images took 69 to 81 s with two threads and 25 to 27 s with one.
    """
    return one_thread() if n_values <= SMALL_VALUES else nullcontext()
