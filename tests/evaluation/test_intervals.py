import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import bdtr

from topwork.evaluation.intervals import (
    auc_interval,
    balanced_accuracy_interval,
    binomial_cdf,
    interval_from_variance,
    lower_bound,
    mean_interval,
    wilson,
)


def test_wilson_as_in_the_textbook():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(k / n, n).low == pytest.approx(low, abs=5e-5)
        assert wilson(k / n, n).high == pytest.approx(high, abs=5e-5)


def test_one_class_has_the_interval_of_plain_accuracy():
    assert balanced_accuracy_interval([18], [20]) == wilson(0.9, 20)


def test_equal_classes_that_are_equally_hard_have_the_interval_of_plain_accuracy():
    ours, plain = balanced_accuracy_interval([90] * 5, [100] * 5), wilson(0.9, 500)
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high))


def test_a_rare_class_makes_the_interval_wide():
    narrow, wide = balanced_accuracy_interval([90, 90], [100, 100]), balanced_accuracy_interval([171, 9], [190, 10])
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=10))
def test_balanced_accuracy_lies_in_its_interval(rows):
    n = np.array([images for images, _ in rows])
    right = np.array([round(images * share) for images, share in rows])
    interval = balanced_accuracy_interval(right, n)
    assert 0 <= interval.low <= (right / n).mean() + 1e-12
    assert (right / n).mean() - 1e-12 <= interval.high <= 1


@given(st.floats(0, 1), st.integers(1, 200), st.integers(1, 200))
def test_auc_lies_in_its_interval_and_reversal_mirrors_it(auc, n_positive, n_negative):
    interval = auc_interval(auc, n_positive, n_negative)
    assert 0 <= interval.low <= auc <= interval.high <= 1
    mirrored = auc_interval(1 - auc, n_positive, n_negative)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_mean_interval_without_skewness_is_the_normal_one():
    values = np.array([-1.0, 1.0] * 50)
    half = 1.959964 * values.std(ddof=1) / 10
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((-half, half))


def test_mean_interval_follows_the_skewness():
    values = np.array([0.0] * 95 + [5.0] * 5)
    interval = mean_interval(values)
    assert interval.high - values.mean() > 1.3 * (values.mean() - interval.low)


def test_mean_interval_of_too_few_or_equal_values():
    assert mean_interval([]) is None
    assert mean_interval([1.0]) is None
    assert (mean_interval([2.0, 2.0]).low, mean_interval([2.0, 2.0]).high) == (2.0, 2.0)


def test_a_score_that_never_varied_counts_as_the_most_images():
    assert interval_from_variance(1.0, 0.0, 50) == wilson(1.0, 50)
    assert interval_from_variance(0.9, 0.9 * 0.1 / 80, 1000) == wilson(0.9, 80)


def test_lower_bound_is_one_end_of_a_90_percent_interval():
    bound = lower_bound(np.array([1.0, 0.9]), np.array([52, 100]))
    assert bound[0] == pytest.approx(0.9505, abs=1e-3)
    assert wilson(0.9, 100).low < bound[1] < 0.9


@given(st.integers(0, 2000), st.floats(0, 1), st.floats(0.001, 0.999))
def test_binomial_cdf_is_that_of_scipy(n, part, share):
    k = int(part * n)
    assert binomial_cdf(k, n, share) == pytest.approx(bdtr(k, n, share), rel=1e-7, abs=1e-12)
