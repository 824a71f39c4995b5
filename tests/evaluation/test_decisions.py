import numpy as np
import pytest

from topwork.evaluation.decisions import Decision, Thresholds, decide, fit_ambiguous, fit_positive, too_few_sentence
from topwork.evaluation.predictions import Task

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
