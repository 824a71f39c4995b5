import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from topwork.evaluation.audit import outliers, suspected_labels


def test_four_images_known_by_thought():
    # usual probabilities: class 0 mean(0.9, 0.8, 0.1) = 0.6, class 1 0.7
    stated = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.3, 0.7]])
    found = suspected_labels(stated, [0, 0, 0, 1])
    assert [s.position for s in found] == [2]
    s = found[0]
    assert (s.label, s.suggested, s.is_confident) == (0, 1, True)
    assert s.score == pytest.approx((0.9 - 0.7) - (0.1 - 0.6))
    assert (s.label_probability, s.suggested_probability) == (0.1, 0.9)
    assert (s.neighbors, s.neighbor_agreement) == ((), None)
    assert [s.position for s in suspected_labels(stated, [0, 0, 0, 1], n=9)] == [2, 3, 1, 0]


def test_neighbors_are_the_evidence():
    stated = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9], [0.9, 0.1]])
    features = np.array([[1, 0], [1, 0.1], [0.1, 1], [0, 1], [1, 0.02]])
    found = suspected_labels(stated, [0, 0, 1, 1, 1], features, n=1, n_neighbors=2)[0]
    assert found.position == 4
    assert found.neighbors == (0, 1)
    assert found.neighbor_agreement == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_label_errors_are_found(seed):
    rng = np.random.default_rng(seed)
    n, n_classes = 600, 8
    true = np.arange(n) % n_classes
    features = rng.normal(size=(n_classes, 30))[true] + 0.9 * rng.normal(size=(n, 30))
    planted = rng.choice(n, n // 20, replace=False)
    labels = true.copy()
    labels[planted] = (true[planted] + rng.integers(1, n_classes, len(planted))) % n_classes
    stated = cross_val_predict(LogisticRegression(C=0.1), features, labels, cv=5, method="predict_proba")
    first = suspected_labels(stated, labels, features, n=round(0.07 * n))
    found = {s.position for s in first} & set(planted.tolist())
    assert len(found) >= 0.8 * len(planted)
    right = [s.suggested == true[s.position] for s in first if s.position in found]
    assert np.mean(right) > 0.9
    # as many as confident learning counts: of the order of the number planted
    assert 0.4 * len(planted) < len(suspected_labels(stated, labels)) < 2 * len(planted)


def test_nobody_is_suspected_where_there_is_nothing_to_suspect():
    assert suspected_labels(np.empty((0, 3)), []) == ()
    assert suspected_labels([[1.0], [1.0]], [0, 0]) == ()
    assert suspected_labels([[0.1, 0.9]], [-1], n=5) == ()
    # one class labeled only: nothing is known of the other
    assert [s.is_confident for s in suspected_labels([[0.1, 0.9], [0.2, 0.8]], [0, 0], n=5)] == [False, False]


def test_images_without_a_label_are_neighbors_but_not_suspects():
    stated = np.array([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9], [0.9, 0.1]])
    found = suspected_labels(stated, [0, -1, 1, 1], np.eye(4) + 0.1, n=9, n_neighbors=9)
    assert {s.position for s in found} == {0, 2, 3}
    assert set(found[0].neighbors) == {0, 1, 2}


def test_wrong_shapes_are_our_mistake():
    with pytest.raises(ValueError, match="do not match"):
        suspected_labels([[0.5, 0.5]], [0, 1])


def test_outliers_known_by_thought():
    features = np.array([[1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0.9, 0.1, 0], [0, 0, 1.0]])
    found = outliers(features, 2, n_neighbors=2)
    assert found[0].position == 4
    assert found[0].neighbors[0] == 2
    assert found[0].distance > 0.9 > 0.1 > found[1].distance


def test_outliers_of_few_or_damaged_images():
    assert outliers(np.empty((0, 3)), 5) == ()
    assert outliers(np.ones((1, 3)), 5) == ()
    assert {o.position for o in outliers([[1.0, 0], [0, 1], [np.nan, 1]], 5)} == {0, 1}


def test_outliers_of_many_images_use_a_sample():
    rng = np.random.default_rng(0)
    features = np.abs(rng.normal(1, 0.1, (6000, 16)))
    features[17] = np.eye(16)[3]
    assert outliers(features, 1)[0].position == 17
