import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from topwork.errors import UsageError
from topwork.evaluation.multilabel import evaluate_multilabel


def test_three_images_known_by_thought():
    labels = [[1, 0], [1, 1], [0, 0]]
    probabilities = [[0.9, 0.6], [0.4, 0.7], [0.5, 0.1]]
    e = evaluate_multilabel(labels, probabilities, ("a", "b"))
    # a: given to images 0 and 2; ranked 0, 2, 1 -> AP = (1 + 2/3) / 2; b: given to 0 and 1; ranked 1, 0 -> AP = 1
    assert e.per_class["a"].average_precision == pytest.approx(5 / 6)
    assert e.per_class["b"].average_precision == 1
    assert e.mean_average_precision == pytest.approx(11 / 12)
    assert (e.per_class["a"].precision, e.per_class["a"].recall, e.per_class["a"].f1) == (0.5, 0.5, 0.5)
    assert e.per_class["b"].f1 == pytest.approx(2 / 3)
    assert e.macro_f1 == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert e.micro_f1 == pytest.approx(2 * 2 / (3 + 4))
    assert e.exact_match == 0
    assert e.hamming_loss == pytest.approx(3 / 6)
    json.dumps(e.as_dict(), allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 10**6), st.booleans())
def test_equal_to_scikit_learn(n, n_classes, seed, ties):
    rng = np.random.default_rng(seed)
    labels = rng.random((n, n_classes)) < 0.4
    scores = np.clip(labels * 0.2 + rng.random((n, n_classes)) * 0.8, 0, 1)
    scores = scores.round(1) if ties else scores
    thresholds = rng.uniform(0.3, 0.7, n_classes)
    classes = [f"c{i}" for i in range(n_classes)]
    e = evaluate_multilabel(labels, scores, classes, thresholds, n_resamples=3)
    given_labels = scores >= thresholds
    present = labels.any(axis=0)
    for i, name in enumerate(classes):
        if present[i]:
            expected = sk.average_precision_score(labels[:, i], scores[:, i])
            assert e.per_class[name].average_precision == pytest.approx(expected)
            f1 = sk.f1_score(labels[:, i], given_labels[:, i], zero_division=0)
            assert e.per_class[name].f1 == pytest.approx(f1)
        else:
            assert e.per_class[name].average_precision is None
    if labels.any() or given_labels.any():
        counted = (labels & given_labels).sum(), labels.sum() + given_labels.sum()
        assert e.micro_f1 == pytest.approx(2 * counted[0] / counted[1])
    assert e.exact_match == pytest.approx((labels == given_labels).all(axis=1).mean())
    assert e.hamming_loss == pytest.approx(sk.hamming_loss(labels, given_labels))
    for name, interval in e.intervals.items():
        assert 0 <= interval.low <= getattr(e, name) <= interval.high <= 1
    json.dumps(e.as_dict(), allow_nan=False)


def test_nothing_to_measure():
    e = evaluate_multilabel(np.empty((0, 2)), np.empty((0, 2)), ("a", "b"))
    assert (e.n, e.mean_average_precision, e.micro_f1, e.exact_match, e.intervals) == (0, None, None, None, {})
    e = evaluate_multilabel(np.zeros((3, 2)), np.zeros((3, 2)), ("a", "b"))
    assert (e.mean_average_precision, e.micro_f1, e.macro_f1, e.exact_match) == (None, None, None, 1)


def test_wrong_shapes_are_refused():
    with pytest.raises(UsageError, match="fit together"):
        evaluate_multilabel(np.zeros((3, 2)), np.zeros((3, 3)), ("a", "b"))


def test_interval_of_the_mean_average_precision_covers():
    rng = np.random.default_rng(0)

    def draw(n):
        labels = rng.random((n, 3)) < [0.5, 0.3, 0.15]
        return labels, 1 / (1 + np.exp(-(2.5 * labels + rng.normal(size=(n, 3)) - 1.2)))

    truth = evaluate_multilabel(*draw(100_000), "abc", n_resamples=0)
    hits = np.zeros(3)
    names = ("mean_average_precision", "micro_f1", "macro_f1")
    for _ in range(120):
        intervals = evaluate_multilabel(*draw(150), "abc", n_resamples=40).intervals
        hits += [intervals[k].low <= getattr(truth, k) <= intervals[k].high for k in names]
    assert (hits / 120 > 0.90).all(), hits / 120
