import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from topwork.errors import UsageError
from topwork.evaluation import predictions as module
from topwork.evaluation.predictions import Predictions, Task, log_softmax, softmax


def make(logits, labels, classes=None):
    logits = np.asarray(logits, dtype=float)
    classes = classes or tuple(f"c{i}" for i in range(logits.shape[1]))
    return Predictions(classes, np.arange(len(labels)) + 100, np.asarray(labels), logits)


def test_facts_of_three_images_known_by_thought():
    # softmax of (log 6, log 3, log 1) is (0.6, 0.3, 0.1)
    row = np.log([6.0, 3.0, 1.0])
    p = make([row, row, row], [0, 2, -1])
    np.testing.assert_allclose(p.probabilities, [[0.6, 0.3, 0.1]] * 3)
    assert p.predicted.tolist() == [0, 0, 0]
    np.testing.assert_allclose(p.confidence, 0.6)
    assert p.correct.tolist() == [True, False, False]
    np.testing.assert_allclose(p.loss, [-np.log(0.6), -np.log(0.1), np.nan])
    assert p.rank.tolist() == [0, 2, 3]
    assert len(p) == 3
    assert p.labeled().sample_indices.tolist() == [100, 101]


def test_equal_logits_are_ranked_as_argmax_does():
    p = make(np.zeros((3, 3)), [0, 1, 2])
    assert p.rank.tolist() == [0, 1, 2]
    assert p.correct.tolist() == [True, False, False]


def test_softmax_survives_huge_logits():
    huge = np.array([[1e300, 0.0], [-1e300, 0.0], [5e4, 5e4]])
    np.testing.assert_allclose(softmax(huge), [[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(log_softmax([[2000.0, 0.0]]), [[0, -2000]])
    p = make([[2000.0, 0.0]], [1])
    assert p.loss[0] == 2000


finite = st.floats(-1e4, 1e4)


@given(arrays(np.float64, st.tuples(st.integers(0, 7), st.integers(1, 6)), elements=finite), st.data())
def test_facts_agree_with_the_full_softmax(logits, data):
    n, n_classes = logits.shape
    labels = np.array(data.draw(st.lists(st.integers(-1, n_classes - 1), min_size=n, max_size=n)), dtype=int)
    p = make(logits, labels)
    assert (p.predicted == logits.argmax(axis=1)).all()
    np.testing.assert_allclose(p.confidence, p.probabilities.max(axis=1, initial=0))
    known = labels >= 0
    expected = -log_softmax(logits)[np.arange(n), labels] if n else np.empty(0)
    np.testing.assert_allclose(p.loss[known], expected[known], atol=1e-9)
    assert np.isnan(p.loss[~known]).all()
    assert (p.correct == (p.rank == 0)).all()
    np.testing.assert_allclose(p.probabilities.sum(axis=1), 1)


def test_blocks_do_not_change_anything(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(37, 5)).astype(np.float32), rng.integers(-1, 5, 37)
    whole = make(logits, labels)
    expected = (whole.predicted, whole.confidence, whole.loss, whole.rank)
    monkeypatch.setattr(module, "_BLOCK_VALUES", 20)
    parts = make(logits, labels)
    for a, b in zip(expected, (parts.predicted, parts.confidence, parts.loss, parts.rank), strict=True):
        np.testing.assert_array_equal(a, b)


def test_logits_are_left_as_they_were():
    logits = np.array([[3.0, 1.0], [0.0, 2.0]])
    p = make(logits.copy(), [0, 0])
    p.predicted, p.probabilities  # noqa: B018
    np.testing.assert_array_equal(p.logits, logits)


@pytest.mark.parametrize(
    ("classes", "indices", "labels", "logits", "words"),
    [
        (("a", "b"), [0], [0], [[1.0]], "logits of shape"),
        (("a", "b"), [0], [2], [[1.0, 2.0]], "label outside"),
        (("a", "b"), [0], [-2], [[1.0, 2.0]], "label outside"),
        (("a", "b"), [0, 1], [0], [[1.0, 2.0]], "sample indices"),
        (("a", "a"), [0], [0], [[1.0, 2.0]], "duplicate"),
        (("a", "b"), [0], [0], [[1.0, np.nan]], "finite"),
        ((), [], [], np.empty((0, 0)), "at least one class"),
    ],
)
def test_what_cannot_be_right_is_refused(classes, indices, labels, logits, words):
    with pytest.raises(UsageError, match=words):
        Predictions(classes, np.array(indices), np.array(labels), np.array(logits))


def test_several_labels_are_joined_and_confidence_is_that_of_the_least_sure_label():
    stated = np.array([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])
    truth = np.array([[True, True, False], [False, True, False]])
    task = Task("sigmoid", np.full(3, 0.5))
    found = Predictions(("a", "b", "c"), np.arange(2), truth, np.log(stated / (1 - stated)), task)
    assert found.answers == ["a|b", ""]
    assert found.correct.tolist() == [True, False]
    assert found.rank.tolist() == [0, 1]
    np.testing.assert_allclose(found.confidence, [0.6, 0.3])
    np.testing.assert_allclose(found.loss, [-np.log(0.9 * 0.6 * 0.9), -np.log(0.8 * 0.3 * 0.9)])
    assert found.take(np.array([False, True])).answers == [""]
    assert found.labeled() is found
    with pytest.raises(UsageError, match="sample indices"):
        Predictions(("a", "b"), [0], [0], [[1.0, 2.0]], task)


def test_thresholds_of_two_classes_move_the_answer():
    logits = np.log([[0.85, 0.15], [0.95, 0.05], [0.5, 0.5]])
    found = Predictions(("no", "yes"), np.arange(3), [1, 0, 1], logits, Task("softmax", np.array([0.9, 0.1])))
    assert found.answers == ["yes", "no", "yes"]
    assert found.correct.all()
    assert (found.given == found.task.given(found.probabilities)).all()
    np.testing.assert_allclose(found.confidence, [0.15, 0.95, 0.5])
    np.testing.assert_allclose(found.loss, -np.log([0.15, 0.95, 0.5]))
