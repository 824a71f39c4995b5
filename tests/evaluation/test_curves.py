import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from topwork.evaluation.curves import (
    calibration_error,
    calibration_error_interval,
    rank_correlation,
    reliability_bins,
    roc_auc,
    threshold_curve,
)
from topwork.evaluation.predictions import Predictions


def test_calibration_error_of_two_bins_known_by_thought():
    # (0.9, 0.9) half right: gap 0.4 with weight 2/3; (0.6) right: gap 0.4 with weight 1/3
    assert calibration_error([0.9, 0.9, 0.6], [True, False, True]) == pytest.approx(0.4)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert calibration_error([], []) is None


def test_gaps_in_one_bin_cancel_and_in_two_do_not():
    assert calibration_error([0.51, 0.51], [True, False], n_bins=10) == pytest.approx(0.01)
    assert calibration_error([0.4, 0.6], [True, False], n_bins=10) == pytest.approx(0.6)


def test_confidence_on_an_edge_belongs_to_the_lower_bin():
    p = Predictions(("a", "b"), np.arange(1), np.array([0]), np.zeros((1, 2)))  # confidence exactly 0.5
    assert [(b.n, b.high) for b in reliability_bins(p, n_bins=2)] == [(1, 0.5)]


def calibrated(n, seed, scale=3.0, n_classes=5, temperature=1.0):
    """Predictions whose labels are drawn from the very probabilities they state (at temperature 1)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * scale
    stated = np.exp(logits - logits.max(axis=1, keepdims=True))
    stated /= stated.sum(axis=1, keepdims=True)
    labels = np.minimum((stated.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1), n_classes - 1)
    return Predictions(tuple("abcdefgh"[:n_classes]), np.arange(n), labels, logits / temperature)


def test_calibrated_probabilities_have_almost_no_error():
    p = calibrated(200_000, 0)
    assert calibration_error(p.confidence, p.correct) < 0.005
    bad = calibrated(200_000, 0, temperature=0.5)
    assert calibration_error(bad.confidence, bad.correct) > 0.1


def test_interval_reaches_zero_just_where_calibration_is_possible():
    good, bad = calibrated(500, 1), calibrated(500, 1, temperature=0.3)
    assert calibration_error_interval(good.confidence, good.correct).low == 0
    assert calibration_error_interval(bad.confidence, bad.correct).low > 0.05


def test_reliability_bins_hold_every_labeled_image_once():
    p = calibrated(300, 2)
    p = Predictions(p.classes, p.sample_indices, np.where(np.arange(300) < 10, -1, p.labels), p.logits)
    bins = reliability_bins(p)
    assert sum(b.n for b in bins) == 290
    known = p.labeled()
    error = sum(b.n * abs(b.confidence - b.accuracy) for b in bins) / 290
    assert error == pytest.approx(calibration_error(known.confidence, known.correct))
    assert len(bins) < 15, "five classes: no confidence below 0.2"
    for b in bins:
        assert b.low < b.confidence <= b.high
        assert b.accuracy_interval.low <= b.accuracy <= b.accuracy_interval.high


def test_auc_known_by_thought():
    assert roc_auc([0, 1], [0.1, 0.9]) == 1
    assert roc_auc([0, 1], [0.9, 0.1]) == 0
    assert roc_auc([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]) == 0.5
    assert roc_auc([0, 1, 1], [0.3, 0.3, 0.9]) == 0.75
    assert roc_auc([1, 1], [0.3, 0.9]) is None
    assert roc_auc([], []) is None


pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40)


@settings(deadline=None)
@given(pairs)
def test_curves_equal_scikit_learn_ties_included(rows):
    truth, scores = np.array([t for t, _ in rows]), np.array([s for _, s in rows]) / 7
    ours = threshold_curve(truth, scores)
    if truth.all() or not truth.any():
        assert ours is None
        return
    assert roc_auc(truth, scores) == pytest.approx(sk.roc_auc_score(truth, scores))
    false, true, thresholds = sk.roc_curve(truth, scores, drop_intermediate=False)
    np.testing.assert_allclose(ours.false_positive_rate, false[1:])
    np.testing.assert_allclose(ours.recall, true[1:])
    np.testing.assert_allclose(ours.thresholds, thresholds[1:])
    assert ours.average_precision == pytest.approx(sk.average_precision_score(truth, scores))
    precision, recall, thresholds = sk.precision_recall_curve(truth, scores)
    np.testing.assert_allclose(ours.precision[::-1], precision[:-1])
    np.testing.assert_allclose(ours.recall[::-1], recall[:-1])
    np.testing.assert_allclose(ours.thresholds[::-1], thresholds)


def test_rank_correlation_agrees_with_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(3)
    sizes, recalls = rng.integers(1, 6, 10), rng.integers(0, 8, 10) / 8
    correlation, p_value = rank_correlation(sizes, recalls)
    expected = spearmanr(sizes, recalls)
    assert correlation == pytest.approx(expected.statistic)
    assert p_value == pytest.approx(expected.pvalue, abs=0.05)
    assert rank_correlation(sizes, sizes)[0] == pytest.approx(1.0)


def test_rank_correlation_needs_three_values_that_vary():
    assert rank_correlation([3, 3, 3], [0.1, 0.2, 0.3]) is None
    assert rank_correlation([1, 2], [0.1, 0.2]) is None
