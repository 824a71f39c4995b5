"""The probe: a linear head on frozen features, with all hyperparameters chosen by cross-validation on train.

In: Features, labels. Out: :class:`Probe`: the head, the table of trials, and out-of-fold logits for everything that
needs unbiased predictions on training images (temperature, label errors). Valid and test are not used.

Logistic regression with an L2 penalty: multinomial for one label per image, one vs. rest for several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.loader import in_order
from topwork.data.shards import IN_MEMORY, room_for
from topwork.data.split import rarest_labels
from topwork.errors import InputError, UsageError
from topwork.features.embed import Features
from topwork.features.logistic import LogisticRegressions, SoftmaxRegression, one_thread, ridge_out_of_fold
from topwork.models.head import FeatureTransform, Floats, LinearHead, Power, powered
from topwork.paired import is_clearly_better, paired
from topwork.text import Described, percent

# Strong to weak, relative to the mean loss. The search starts at FIRST and goes to stronger ones only if it is the best so
# far. Those after USUAL_END are tried as long as each lowers the loss by 2%.
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
FIRST = PENALTIES.index(0.1)
USUAL_END = 3e-4
BALANCE_RATIO = 3.0  # class weights when the largest class is more than this many times the smallest
# Limit of multiply-adds per step in cross-validation: above, fewer folds and then fewer images.
STEP_BUDGET = 1.2e9
FOLDS = (3, 5)
# If a step takes more multiply-adds than this, only the best plain and the best extended candidate are cross-validated:
# those with the lowest cross-entropy of ridge regressions on some of the images, at the best of these penalties and scales.
# If one of the two is better there by more than SCREENING_ERRORS standard errors, only that one.
SCREENING_BUDGET = 2e8
SCREENING_ERRORS = 2.5
SCREENED = 800  # images at most
RIDGE_PENALTIES = (10.0, 3.0, 1.0, 0.3)
RIDGE_SCALES = (3.0, 6.0, 12.0, 24.0, 48.0, 96.0)
# If a step of the final fit on all images takes more multiply-adds than this, the fit ends earlier.
FINAL_BUDGET = 1e9
# An extended head is not a timm model, so it must be better by more than this many standard errors of the difference in
# cross-entropy (the selection criterion here; accuracy is too coarse to distinguish heads).
STANDARD_ERRORS = 1.0
_ROWS = 1 << 14  # rows to compute columns for at a time


@dataclass(frozen=True)
class Candidate:
    """One way to build the columns of the head."""

    name: str
    blocks: tuple[str, ...]
    power: Power
    scale: bool

    @property
    def plain(self) -> bool:
        """Whether the head is an affine map of the last features."""
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
    """Cross-validation results of a candidate at one penalty; ``standard_error`` is that of the accuracy."""

    candidate: str
    plain: bool
    penalty: float
    accuracy: float
    standard_error: float
    cross_entropy: float
    n_images: int
    n_folds: int
    chosen: bool = False


@dataclass(frozen=True, repr=False)
class Probe(Described):
    """A fitted probe.

    Attributes:
        head: fitted on all training rows.
        trials: all trials, in order; one is marked as chosen.
        rows: (M,) positions among the training rows with a cross-validated score: those whose class is in more than one
            fold. May be empty.
        out_of_fold_logits: (M, C) logits for those rows from heads that did not see them.
        reason: one sentence on why this head.
    """

    head: LinearHead
    trials: tuple[Trial, ...]
    rows: NDArray[np.int64]
    out_of_fold_logits: NDArray[np.float64]
    class_weights: NDArray[np.float64] | None
    reason: str

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        chosen = next(trial for trial in self.trials if trial.chosen)
        accuracy = f"{percent(chosen.accuracy)} ± {100 * chosen.standard_error:.1f}"
        return {"Features": chosen.candidate, "Penalty": chosen.penalty, "Cross-validated accuracy": accuracy}


def fit_probe(
    features: Features,
    labels: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_],
    n_classes: int,
    *,
    rows: NDArray[np.int64] | None = None,
    groups: Sequence[int] | None = None,
    head: str = "auto",
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    balance: str = "auto",
    sample_weight: NDArray[np.float64] | None = None,
) -> Probe:
    """Chooses and fits a linear head on the training rows.

    Args:
        features: of N images, and further ones of augmented views of the training rows (:mod:`topwork.features.views`).
            Views are in the fold of their image and never scored, so heads with and without views are compared on the same
            images.
        labels: (N,) class indices; (N, C) 0 or 1 for several labels.
        rows: training rows; all by default.
        groups: (N,) group of each row; groups are never split across folds.
        head: ``plain``, ``extended``, or ``auto``: extended only if it is clearly better than the best plain head (by
            more than one standard error of the paired difference in cross-entropy, and in accuracy).
        balance: ``auto``, ``none``, or ``weights`` inverse to the class counts (``sampler`` is the same for a probe).
            With several labels there are no weights; thresholds replace them.
        sample_weight: (N,) positive weights of the images, in the fit and in the cross-validated loss; their scale does not matter.

    Raises:
        UsageError: fewer than two classes in the training rows.
    """
    if head not in ("auto", "plain", "extended"):
        raise InputError(f"head={head!r} must be one of auto, plain, extended.")
    rows = np.arange(len(labels)) if rows is None else np.asarray(rows)
    y, n_images = np.asarray(labels)[rows], len(rows)
    strata = rarest_labels(y) if y.ndim == 2 else y
    if len(np.unique(strata)) < 2:
        raise UsageError("Training needs images of at least two classes.")
    group = np.asarray(groups)[rows] if groups is not None else np.arange(n_images)
    candidates = [c for c in CANDIDATES if head == "auto" or c.plain == (head == "plain")]
    data = _Blocks(features, np.concatenate([rows, np.arange(len(labels), len(features))]))
    n_each = 1 + (len(features) - len(labels)) // n_images  # an image and its views
    y = np.concatenate([y] * n_each)
    if not data.has_stages:
        candidates = [c for c in candidates if "stages" not in c.blocks]
    folds, chosen_rows = _folds(strata, group, n_classes, data.width(candidates[0]), seed)
    by_fold = np.argsort(folds, kind="stable")  # so that the solver can skip the fold that a head does not see
    folds, chosen_rows = folds[by_fold], chosen_rows[by_fold]
    weights = class_weights(np.bincount(y, minlength=n_classes), balance) if y.ndim == 1 else None
    each = np.ones(n_images) if sample_weight is None else sample_weight[rows] / sample_weight[rows].mean()
    each = np.tile(each, n_each)
    shown = np.concatenate([chosen_rows + view * n_images for view in range(n_each)])
    search = _Search(data, y, n_classes, shown, np.tile(folds, n_each), weights, each[shown], len(chosen_rows))
    n_all, candidates = len(candidates), search.promising(candidates)
    for number, candidate in enumerate(candidates):
        search.try_candidate(candidate)
        if on_progress:
            on_progress(number + 1, len(candidates) + 1)
    best, reason = search.choose(head)
    if len(candidates) < n_all:
        reason += f" Ridge regression chose {len(candidates)} of {n_all} candidates for cross-validation."
    # The penalty is relative to the mean loss, so it is scaled down for more images than in a fold.
    n_seen = len(chosen_rows) * (1 - 1 / (folds.max() + 1))
    fitted = search.fit_final(best, y, best.penalty * n_seen / n_images, each if weights is None else each * weights[y])
    if on_progress:
        on_progress(len(candidates) + 1, len(candidates) + 1)
    kept = np.argsort(chosen_rows)
    kept = kept[_has_class_elsewhere(strata[chosen_rows], folds)[kept]]
    return Probe(fitted, search.trials(best), chosen_rows[kept], best.logits[kept], weights, reason)


def class_weights(counts: NDArray[np.int64], balance: str = "auto") -> NDArray[np.float64] | None:
    """(C,) weights inverse to the class counts, or None: for ``none``, and for ``auto`` if no class is 3 times another.

    For probe and tuning. Their mean over the images is 1.
    """
    present = counts[counts > 0]
    if balance == "none" or (balance == "auto" and present.max() <= BALANCE_RATIO * present.min()):
        return None
    return np.where(counts > 0, counts.sum() / (len(present) * np.maximum(counts, 1)), 0.0)


# ---- choosing


class _Blocks:
    """Feature blocks of the training rows, each read from the store once."""

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
        """Centered and scaled columns of some rows, and the transform fitted on those rows."""
        chosen = np.arange(len(self._rows))[rows]
        x = room_for((len(chosen), self.width(candidate)), np.float32)
        for start in range(0, len(chosen), _ROWS):
            some = chosen[start : start + _ROWS]
            blocks = {name: self[name][some] for name in candidate.blocks}
            x[start : start + _ROWS] = powered(blocks, candidate.blocks, candidate.power)
        mean = x.mean(0, dtype=np.float64).astype(np.float32)
        x -= mean
        step = max(1, IN_MEMORY // (4 * len(x)))  # columns at a time
        squares = [np.square(x[:, at : at + step]).mean(0, dtype=np.float64) for at in range(0, x.shape[1], step)]
        spread = np.sqrt(np.concatenate(squares))
        typical = float(np.sqrt(np.mean(spread**2))) or 1.0
        # A nearly constant column must not be scaled to unit variance: it is mostly rounding errors.
        scale = spread + 1e-2 * typical if candidate.scale else np.full(len(spread), typical)
        transform = FeatureTransform(candidate.blocks, candidate.power, mean, scale.astype(np.float32))
        x /= transform.scale
        return x, transform


@dataclass(frozen=True)
class _Tried:
    candidate: Candidate
    penalty: float
    logits: NDArray[np.float64]
    correct: NDArray[np.bool_]
    losses: NDArray[np.float64]

    @property
    def cross_entropy(self) -> float:
        """Cross-validated mean loss."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class _Start:
    """Where the final fit starts: the mean of the folds' weights (R + 1, 1, C), in a basis (D, R)."""

    basis: Floats
    w: Floats


class _Search:
    """Cross-validates candidates along the path of penalties, on the same rows and folds."""

    def __init__(
        self,
        data: _Blocks,
        y: NDArray[Any],
        n_classes: int,
        rows: NDArray[np.int64],
        folds: NDArray[np.int64],
        weights: NDArray[np.float64] | None,
        each: NDArray[np.float64],
        n_scored: int,
    ) -> None:
        self.data, self.rows, self.folds, self.n_scored = data, rows, folds, n_scored
        self.y, self.n_classes = y[rows], n_classes
        self.shares = each[:n_scored]  # of the images in the cross-validated loss
        each = each if weights is None else each * weights[self.y]
        is_seen = folds[None, :] != np.arange(folds.max() + 1)[:, None]
        # A single group cannot be held out; then heads are fitted and evaluated on the same images.
        self.sample_weights = each * (is_seen if folds.max() else np.ones_like(is_seen))
        self.tried: list[_Tried] = []
        self._starts: dict[bool, _Start] = {}  # of the best plain and of the best extended head

    def promising(self, candidates: list[Candidate]) -> list[Candidate]:
        """The candidates to cross-validate: all, or in large problems the best plain and the best extended one."""
        cost = len(self.rows) * self.data.width(candidates[0]) * self.n_classes * len(self.sample_weights)
        if cost < SCREENING_BUDGET:
            return candidates
        some = np.arange(0, self.n_scored, ceil(self.n_scored / SCREENED))
        rows, folds, y = self.rows[some], self.folds[some], self.y[some]
        signs = 2.0 * y - 1 if y.ndim == 2 else np.eye(self.n_classes)[y]
        mean = signs.mean(0)

        def losses(candidate: Candidate) -> NDArray[np.float64]:
            x, _ = self.data.columns(candidate, rows)
            fits = ridge_out_of_fold(x, (signs - mean).astype(np.float32), folds, RIDGE_PENALTIES)
            return min((cross_entropies(s * (fit + mean), y) for fit in fits for s in RIDGE_SCALES), key=np.mean)

        with one_thread():
            of = dict(zip(candidates, in_order(losses, candidates), strict=True))
        best = sorted(candidates, key=lambda candidate: of[candidate].mean())
        best = [next(c for c in best if c.plain == kind) for kind in dict.fromkeys(c.plain for c in best)]
        if len(best) == 2 and is_clearly_better(paired(of[best[1]], of[best[0]]), SCREENING_ERRORS):
            return best[:1]
        return sorted(best, key=lambda candidate: not candidate.plain)

    def try_candidate(self, candidate: Candidate) -> None:
        """Tries the first candidate while weaker penalties (or stronger ones) help; the neighborhood of its best for others."""
        x, _ = self.data.columns(candidate, self.rows)
        problem = _solver(self.y)(x, self.y, self.n_classes, self.sample_weights)
        if self.tried:
            best = PENALTIES.index(self._best(self.tried).penalty)
            path = PENALTIES[max(0, best - 1) : best + 2]
            for stronger in (penalty for penalty in (0.1, 0.01) if penalty > path[0]):
                problem.solve(stronger, tolerance=1e-2)  # a weak penalty takes many steps from zero
            self._walk(problem, candidate, path)
        else:
            self._walk(problem, candidate, PENALTIES[FIRST:])
            if self._best(self.tried).penalty == PENALTIES[FIRST]:
                self._walk(problem, candidate, PENALTIES[FIRST - 1 :: -1])

    def _walk(self, problem: SoftmaxRegression, candidate: Candidate, path: Sequence[float]) -> None:
        """Tries penalties until they are past the best one."""
        lowest = np.inf
        for penalty in path:
            problem.solve(penalty, tolerance=1e-3)
            tried = self._scored(candidate, penalty, problem.logits())
            self.tried.append(tried)
            if tried is self._best([t for t in self.tried if t.candidate.plain == candidate.plain]):
                self._starts[candidate.plain] = _Start(problem.basis, problem.w.mean(1, keepdims=True))
            if tried.cross_entropy > lowest * (1.02 if penalty >= USUAL_END else 0.98):
                break
            lowest = min(lowest, tried.cross_entropy)

    @staticmethod
    def _best(tried: Sequence[_Tried]) -> _Tried:
        return min(tried, key=lambda t: t.cross_entropy)

    def fit_final(
        self, best: _Tried, y: NDArray[Any], penalty: float, sample_weights: NDArray[np.float64]
    ) -> LinearHead:
        """The head on all rows, starting from the mean of the folds' heads."""
        candidate, start = best.candidate, self._starts[best.candidate.plain]
        x, transform = self.data.columns(candidate, slice(None))
        spans_all = len(self.rows) == len(y) or start.basis.shape[0] == start.basis.shape[1]
        problem = _solver(y)(x, y, self.n_classes, sample_weights[None], start.basis if spans_all else None)
        problem.w[:-1] = start.w[:-1] if spans_all else np.tensordot(problem.basis.T @ start.basis, start.w[:-1], 1)
        problem.w[-1] = start.w[-1]
        if x.size * self.n_classes <= FINAL_BUDGET:
            problem.solve(penalty, tolerance=1e-5, max_steps=200)
        else:
            problem.solve(penalty, tolerance=1e-4, max_steps=30)
        weight, bias = problem.solution()
        return LinearHead(transform, weight[0], bias[0])

    def choose(self, head: str) -> tuple[_Tried, str]:
        """The best plain head, unless an extended one is clearly better or the only one tried."""
        plains = [t for t in self.tried if t.candidate.plain]
        others = [t for t in self.tried if not t.candidate.plain]
        if head == "plain" or not others:
            plain = self._best(plains)
            return (
                plain,
                f"Plain head ({plain.candidate.name}), which had the lowest cross-validated cross-entropy.",
            )
        best = self._best(others)
        if head == "extended":
            return best, f"Extended head ({best.candidate.name}), as requested."
        if not plains:
            return best, f"Extended head ({best.candidate.name}), clearly better than plain ones by ridge regression."
        plain = self._best(plains)
        gain, ahead = paired(plain.losses, best.losses), paired(best.correct, plain.correct).mean
        way = "lower" if gain.mean >= 0 else "higher"
        numbers = f"cross-entropy {way} by {gain.words(4)}, accuracy {100 * ahead:+.2f} points"
        if is_clearly_better(gain, STANDARD_ERRORS) and ahead > 0:
            return (
                best,
                f"Extended head ({best.candidate.name}), clearly better than the best plain one in cross-validation ({numbers}).",
            )
        name = plain.candidate.name
        return (
            plain,
            f"Plain head ({name}); an extended head ({best.candidate.name}) was not clearly better ({numbers}).",
        )

    def trials(self, chosen: _Tried) -> tuple[Trial, ...]:
        return tuple(
            Trial(
                candidate=t.candidate.name,
                plain=t.candidate.plain,
                penalty=t.penalty,
                accuracy=float(t.correct.mean()),
                standard_error=float(t.correct.std() / np.sqrt(len(t.correct))),
                cross_entropy=t.cross_entropy,
                n_images=self.n_scored,
                n_folds=int(self.folds.max()) + 1,
                chosen=t is chosen,
            )
            for t in self.tried
        )

    def _scored(self, candidate: Candidate, penalty: float, logits: NDArray[np.float32]) -> _Tried:
        images = np.arange(self.n_scored)
        own, y = logits[self.folds[images], images].astype(np.float64), self.y[images]
        correct = own.argmax(1) == y if y.ndim == 1 else ((own > 0) == y).all(1)
        return _Tried(candidate, penalty, own, correct, self.shares * cross_entropies(own, y))


def _solver(y: NDArray[Any]) -> type[SoftmaxRegression]:
    return LogisticRegressions if y.ndim == 2 else SoftmaxRegression


def cross_entropies(logits: NDArray[np.float64], y: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) losses of (N, C) logits; with (N, C) labels the sum of binary cross-entropies."""
    if y.ndim == 2:
        return np.asarray((np.logaddexp(0, logits) - logits * y).sum(1))
    shifted = logits - logits.max(1, keepdims=True)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(y)), y]
    return losses


def _folds(
    y: NDArray[np.int64], group: NDArray[Any], n_classes: int, width: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fold of each selected row, and the selected rows: stratified, whole groups, within the step budget."""
    rng = np.random.default_rng([seed, 1])
    cost = len(y) * min(width, len(y)) * n_classes
    n_folds = int(np.clip(STEP_BUDGET // max(cost, 1), *FOLDS))
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
    if len(set(fold_of_group.values())) < 2:  # a few groups, by chance all in one fold
        fold_of_group = {g: number % n_folds for number, g in enumerate(fold_of_group)}
    rows = np.sort(order)
    folds = np.array([fold_of_group[g] for g in group[rows].tolist()], np.int64)
    if (folds == folds[0]).all():  # one group: all images are near duplicates
        folds = np.arange(len(rows)) % n_folds
    return np.unique(folds, return_inverse=True)[1].astype(np.int64), rows


def _has_class_elsewhere(y: NDArray[np.int64], folds: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(M,) whether the class of each row has images outside its fold."""
    pairs = np.unique(np.stack([y, folds]), axis=1)
    n_folds_of = dict(zip(*np.unique(pairs[0], return_counts=True), strict=True))
    return np.array([n_folds_of[label] > 1 for label in y], np.bool_)


def _grouped_order(group: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of the rows in which groups stay together."""
    _, number = np.unique(group, return_inverse=True)
    lot = rng.permutation(number.max() + 1)
    return np.argsort(lot[number], kind="stable")
