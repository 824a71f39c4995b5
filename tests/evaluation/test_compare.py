import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from topwork.errors import UsageError
from topwork.evaluation.compare import accuracy_difference_interval, compare, mcnemar
from topwork.evaluation.predictions import Predictions


def answers(labels, predicted, classes=("ant", "bee", "cat")):
    logits = np.eye(len(classes))[list(predicted)].reshape(-1, len(classes))
    return Predictions(classes, np.arange(len(labels)), np.asarray(labels, dtype=int), logits)


HASHES = ["h0", "h1", "h2", "h3", "h4"]


def test_five_images_known_by_thought():
    first = answers([0, 0, 1, 1, 2], [0, 1, 1, 0, 0])
    second = answers([0, 0, 1, 1, 2], [0, 0, 2, 1, 1])
    c = compare(first, second, HASHES, HASHES)
    assert (c.n, c.accuracy_first, c.accuracy_second) == (5, 0.4, 0.6)
    assert c.difference == pytest.approx(0.2)
    assert c.difference_interval.low < 0 < 0.2 < c.difference_interval.high
    assert c.gained.tolist() == [1, 3]
    assert c.lost.tolist() == [2]
    assert c.disagreements.tolist() == [1, 2, 3, 4]
    assert c.p_value == 1.0
    expected = {"n": 2, "accuracy_first": 0.5, "accuracy_second": 0.5, "n_gained": 1, "n_lost": 1}
    assert c.per_class["bee"] == expected


def test_images_are_matched_by_content_and_classes_by_name():
    first = answers([0, 0, 1, 1, 2], [0, 1, 1, 0, 0])
    order = [3, 0, 4, 1, 2]
    renamed = answers([1, 0, 2, 0, 1], [1, 0, 1, 0, 2])
    renamed = Predictions(("cat", "ant", "bee"), np.arange(5), (renamed.labels + 1) % 3, renamed.logits[:, [2, 0, 1]])
    plain = compare(first, answers([0, 0, 1, 1, 2], [0, 0, 2, 1, 1]), HASHES, HASHES)
    shuffled = compare(first, renamed, HASHES, [HASHES[i] for i in order])
    assert shuffled.gained.tolist() == plain.gained.tolist()
    assert shuffled.disagreements.tolist() == plain.disagreements.tolist()
    assert shuffled.per_class == plain.per_class


def test_a_class_that_only_one_model_has_counts_against_the_other():
    first = answers([0, 1, -1, -1], [0, 1, 0, 0], ("ant", "bee"))
    second = answers([0, 1, 2, -1], [0, 1, 2, 2])
    c = compare(first, second, HASHES[:4], HASHES[:4])
    assert (c.n, c.accuracy_first, c.accuracy_second) == (3, 2 / 3, 1.0)
    assert c.gained.tolist() == [2]
    assert c.disagreements.tolist() == [2, 3]


def test_other_images_are_refused():
    p = answers([0, 1], [0, 1])
    with pytest.raises(UsageError, match="1 only in the first, 1 only in the second"):
        compare(p, p, ["x", "y"], ["x", "z"])
    with pytest.raises(UsageError, match="same images"):
        compare(p, answers([0], [0]), ["x", "y"], ["x"])
    with pytest.raises(UsageError, match="same images"):
        compare(p, p, ["x", "x"], ["x", "y"])


def test_other_labels_are_refused():
    with pytest.raises(UsageError, match="different labels"):
        compare(answers([0], [0]), answers([1], [0]), ["x"], ["x"])


def test_copies_of_one_image_are_matched_in_their_order():
    p = answers([0, 0, 1], [0, 1, 1])
    c = compare(p, p, ["x", "x", "y"], ["x", "x", "y"])
    assert len(c.disagreements) == 0


def test_no_image():
    p = answers([], [])
    c = compare(p, p, [], [])
    assert (c.n, c.difference, c.difference_interval, c.p_value, c.per_class) == (0, None, None, 1.0, {})


def test_mcnemar_known_by_thought():
    # five images, all won by the second: 2 * 0.5**5
    assert mcnemar([False] * 5, [True] * 5) == pytest.approx(0.0625)
    assert mcnemar([True, False], [True, False]) == 1.0
    assert mcnemar([], []) == 1.0


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    first = np.repeat([True, False], [lost, gained])
    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(first, ~first) == pytest.approx(expected)
    assert mcnemar(first, ~first) == pytest.approx(mcnemar(~first, first))


def test_equal_answers_are_not_known_to_be_equal_models():
    few = accuracy_difference_interval([True] * 10, [True] * 10)
    many = accuracy_difference_interval([True] * 1000, [True] * 1000)
    assert few.low < -0.05
    assert many.low > -0.01
