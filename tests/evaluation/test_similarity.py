import numpy as np
import pytest

from topwork.errors import UsageError
from topwork.evaluation import similarity
from topwork.evaluation.curves import roc_auc
from topwork.evaluation.similarity import _centers_per_class, fit_unknown


def features_of(n_classes, n, seed, spread=0.6, n_features=64, first=0):
    """Features as of a network that ends in ReLU: positive, a few dozen features high per class."""
    centers = np.random.default_rng(99).gamma(0.5, 1.0, (200, n_features))[first : first + n_classes]
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return np.maximum(centers[labels] + spread * rng.normal(size=(n, n_features)), 0), labels


def is_unknown(detector, features):
    return detector.score(features) > detector.threshold


def test_two_directions_known_by_thought():
    features = np.array([[1.0, 0, 0]] * 10 + [[0, 2.0, 0]] * 10)
    detector = fit_unknown(features, np.repeat([0, 1], 10))
    np.testing.assert_allclose(np.sort(detector.centers, axis=0)[-1], [1, 1, 0])
    scores = detector.score([[5.0, 0, 0], [0, 0, 1], [1, 1, 0], [-1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(scores, [0, 1, 1 - np.sqrt(0.5), 1, 1], atol=1e-3)
    assert is_unknown(detector, [[0, 0, 1.0]]).all()


def test_unknown_classes_score_higher():
    known, labels = features_of(8, 320, 0)
    detector = fit_unknown(known, labels)
    fresh, _ = features_of(8, 400, 1)
    strange, _ = features_of(8, 400, 2, first=100)
    scores = np.concatenate([detector.score(fresh), detector.score(strange)])
    assert roc_auc(np.repeat([False, True], 400), scores) > 0.95


@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("n", [100, 800])
def test_the_false_alarm_rate_is_what_was_asked(rate, n):
    alarms = []
    for seed in range(12):
        known, labels = features_of(5, n, seed)
        fresh, _ = features_of(5, 1000, seed + 1000)
        alarms.append(is_unknown(fit_unknown(known, labels, rate, seed), fresh).mean())
    assert np.mean(alarms) <= rate + 0.01
    assert np.mean(alarms) >= rate * 0.5  # and not by calling nothing unknown


def test_copies_in_training_do_not_hide_the_alarms_when_grouped():
    known, labels = features_of(4, 80, 3, spread=0.9)
    fresh, _ = features_of(4, 2000, 4, spread=0.9)
    copies, copy_labels, groups = np.repeat(known, 6, axis=0), np.repeat(labels, 6), np.repeat(np.arange(80), 6)
    fooled = is_unknown(fit_unknown(copies, copy_labels), fresh).mean()
    grouped = is_unknown(fit_unknown(copies, copy_labels, groups=groups), fresh).mean()
    assert fooled > 0.3
    assert grouped < 0.1


def test_same_seed_same_detector():
    known, labels = features_of(5, 400, 5)
    a, b = fit_unknown(known, labels, seed=3), fit_unknown(known, labels, seed=3)
    np.testing.assert_array_equal(a.centers, b.centers)
    assert a.threshold == b.threshold


def test_scale_and_half_precision_do_not_matter():
    known, labels = features_of(5, 200, 6)
    detector = fit_unknown(known, labels)
    halves = fit_unknown(known.astype(np.float16), labels)
    np.testing.assert_allclose(detector.score(known * 1000), detector.score(known), atol=1e-5)
    np.testing.assert_allclose(halves.score(known), detector.score(known), atol=0.02)


def test_what_is_stored_stays_small():
    known, labels = features_of(20, 1000, 7, n_features=1280)
    detector = fit_unknown(known, labels)
    assert detector.centers.dtype == np.float16
    assert detector.centers.nbytes < 4_100_000
    for n_classes, n_images in ((3, 10_000), (150, 200), (1000, 20), (1500, 500)):
        quotas = _centers_per_class(np.full(n_classes, n_images), 1280)
        assert min(quotas) >= 1
        assert sum(quotas) * 1280 * 2 < 4_100_000
    assert sum(_centers_per_class(np.full(10_000, 50), 1280)) == 10_000


def test_a_single_image_per_class_calls_nothing_unknown():
    detector = fit_unknown(np.eye(3), [0, 1, 2])
    assert not is_unknown(detector, [[0.5, 0.5, 0.1], [-1, -1, -1]]).any()


def test_too_few_images_use_the_highest_score_seen():
    known, labels = features_of(2, 10, 9)
    detector = fit_unknown(known, labels)
    assert is_unknown(detector, known).mean() <= 0.1


def test_features_that_are_not_numbers_are_unknown_and_not_learned_from():
    known, labels = features_of(3, 60, 10)
    clean = fit_unknown(known, labels)
    assert is_unknown(clean, [[np.nan] * 64, [np.inf] * 64]).all()
    broken = np.concatenate([known, np.full((1, 64), np.nan)])
    assert np.isfinite(fit_unknown(broken, np.append(labels, 0)).centers).all()


def test_images_without_a_label_are_left_out():
    known, labels = features_of(3, 90, 11)
    strange, _ = features_of(3, 30, 12, first=50)
    both = fit_unknown(np.concatenate([known, strange]), np.append(labels, np.full(30, -1)))
    np.testing.assert_array_equal(both.centers, fit_unknown(known, labels).centers)


def test_no_image_to_score():
    known, labels = features_of(3, 30, 13)
    assert fit_unknown(known, labels).score(np.empty((0, 64))).shape == (0,)


def test_wrong_calls_are_refused():
    known, labels = features_of(3, 30, 14)
    with pytest.raises(UsageError, match="false-alarm rate"):
        fit_unknown(known, labels, false_alarm_rate=5)
    with pytest.raises(UsageError, match="at least one"):
        fit_unknown(known, np.full(30, -1))
    with pytest.raises(UsageError, match="64 features"):
        fit_unknown(known, labels).score(np.zeros((2, 5)))


def test_of_many_images_a_sample_is_fitted_that_leaves_out_no_small_class(monkeypatch):
    labels = np.repeat([0, 1, 2], [500, 80, 3])
    monkeypatch.setattr(similarity, "_LARGEST_SAMPLE", 100)
    chosen = similarity._sample(labels, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 100
    counts = np.bincount(labels[chosen])
    assert counts[2] == 3
    assert abs(counts[0] - counts[1]) <= 1
    known, labels = features_of(8, 1200, 0)
    detector = fit_unknown(known, labels)
    assert detector.score(features_of(8, 400, 2, first=100)[0]).mean() > detector.threshold
