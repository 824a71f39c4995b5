"""A head that learns further classes and forgets none: the rows of the old classes stay as they are.

In: a fitted head, features of old and new training images. Out: the head with a row more for each new class. Only the
new rows are fitted, by the same cross-entropy over all classes and images; the old rows enter it through the log of the
sum of their exponentials, one number an image. So an old image can only be answered differently by going to a new class.

The new rows are fitted at the temperature of the old ones. Their L2 penalty is chosen by cross-validation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from topwork.models.head import Floats, LinearHead

PENALTIES = (0.1, 0.01, 1e-3, 1e-4)  # strong to weak, on the mean loss, for columns scaled to a mean variance of 1
N_FOLDS = 3
_CV_IMAGES = 4000
_STEPS = 60

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Grown:
    """A head with new rows after the old ones.

    Attributes:
        penalty: chosen.
        cross_entropy: mean over images out of fold, for each penalty tried.
    """

    head: LinearHead
    penalty: float
    cross_entropy: dict[float, float]


def grow_head(head: LinearHead, columns: Floats, labels: NDArray[np.int64], n_new: int, seed: int = 0) -> Grown:
    """Fits rows for new classes.

    Args:
        columns: (N, D) what ``head.transform`` makes of the features of old and new training images.
        labels: (N,) old classes first; the new ones are the ``n_new`` after them.
    """
    center = columns.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean(columns.var(axis=0, dtype=np.float64)))) or 1.0
    x = (columns - center) / scale
    old = columns.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    problem = _Problem(x, _log_sum_exp(old), np.maximum(labels - len(head.weight), -1), n_new)
    scores = _scores(problem, seed)
    penalty = min(scores, key=lambda p: scores[p])
    rows = problem.fit(penalty)
    weight = rows[:, :-1] / scale
    bias = rows[:, -1] - weight @ center
    grown = replace(
        head,
        weight=np.concatenate([head.weight, weight.astype(np.float32)]),
        bias=np.concatenate([head.bias, bias.astype(np.float32)]),
    )
    return Grown(grown, penalty, scores)


def reordered(head: LinearHead, order: list[int]) -> LinearHead:
    """The same head with its rows in another order."""
    return replace(head, weight=head.weight[order], bias=head.bias[order])


@dataclass(frozen=True, eq=False)
class _Problem:
    """Scaled columns (N, D), log of the sum of old exponentials (N,), new class or -1 (N,)."""

    x: Rows
    old: Rows
    new_label: NDArray[np.int64]
    n_new: int

    def fit(self, penalty: float, start: Rows | None = None) -> Rows:
        """(n_new, D + 1) weights and biases."""
        from scipy.optimize import minimize

        shape = (self.n_new, self.x.shape[1] + 1)
        begin = np.zeros(shape) if start is None else start

        def objective(flat: Rows) -> tuple[float, Rows]:
            rows = flat.reshape(shape)
            loss, gradient = self.loss(rows)
            gradient[:, :-1] += penalty * rows[:, :-1]
            return loss + penalty / 2 * float((rows[:, :-1] ** 2).sum()), gradient.ravel()

        found = minimize(objective, begin.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
        return np.asarray(found.x).reshape(shape)

    def loss(self, rows: Rows) -> tuple[float, Rows]:
        """Mean cross-entropy, but for the part that the rows do not change, and its gradient."""
        new = self.x @ rows[:, :-1].T + rows[:, -1]
        total = _log_sum_exp(np.concatenate([self.old[:, None], new], axis=1))
        share = np.exp(new - total[:, None])
        is_new = np.flatnonzero(self.new_label >= 0)
        share[is_new, self.new_label[is_new]] -= 1
        own = self.old.copy()
        own[is_new] = new[is_new, self.new_label[is_new]]
        gradient = np.concatenate([share.T @ self.x, share.sum(axis=0)[:, None]], axis=1) / len(self.x)
        return float((total - own).mean()), gradient

    def some(self, rows: NDArray[np.int64]) -> _Problem:
        return _Problem(self.x[rows], self.old[rows], self.new_label[rows], self.n_new)


def _scores(problem: _Problem, seed: int) -> dict[float, float]:
    """Cross-entropy out of fold for each penalty; new images all take part, old ones up to a number."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(problem.x))
    is_new = problem.new_label[order] >= 0
    order = np.concatenate([order[is_new], order[~is_new]])[: max(_CV_IMAGES, int(is_new.sum()))]
    fold = np.arange(len(order)) % N_FOLDS  # new images come first, so each fold has its share
    scores = dict.fromkeys(PENALTIES, 0.0)
    for number in range(N_FOLDS):
        fitted, held_out = problem.some(order[fold != number]), problem.some(order[fold == number])
        rows = None
        for penalty in PENALTIES:
            rows = fitted.fit(penalty, rows)
            scores[penalty] += held_out.loss(rows)[0] / N_FOLDS
    return scores


def _log_sum_exp(values: Rows) -> Rows:
    highest = values.max(axis=1)
    return np.asarray(highest + np.log(np.exp(values - highest[:, None]).sum(axis=1)))
