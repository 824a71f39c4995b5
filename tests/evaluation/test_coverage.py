"""Do the 95 % intervals hold the truth 95 times of 100? Many small datasets are drawn from known distributions."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from topwork.evaluation.compare import accuracy_difference_interval
from topwork.evaluation.curves import (
    calibration_error,
    calibration_error_interval,
    roc_auc,
    threshold_curve,
)
from topwork.evaluation.intervals import (
    auc_interval,
    average_precision_interval,
    balanced_accuracy_interval,
    f1_interval,
    lower_bound,
    macro_f1_interval,
    mean_interval,
    wilson,
)


def holds(interval, value):
    return interval.low <= value <= interval.high


@pytest.mark.parametrize("n", [30, 100, 300, 1000])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.9, 0.95])
def test_wilson_exactly(n, p):
    # Whole images make the coverage jump from one p to the next, so it is averaged around p. Where less than one error
    # is to be expected, plain Wilson sinks below that (n = 30, p = 0.995: 86 %); it is kept because readers know it.
    k, around = np.arange(n + 1), np.linspace(p - 0.02, p + 0.02, 41)
    intervals = [wilson(i / n, n) for i in k]
    coverage = [binom.pmf(k, n, q)[[holds(interval, q) for interval in intervals]].sum() for q in around]
    assert 0.94 <= np.mean(coverage) <= 0.965
    assert min(coverage) > 0.90


def test_one_sided_limit_exactly():
    k, n = np.arange(101), np.full(101, 100)
    for p in (0.8, 0.9, 0.95):
        assert 0.92 <= binom.pmf(k, 100, p)[lower_bound(k / 100, n) <= p].sum() <= 0.98


CASES = [  # classes, images, accuracy, ratio of largest to smallest class, spread of the accuracy over classes
    (2, 40, 0.90, 1, 0.0),
    (2, 100, 0.95, 1, 0.0),
    (2, 100, 0.95, 10, 0.04),
    (5, 60, 0.90, 1, 0.05),
    (5, 300, 0.97, 5, 0.02),
    (20, 200, 0.95, 1, 0.04),
    (20, 200, 0.80, 10, 0.10),
    (20, 2000, 0.95, 10, 0.04),
    (50, 300, 0.70, 10, 0.20),
    (20, 100, 0.99, 1, 0.005),
]


def table(n_classes, accuracy, ratio, spread, rng):
    """Joint distribution (C, C) of true and predicted label, and the recalls."""
    share = np.geomspace(1, ratio, n_classes)
    recall = np.clip(accuracy + spread * rng.uniform(-1, 1, n_classes), 0.02, 0.995)
    wrong = rng.dirichlet(np.ones(n_classes), n_classes)
    np.fill_diagonal(wrong, 0)
    rows = wrong / wrong.sum(axis=1, keepdims=True) * (1 - recall)[:, None]
    np.fill_diagonal(rows, recall)
    return rows * (share / share.sum())[:, None], recall


@pytest.mark.parametrize("case", CASES, ids=str)
def test_balanced_accuracy_and_macro_f1(case):
    n_classes, n, accuracy, ratio, spread = case
    rng = np.random.default_rng(0)
    joint, recall = table(n_classes, accuracy, ratio, spread, rng)
    f1 = 2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))
    n_draws, hits = 800, np.zeros(2)
    for counts in rng.multinomial(n, joint.ravel(), size=n_draws).reshape(n_draws, n_classes, n_classes):
        true, predicted = np.nonzero(counts)
        cells = np.stack([true, predicted, counts[true, predicted]], axis=1)
        right, per_class, given = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        present = per_class > 0
        balanced = balanced_accuracy_interval(right[present], per_class[present])
        hits[0] += holds(balanced, recall[present].mean())
        hits[1] += holds(macro_f1_interval(cells, right, per_class, given), f1[present].mean())
    balanced, macro = hits / n_draws
    assert 0.93 <= balanced <= 0.975
    assert 0.92 <= macro <= 0.985


@pytest.mark.parametrize(
    ("n", "share", "recall", "false"), [(100, 0.1, 0.8, 0.02), (200, 0.5, 0.9, 0.1), (1000, 0.05, 0.9, 0.01)]
)
def test_f1_of_a_class(n, share, recall, false):
    rng = np.random.default_rng(5)
    cells = rng.multinomial(
        n, [share * recall, share * (1 - recall), (1 - share) * false, (1 - share) * (1 - false)], 3000
    )
    truth = 2 * share * recall / (2 * share * recall + share * (1 - recall) + (1 - share) * false)
    hits = [holds(f1_interval(tp, tp + fn, tp + fp), truth) for tp, fn, fp, _ in cells if tp + fn + fp]
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize(("n_positive", "n_negative", "shift"), [(50, 50, 2.5), (30, 200, 2.5), (200, 200, 1.5)])
def test_average_precision(n_positive, n_negative, shift):
    rng = np.random.default_rng(6)

    def seen(k):
        is_positive = np.repeat([True, False], [k * n_positive, k * n_negative])
        return threshold_curve(is_positive, rng.normal(is_positive * shift)).average_precision

    truth = seen(2000)
    hits = [holds(average_precision_interval(seen(1), n_positive), truth) for _ in range(500)]
    assert 0.93 <= np.mean(hits) <= 1.0  # cautious where positives are many


@pytest.mark.parametrize(
    ("n_positive", "n_negative", "auc"),
    [(20, 20, 0.9), (10, 90, 0.9), (90, 10, 0.95), (50, 50, 0.98), (100, 100, 0.7), (200, 200, 0.9)],
)
def test_area_under_the_roc_curve(n_positive, n_negative, auc):
    rng = np.random.default_rng(1)
    is_positive = np.repeat([True, False], [n_positive, n_negative])
    shift = norm.ppf(auc) * np.sqrt(2)
    hits = [
        holds(auc_interval(roc_auc(is_positive, rng.normal(is_positive * shift)), n_positive, n_negative), auc)
        for _ in range(500)
    ]
    assert 0.93 <= np.mean(hits) <= 0.99


@pytest.mark.parametrize("n", [30, 100, 1000])
def test_mean_of_skewed_losses(n):
    rng = np.random.default_rng(2)
    draws = rng.gamma(0.3, 1.0, (2000, n))  # skewness 3.7, as the losses of a good classifier
    assert 0.925 <= np.mean([holds(mean_interval(row), 0.3) for row in draws]) <= 0.97


@pytest.mark.parametrize(("n", "temperature"), [(200, 1.0), (200, 0.5), (1000, 1.0), (1000, 0.5)])
def test_calibration_error(n, temperature):
    rng = np.random.default_rng(3)

    def draw(n_images):
        stated = rng.beta(4, 1.2, n_images)
        logit = np.log(stated / (1 - stated)) / temperature
        return 1 / (1 + np.exp(-logit)), rng.random(n_images) < stated

    truth = 0.0 if temperature == 1 else calibration_error(*draw(1_000_000))
    hits = [holds(calibration_error_interval(*draw(n), n_resamples=200), truth) for _ in range(250)]
    assert 0.91 <= np.mean(hits) <= 0.995


@pytest.mark.parametrize(
    ("n", "shares"), [(50, (0.02, 0.02)), (100, (0.10, 0.03)), (100, (0.3, 0.2)), (1000, (0.02, 0.01))]
)
def test_difference_of_two_models(n, shares):
    rng = np.random.default_rng(4)
    hits = []
    for _ in range(500):
        kind = rng.choice(3, size=n, p=[*shares, 1 - sum(shares)])  # only second right, only first right, alike
        interval = accuracy_difference_interval(kind == 1, kind == 0, n_resamples=500)
        hits.append(holds(interval, shares[0] - shares[1]))
    assert np.mean(hits) >= 0.93  # with a single disagreement in fifty images it is all but certain to hold
