"""The solver finds scikit-learn's optimum; the choice is made on train only, with groups kept whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from topwork.data import shards
from topwork.data.split import rarest_labels
from topwork.errors import UsageError
from topwork.features import logistic, probe
from topwork.features.logistic import LogisticRegressions, SoftmaxRegression, ridge_out_of_fold
from topwork.features.probe import _folds, class_weights, fit_probe


class ArrayFeatures:
    """Features held in memory, with the two methods that the probe uses."""

    def __init__(self, last, stages=None):
        self.blocks = {"last": last, "stages": np.zeros((len(last), 0), np.float16) if stages is None else stages}

    def block(self, name, rows=None):
        return self.blocks[name] if rows is None else self.blocks[name][rows]

    def __len__(self):
        return len(self.blocks["last"])


def blobs(n=240, d=20, n_classes=4, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    centers = rng.normal(size=(n_classes, d))
    return (centers[y] + spread * rng.normal(size=(n, d))).astype(np.float16), y


@pytest.mark.parametrize(("n", "d"), [(240, 20), (40, 90)], ids=["more rows", "more columns"])
@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_solver_finds_the_optimum_of_scikit_learn(n, d, penalty):
    x, y = blobs(n, d)
    x = x.astype(np.float32)
    x -= x.mean(0)
    weights = np.random.default_rng(1).uniform(0.2, 2, n)
    problem = SoftmaxRegression(x, y, 4, np.stack([weights, np.ones(n)]))
    problem.solve(penalty, tolerance=1e-9, max_steps=400)
    found, bias = problem.solution()
    for k, w in enumerate((weights, np.ones(n))):
        reference = LogisticRegression(C=1 / (penalty * w.sum()), tol=1e-8, max_iter=5000).fit(x, y, sample_weight=w)
        ours = x @ found[k].T + bias[k]
        theirs = reference.decision_function(x)
        np.testing.assert_allclose(
            ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=2e-2
        )


def test_problems_side_by_side_do_not_touch_each_other():
    x, y = blobs()
    x = x.astype(np.float32) - x.astype(np.float32).mean(0)
    masks = (np.arange(len(y)) % 3 != np.arange(3)[:, None]).astype(float)
    together = SoftmaxRegression(x, y, 4, masks)
    together.solve(0.1, 1e-8, 300)
    for k in range(3):
        alone = SoftmaxRegression(x, y, 4, masks[k : k + 1])
        alone.solve(0.1, 1e-8, 300)
        np.testing.assert_allclose(together.logits()[k], alone.logits()[0], atol=5e-3)


def test_soft_targets_and_a_further_loss_reach_the_minimum_of_scipy():
    """The further loss pulls the logits of the last rows, which have no label, to 1."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp

    x, y = blobs(60, 8)
    x = x.astype(np.float64) - x.astype(np.float64).mean(0)
    soft = 0.7 * np.eye(4)[y] + 0.3 / 4
    weights = np.where(np.arange(60) < 40, 1.0, 0.0)
    problem = SoftmaxRegression(x.astype(np.float32), soft, 4, weights[None])

    def pull(logits):
        gradient = np.zeros_like(logits)
        gradient[40:] = (logits[40:] - 1) / 20
        return float(np.square(logits[40:] - 1).sum() / 40), gradient

    def objective(flat):
        v = flat.reshape(9, 4)
        logits = x @ v[:-1] + v[-1]
        loss = (logsumexp(logits, 1) - (logits * soft).sum(1))[:40].mean()
        return loss + pull(logits)[0] + 0.05 * np.square(v[:-1]).sum()

    problem.extra_loss = pull
    problem.solve(0.1, 1e-9, 400)
    expected = minimize(objective, np.zeros(36)).x.reshape(9, 4)
    np.testing.assert_allclose(problem.logits()[0], x @ expected[:-1] + expected[-1], atol=2e-2)


def test_the_head_reproduces_its_own_training():
    x, y = blobs(spread=0.3)
    probe = fit_probe(ArrayFeatures(x), y, 4)
    assert (probe.head.logits({"last": x}).argmax(1) == y).mean() > 0.97
    assert probe.head.kind == "plain"
    assert sum(trial.chosen for trial in probe.trials) == 1


def test_out_of_fold_logits_are_honest():
    """On labels drawn at random, accuracy out of fold is chance, while the head itself learns them by heart."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 400)).astype(np.float16), rng.integers(0, 2, 300)
    probe = fit_probe(ArrayFeatures(x), y, 2)
    accuracy = (probe.out_of_fold_logits.argmax(1) == y[probe.rows]).mean()
    assert 0.38 < accuracy < 0.62


def test_only_training_rows_are_read():
    x, y = blobs()
    rows = np.arange(0, 240, 2)
    one = fit_probe(ArrayFeatures(x), y, 4, rows=rows)
    x2, y2 = x.copy(), y.copy()
    x2[1::2], y2[1::2] = np.nan, 0
    two = fit_probe(ArrayFeatures(x2), y2, 4, rows=rows)
    np.testing.assert_array_equal(one.head.weight, two.head.weight)


def test_an_extended_head_wins_only_when_it_is_ahead():
    x, y = blobs(spread=3.0)
    telling = (
        np.eye(4)[y].astype(np.float16) * 3 + np.random.default_rng(3).normal(size=(240, 4)).astype(np.float16) * 0.3
    )
    noise = np.random.default_rng(4).normal(size=(240, 40)).astype(np.float16)
    assert fit_probe(ArrayFeatures(x, telling), y, 4).head.kind == "extended"
    assert fit_probe(ArrayFeatures(x, telling), y, 4, head="plain").head.kind == "plain"
    assert fit_probe(ArrayFeatures(x, noise), y, 4).head.kind == "plain"
    assert fit_probe(ArrayFeatures(x, noise), y, 4, head="extended").head.kind == "extended"


def test_one_class_is_refused():
    x, _ = blobs()
    with pytest.raises(UsageError, match="at least two classes"):
        fit_probe(ArrayFeatures(x), np.zeros(240, int), 1)


def test_class_weights_start_where_the_ratio_passes_three():
    assert class_weights(np.array([30, 10])) is None
    weights = class_weights(np.array([31, 10]))
    np.testing.assert_allclose(weights * [31, 10], [20.5, 20.5])
    assert class_weights(np.array([40, 0, 10]))[1] == 0


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 30), min_size=2, max_size=8),
    group_size=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_no_group_straddles_two_folds(counts, group_size, seed):
    y = np.repeat(np.arange(len(counts)), counts)
    group = np.arange(len(y)) // group_size
    folds, rows = _folds(y, group, len(counts), 16, seed)
    assert len(rows) == len(y)
    for number in np.unique(group) if len(np.unique(group)) > 1 else ():  # a single group has to be divided
        assert len(set(folds[group[rows] == number].tolist())) == 1
    assert set(folds.tolist()) == set(range(folds.max() + 1))


def test_a_class_with_a_single_image_is_no_obstacle():
    x, y = blobs()
    y = y.copy()
    y[y == 3] = 0
    y[7] = 3
    probe = fit_probe(ArrayFeatures(x), y, 4)
    assert np.isfinite(probe.head.weight).all()


@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from(["random", "identical", "per class"]),
    st.sampled_from(["apart", "by class", "together"]),
    st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_few_alike_and_copied_images_give_a_finite_head(counts, look, grouping, seed):
    y = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(seed)
    x = {
        "random": rng.normal(size=(len(y), 12)),
        "identical": np.ones((len(y), 12)),
        "per class": rng.normal(size=(len(counts), 12))[y],
    }[look].astype(np.float32)
    groups = {"apart": np.arange(len(y)), "by class": y, "together": np.zeros(len(y), int)}[grouping].tolist()
    probe = fit_probe(ArrayFeatures(x), y, len(counts), groups=groups, seed=seed)
    assert np.isfinite(probe.out_of_fold_logits).all()
    assert np.isfinite(probe.head.logits({"last": x})).all()


def test_many_images_are_chosen_from_but_all_are_fitted(monkeypatch):
    from topwork.features import probe as module

    monkeypatch.setattr(module, "STEP_BUDGET", 240 * 20 * 4 * 1.0)
    x, y = blobs()
    probe = fit_probe(ArrayFeatures(x), y, 4)
    assert len(probe.rows) < 240
    assert probe.trials[0].n_folds == 3
    assert set(y[probe.rows].tolist()) == {0, 1, 2, 3}


def test_one_against_the_rest_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 12)).astype(np.float32)
    x -= x.mean(0)
    y = x[:, :3] + rng.normal(0, 1, (300, 3)) > 0.5
    masks = np.stack([np.ones(300), (np.arange(300) % 3 > 0).astype(float)])
    problem = LogisticRegressions(x, y, 3, masks)
    problem.solve(0.05, tolerance=1e-9, max_steps=300)
    weight, bias = problem.solution()
    for k, mask in enumerate(masks):
        kept = mask > 0
        for c in range(3):
            reference = LogisticRegression(C=1 / (0.05 * kept.sum()), tol=1e-8, max_iter=1000).fit(x[kept], y[kept, c])
            np.testing.assert_allclose(weight[k, c], reference.coef_[0], atol=2e-3)
            np.testing.assert_allclose(bias[k, c], reference.intercept_[0], atol=2e-3)


def test_the_rarest_label_divides_rows_that_have_several() -> None:
    matrix = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]], bool)
    assert rarest_labels(matrix).tolist() == [1, 0, 2, 3, 1]
    assert rarest_labels(matrix, enough=2).tolist() == [1, 0, 0, 3, 1]


@pytest.mark.parametrize("kind", [SoftmaxRegression, LogisticRegressions])
def test_rows_in_blocks_give_the_same_solution(kind, monkeypatch):
    x, y = blobs(n=100)
    x = x.astype(np.float32) - x.astype(np.float32).mean(0)
    labels = np.eye(4)[y] if kind is LogisticRegressions else y
    found = []
    for block in (logistic.BLOCK, 7 * 2 * 4):
        monkeypatch.setattr(logistic, "BLOCK", block)
        problem = kind(x, labels, 4, np.stack([np.ones(100), np.arange(100) % 3 + 0.5]))
        problem.solve(0.01, tolerance=1e-9, max_steps=400)
        found.append(problem.solution()[0])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


@pytest.mark.parametrize("kind", [SoftmaxRegression, LogisticRegressions])
def test_skipping_the_fold_that_a_head_does_not_see_gives_the_same_solution(kind, monkeypatch):
    x, y = blobs(n=120)
    x = x.astype(np.float32) - x.astype(np.float32).mean(0)
    labels = np.eye(4)[y] if kind is LogisticRegressions else y
    folds = np.repeat([0, 1, 2], 40)
    found = []
    for small in (logistic.SMALL_PROBLEM, 0):
        monkeypatch.setattr(logistic, "SMALL_PROBLEM", small)
        problem = kind(x, labels, 4, (folds[None] != np.arange(3)[:, None]).astype(float))
        assert len(problem._blocks()) == (3 if small == 0 else 1)
        problem.solve(0.01, tolerance=1e-9, max_steps=400)
        found.append(problem.solution()[0])
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)


def test_rows_that_get_weight_later_are_no_longer_skipped(monkeypatch):
    x, y = blobs(n=120)
    x = x.astype(np.float32) - x.astype(np.float32).mean(0)
    monkeypatch.setattr(logistic, "SMALL_PROBLEM", 0)
    first, all_rows = (np.arange(120) < 60).astype(float)[None], np.ones((1, 120))
    problem = SoftmaxRegression(x, y, 4, first)
    problem.solve(0.01, tolerance=1e-3)
    problem.weigh(all_rows)
    expected = SoftmaxRegression(x, y, 4, all_rows)
    for one in (problem, expected):
        one.solve(0.01, tolerance=1e-9, max_steps=400)
    np.testing.assert_allclose(problem.solution()[0], expected.solution()[0], atol=2e-3)


def test_ridge_predictions_of_folds_are_those_of_scikit_learn():
    x, y = blobs(n=90)
    x = x.astype(np.float32) - x.astype(np.float32).mean(0)
    target = np.eye(4, dtype=np.float32)[y]
    target -= target.mean(0)
    folds = np.arange(90) // 7 % 3
    for penalty, predicted in zip((3.0, 0.1), ridge_out_of_fold(x, target, folds, (3.0, 0.1)), strict=True):
        for fold in range(3):
            seen = folds != fold
            reference = Ridge(alpha=penalty * 90, fit_intercept=False).fit(x[seen], target[seen])
            np.testing.assert_allclose(predicted[~seen], reference.predict(x[~seen]), atol=1e-4)


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_large_problems_cross_validate_the_promising_candidates_only(several, monkeypatch):
    monkeypatch.setattr(probe, "SCREENING_BUDGET", 0)
    noise = np.random.default_rng(0).normal(size=(240, 10)).astype(np.float16)
    informative, y = blobs()
    labels = np.eye(4, dtype=np.int64)[y] if several else y
    clear = fit_probe(ArrayFeatures(np.abs(noise), informative), labels, 4)
    assert {trial.candidate for trial in clear.trials} == {"square root, with earlier stages"}
    assert clear.reason.startswith("Extended head (square root, with earlier stages), clearly better than plain ones")
    assert clear.reason.endswith("Ridge regression chose 1 of 5 candidates for cross-validation.")
    similar = fit_probe(ArrayFeatures(noise, noise[::-1]), labels, 4)
    assert len({trial.plain for trial in similar.trials}) == 2
    assert similar.reason.endswith("Ridge regression chose 2 of 5 candidates for cross-validation.")


@pytest.mark.parametrize("budget", [0, probe.SCREENING_BUDGET])
@pytest.mark.parametrize("head", ["plain", "extended"])
def test_only_heads_of_the_kind_that_was_asked_for_are_tried(head, budget, monkeypatch):
    monkeypatch.setattr(probe, "SCREENING_BUDGET", budget)
    informative, y = blobs()
    found = fit_probe(ArrayFeatures(informative), y, 4, head=head)
    assert {trial.plain for trial in found.trials} == {head == "plain"}
    assert found.head.kind == head


def test_a_path_of_penalties_ends_where_a_single_one_does():
    x, y = blobs()
    x = (x - x.mean(0)).astype(np.float32)
    masks = np.random.default_rng(1).integers(0, 2, (3, len(x))).astype(float)
    path, single = (SoftmaxRegression(x, y, 4, masks) for _ in range(2))
    for penalty in (1.0, 0.1, 0.01):
        path.solve(penalty, tolerance=1e-8, max_steps=400)
    single.solve(0.01, tolerance=1e-8, max_steps=400)
    np.testing.assert_allclose(path.solution()[0], single.solution()[0], atol=2e-3)
    biases = [problem.solution()[1] - problem.solution()[1].mean(1, keepdims=True) for problem in (path, single)]
    np.testing.assert_allclose(*biases, atol=2e-3)


def test_another_basis_gives_the_same_head():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 12)).astype(np.float32), rng.integers(0, 3, 200)
    x -= x.mean(0)
    found = []
    for basis in (None, np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)):
        problem = SoftmaxRegression(x, y, 3, np.ones((1, 200)), basis)
        problem.solve(0.01, tolerance=1e-9, max_steps=400)
        found.append(problem.solution()[0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-3)


def test_large_matrices_are_decomposed_alike(monkeypatch):
    matrix = np.cov(np.random.default_rng(0).normal(size=(50, 90)).astype(np.float32), dtype=np.float32)
    values, vectors = logistic._eigenvectors(matrix.copy())
    monkeypatch.setattr(logistic, "LARGE_MATRIX", 10)
    other_values, other_vectors = logistic._eigenvectors(matrix.copy())
    np.testing.assert_allclose(values, other_values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(abs((vectors * other_vectors).sum(0)), 1, atol=1e-2)


def test_only_the_leading_directions_of_many_columns_are_rotated(monkeypatch):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(90, 40)) @ rng.normal(size=(40, 40)) * np.geomspace(1, 0.01, 40)).astype(np.float32)
    monkeypatch.setattr(logistic, "LEADING", 8)
    basis = logistic._leading_first(x.T @ x)
    np.testing.assert_allclose(basis.T @ basis, np.eye(40), atol=1e-5)
    exact = np.linalg.eigh(x.T @ x)[1][:, ::-1]
    np.testing.assert_allclose(abs((basis[:, :3] * exact[:, :3]).sum(0)), 1, atol=1e-2)
    y = rng.integers(0, 3, 90)
    whole = SoftmaxRegression(x, y, 3, np.ones((1, 90)))
    monkeypatch.setattr(logistic, "LARGE_MATRIX", 10)
    leading = SoftmaxRegression(x, y, 3, np.ones((1, 90)))
    for problem in (whole, leading):
        problem.solve(0.01, tolerance=1e-9, max_steps=400)
    np.testing.assert_allclose(leading.logits(), whole.logits(), atol=5e-3)
    same = logistic._leading_first(np.zeros((40, 40), np.float32))
    np.testing.assert_allclose(same.T @ same, np.eye(40), atol=1e-5, err_msg="identical rows")


def test_penalties_stronger_than_the_first_are_tried_if_it_is_the_best():
    rng = np.random.default_rng(0)
    last, y = rng.normal(size=(60, 20)), np.arange(60) % 2  # nothing to learn
    found = fit_probe(ArrayFeatures(last), y, 2)
    assert {trial.penalty for trial in found.trials} >= {0.1, 0.3, 1.0}
    assert next(trial for trial in found.trials if trial.chosen).penalty == 1.0


def test_many_images_of_many_classes_get_nearly_the_same_head(monkeypatch, tmp_path):
    last, y = blobs(n=600, spread=2.5)
    whole = fit_probe(ArrayFeatures(last), y, 4)
    monkeypatch.setenv("TOPWORK_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "FINAL_BUDGET", 100 * 20 * 4)
    for module in (shards, logistic, probe):
        monkeypatch.setattr(module, "IN_MEMORY", 1000)
    monkeypatch.setattr(logistic, "BLOCK", 400)
    monkeypatch.setattr(probe, "_ROWS", 64)
    warm = fit_probe(ArrayFeatures(last), y, 4)
    blocks = {"last": last, "stages": np.zeros((600, 0))}
    np.testing.assert_allclose(warm.head.transform.scale, whole.head.transform.scale, rtol=1e-5)
    expected, found = (one.head.logits(blocks) for one in (whole, warm))
    assert np.mean(expected.argmax(1) == found.argmax(1)) > 0.99
    assert abs(probe.cross_entropies(found, y).mean() - probe.cross_entropies(expected, y).mean()) < 2e-3
