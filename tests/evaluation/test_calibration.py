import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from topwork.errors import UsageError
from topwork.evaluation.calibration import (
    Decision,
    Thresholds,
    decide,
    fit_ambiguous,
    fit_conformal,
    fit_positive,
    fit_temperature,
    fit_thresholds,
    target_precision_threshold,
    too_few_sentence,
)
from topwork.evaluation.curves import calibration_error
from topwork.evaluation.predictions import Task, log_softmax, sigmoid, softmax


def draw(n, n_classes, seed, scale=3.0):
    """Logits, and labels drawn from their softmax: calibrated at temperature 1."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, n_classes)) * scale
    labels = (softmax(logits).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    return logits, np.minimum(labels, n_classes - 1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_the_temperature_that_spoilt_the_logits_is_found(temperature):
    logits, labels = draw(20_000, 6, 0)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.03)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(2, 12), st.floats(0.2, 5), st.integers(0, 10**6))
def test_it_is_the_minimum_of_the_documented_loss(n, n_classes, factor, seed):
    logits, labels = draw(n, n_classes, seed)
    logits = logits * factor
    runner_up = np.argsort(-logits, axis=1)[:, 1]

    def loss(u):
        logs = log_softmax(logits * np.exp(-u))
        return -logs[np.arange(n), labels].sum() - 0.5 * logs[np.arange(n), runner_up].mean()

    best = minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-9})
    found = np.log(fit_temperature(logits, labels))
    assert loss(found) <= loss(best.x) + 1e-6


def test_perfect_held_out_images_do_not_promise_certainty():
    for n in (10, 100, 1000):
        for margin in (1.0, 20.0):
            logits, labels = margin * np.eye(4)[np.arange(n) % 4], np.arange(n) % 4
            wrong = 1 - softmax(logits / fit_temperature(logits, labels)).max(axis=1).mean()
            assert 0.3 / n < wrong < 0.7 / n


def test_temperature_scales_with_the_logits():
    logits, labels = draw(100, 4, 3)
    assert fit_temperature(3 * logits, labels) == pytest.approx(3 * fit_temperature(logits, labels), rel=1e-5)
    assert fit_temperature(np.zeros((5, 3)), [0, 1, 2, 0, 1]) == 1.0


def test_hopeless_logits_become_flat_but_stay_in_bounds():
    labels = np.arange(300) % 3
    temperature = fit_temperature(50.0 * np.eye(3)[(labels + 1) % 3], labels)
    assert 19 < temperature <= 20


def test_nothing_to_fit():
    assert fit_temperature(np.empty((0, 3)), []) == 1.0
    assert fit_temperature([[5.0, 1.0]], [-1]) == 1.0
    assert fit_temperature([[5.0]], [0]) == 1.0


def test_unknown_labels_change_nothing():
    logits, labels = draw(300, 4, 1)
    more = np.concatenate([logits, np.full((50, 4), 9.0)])
    assert fit_temperature(more, np.append(labels, np.full(50, -1))) == fit_temperature(logits, labels)


def test_calibrated_error_falls_and_answers_stay():
    logits, labels = draw(12_000, 5, 2)
    fitted, held_out = slice(0, 2000), slice(2000, None)
    spoilt = logits * 3
    temperature = fit_temperature(spoilt[fitted], labels[fitted])

    def error(scores):
        stated = softmax(scores)
        return calibration_error(stated.max(axis=1), stated.argmax(axis=1) == labels[held_out])

    assert error(spoilt[held_out]) > 0.1
    assert error(spoilt[held_out] / temperature) < 0.02


def test_conformal_threshold_known_by_thought():
    # nine held-out images: k = floor(10 * 0.1) = 1, so the smallest probability of a true class
    own = np.arange(1, 10) / 10
    stated = np.stack([own, 1 - own], axis=1)
    assert fit_conformal(stated, np.zeros(9, int), 0.9) == pytest.approx(0.1)
    assert fit_conformal(stated, np.zeros(9, int), 0.8) == pytest.approx(0.2)
    # eight cannot promise 90%
    assert fit_conformal(stated[:8], np.zeros(8, int), 0.9) is None


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("spoilt", [1.0, 3.0])
def test_conformal_sets_cover_what_they_promise(coverage, spoilt):
    # Over many splits into held-out and new images; also where the probabilities are badly calibrated.
    covered = []
    for seed in range(60):
        logits, labels = draw(1200, 5, seed)
        stated = softmax(logits * spoilt)
        threshold = fit_conformal(stated[:200], labels[:200], coverage)
        covered.append((stated[200:] >= threshold)[np.arange(1000), labels[200:]].mean())
    assert np.mean(covered) == pytest.approx(coverage, abs=0.02)


def test_precision_threshold_known_by_thought():
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    stated = np.stack([confidence, 1 - confidence], axis=1)
    labels = np.array([0, 0, 1, 0])  # right, right, wrong, right
    assert target_precision_threshold(stated, labels, 0.99) == 0.8
    assert target_precision_threshold(stated, labels, 0.75) == 0.0
    assert target_precision_threshold(stated, labels, 0.7) == 0.0
    assert target_precision_threshold(stated, 1 - labels, 0.9) is None
    assert target_precision_threshold(stated, labels, 0.9, cautious=True) is None
    assert target_precision_threshold(np.empty((0, 2)), [], 0.9) is None


def test_ties_are_answered_together():
    stated = np.array([[0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])
    assert target_precision_threshold(stated, [0, 0, 1, 1], 0.99) == 0.9


def test_cautious_threshold_keeps_its_word_on_new_images():
    kept = []
    for seed in range(40):
        logits, labels = draw(2500, 3, seed, scale=2.0)
        stated = softmax(logits)
        threshold = target_precision_threshold(stated[:500], labels[:500], 0.9, cautious=True)
        answered = stated[500:].max(axis=1) >= threshold
        kept.append((stated[500:].argmax(axis=1) == labels[500:])[answered].mean() >= 0.9)
    assert np.mean(kept) > 0.75


@pytest.mark.parametrize("share", [0.0, 1.0, 90])
def test_shares_outside_0_to_1_are_refused(share):
    with pytest.raises(UsageError, match="between 0 and 1"):
        fit_conformal([[0.5, 0.5]], [0], share)
    with pytest.raises(UsageError, match="between 0 and 1"):
        target_precision_threshold([[0.5, 0.5]], [0], share)


def test_shares_of_classes_and_weights_of_images_are_as_images_of_their_own():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (300, 3))
    labels = rng.integers(3, size=300)
    of_labels = fit_temperature(logits, labels)
    assert fit_temperature(logits, np.eye(3)[labels]) == pytest.approx(of_labels)
    twice = np.arange(300) < 100
    repeated = fit_temperature(np.concatenate([logits, logits[twice]]), np.concatenate([labels, labels[twice]]))
    assert fit_temperature(logits, labels, 1.0 + twice) == pytest.approx(repeated, rel=1e-2)
    assert fit_temperature(logits, np.full((300, 3), 1 / 3)) == pytest.approx(20, rel=1e-3)  # nothing is known


# ---- several labels per image


def drawn_labels(n, n_classes, scale=1.0):
    """Logits ``scale`` times too large, and labels drawn from their probabilities."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (n, n_classes))
    return scale * logits, rng.random((n, n_classes)) < sigmoid(logits)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_one_temperature_undoes_a_scale_of_several_labels(scale):
    assert fit_temperature(*drawn_labels(4000, 3, scale)) == pytest.approx(scale, rel=0.06)


def test_perfect_labels_are_not_called_certain_and_nothing_gives_one():
    truth = np.eye(4, dtype=bool)[np.arange(40) % 4]
    temperature = fit_temperature(np.where(truth, 5.0, -5.0), truth)
    assert temperature > 0.05
    assert sigmoid(5 / temperature) < 1 - 1e-4
    assert fit_temperature(np.empty((0, 4)), np.empty((0, 4), bool)) == 1.0


def test_a_large_class_has_the_threshold_of_its_best_f1():
    logits, truth = drawn_labels(20_000, 1)
    stated = sigmoid(logits)
    found = fit_thresholds(stated, truth)[0]

    def f1(threshold):
        given = stated >= threshold
        return float(2 * (given & truth).sum() / (given.sum() + truth.sum()))

    assert f1(found) == pytest.approx(max(f1(t) for t in np.arange(0.02, 0.98, 0.01)), abs=1e-3)
    assert found == pytest.approx(f1(found) / 2, abs=0.04)  # Lipton et al. 2014: half of the best F1


def test_a_class_with_one_image_takes_the_threshold_of_the_others():
    logits, truth = drawn_labels(3000, 4)
    truth[:, 3] = False
    truth[0, 3], logits[0, 3] = True, 9.0  # by itself it would take anything below 1
    found = fit_thresholds(sigmoid(logits), truth)
    assert np.ptp(found[:3]) < 0.1
    assert found.min() >= 0.02
    assert found.max() <= 0.98


# ---- decisions


STATED = np.array([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.9, 0.1]])
SCORES = np.array([0.1, 0.1, 0.1, 0.7])


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        (Thresholds(), ["label", "label", "label", "label"]),
        (Thresholds(confidence=0.6), ["label", "label", "ambiguous", "label"]),
        (Thresholds(set_probability=0.42), ["label", "label", "ambiguous", "label"]),
        (Thresholds(set_probability=0.4), ["label", "ambiguous", "ambiguous", "label"]),
        (Thresholds(set_probability=0.7), ["label", "ambiguous", "ambiguous", "label"]),
        (Thresholds(unknown=0.5), ["label", "label", "label", "unknown"]),
        (Thresholds(unknown=0.7), ["label", "label", "label", "label"]),
    ],
)
def test_each_rule_alone(thresholds, expected):
    assert decide(STATED, SCORES, thresholds).tolist() == expected


def test_unknown_goes_before_ambiguous_before_label():
    rules = Thresholds(unknown=0.5, confidence=0.8)
    assert decide(STATED, [0.1, 0.9, 0.1, 0.9], rules).tolist() == ["label", "unknown", "ambiguous", "unknown"]


def test_without_a_detector_nothing_is_unknown():
    assert decide(STATED, None, Thresholds(unknown=0.0)).tolist() == ["label"] * 4


def test_an_infinite_score_is_unknown():
    assert decide([[1.0, 0.0]], [np.inf], Thresholds(unknown=0.5)).tolist() == ["unknown"]


def test_no_image():
    rules = Thresholds(unknown=0.5, confidence=0.8, set_probability=0.5)
    assert decide(np.empty((0, 2)), np.empty(0), rules).shape == (0,)


def test_every_outcome_is_a_decision():
    rules = Thresholds(unknown=0.5, confidence=0.8)
    assert {Decision(value) for value in decide(STATED, SCORES, rules)} == set(Decision)


def test_ambiguous_thresholds_say_what_was_asked_and_what_was_met():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1.0, 2000)
    labels = (rng.uniform(size=2000) > confidence).astype(int)  # class 0 is right as often as it says
    stated = np.stack([confidence, 1 - confidence], axis=1)
    by_sets = fit_ambiguous(stated, labels, 0.9)
    assert by_sets["confidence"] is None
    assert (stated >= by_sets["set_probability"])[np.arange(2000), labels].mean() >= 0.9
    by_precision = fit_ambiguous(stated, labels, 0.9, 0.95)
    kept = confidence >= by_precision["confidence"]
    assert by_precision["set_probability"] is None
    assert by_precision["target_precision_met"] == "surely"
    assert (labels[kept] == 0).mean() >= 0.95
    assert fit_ambiguous(stated[:30], labels[:30], 0.9, 0.999)["target_precision_met"] in ("about", "no")
    never = fit_ambiguous(np.array([[0.9, 0.1]] * 20), np.ones(20, int), 0.9, 0.95)
    assert (never["confidence"], never["target_precision_met"]) == (1.0, "no")


def test_no_label_is_an_answer_only_if_training_had_images_without():
    stated, scores = np.array([[0.9, 0.1], [0.2, 0.1], [0.2, 0.1]]), np.array([0.0, 0.0, 1.0])
    task = Task("sigmoid", np.array([0.5, 0.5]))
    rule = Thresholds(unknown=0.5, task=task)
    assert decide(stated, scores, rule).tolist() == ["label", "ambiguous", "unknown"]
    assert decide(stated, None, Thresholds(task=task, none_is_an_answer=True)).tolist() == ["label"] * 3


def test_too_few_images_to_promise_a_coverage_are_answered_with_labels():
    stated, labels = np.array([[0.99, 0.01]] * 38), np.zeros(38, int)
    found = fit_ambiguous(stated, labels, 0.975)
    assert decide(stated, None, Thresholds(set_probability=found["set_probability"])).tolist() == ["label"] * 38
    assert "at least 39" in too_few_sentence(found)
    enough = fit_ambiguous(np.array([[0.99, 0.01]] * 39), np.zeros(39, int), 0.975)
    assert enough["set_probability"] == 0.5
    assert too_few_sentence(enough) is None


def test_the_threshold_of_a_positive_class_by_cost_and_by_recall():
    stated = np.stack([1 - np.arange(1, 20) / 20, np.arange(1, 20) / 20], axis=1)  # 0.05 to 0.95 for class 1
    labels = np.ones(19, int)
    assert fit_positive(stated, labels, 1, recall=None, miss_cost=9)[0] == pytest.approx(0.1)
    # 19 positives: k = floor(20 * 0.1) = 2, the second smallest probability
    assert fit_positive(stated, labels, 1, recall=0.9, miss_cost=None) == (
        pytest.approx(0.1),
        "recall of at least 90.0%",
    )
    threshold, by = fit_positive(stated[:5], labels[:5], 1, recall=0.9, miss_cost=None)
    assert threshold == pytest.approx(0.05)
    assert "5 images are too few to guarantee it" in by
    assert fit_positive(stated, labels, 0, recall=0.9, miss_cost=None)[0] == 0.5
