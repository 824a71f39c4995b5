"""Answers with any number of labels: temperature, thresholds and decisions whose outcome can be reasoned out."""

from __future__ import annotations

import numpy as np
import pytest

from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.label_sets import (
    LabelPredictions,
    fit_label_thresholds,
    label_sets_decision,
    sigmoid,
)


def drawn(n: int, n_classes: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits ``scale`` times too large, and labels drawn from their probabilities."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (n, n_classes))
    return scale * logits, rng.random((n, n_classes)) < sigmoid(logits)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_scale(scale: float) -> None:
    logits, truth = drawn(4000, 3, scale)
    assert fit_temperature(logits, truth) == pytest.approx(scale, rel=0.06)


def test_perfect_answers_are_not_called_certain_and_nothing_gives_one() -> None:
    truth = np.eye(4, dtype=bool)[np.arange(40) % 4]
    temperature = fit_temperature(np.where(truth, 5.0, -5.0), truth)
    assert temperature > 0.05
    assert sigmoid(5 / temperature) < 1 - 1e-4
    assert fit_temperature(np.empty((0, 4)), np.empty((0, 4), bool)) == 1.0


def test_a_large_class_has_the_threshold_of_its_best_f1() -> None:
    logits, truth = drawn(20_000, 1)
    stated = sigmoid(logits)
    found = fit_label_thresholds(stated, truth)[0]

    def f1(threshold: float) -> float:
        given = stated >= threshold
        return float(2 * (given & truth).sum() / (given.sum() + truth.sum()))

    assert f1(found) == pytest.approx(max(f1(t) for t in np.arange(0.02, 0.98, 0.01)), abs=1e-3)
    assert found == pytest.approx(f1(found) / 2, abs=0.04)  # Lipton et al. 2014: half of the best F1


def test_a_class_with_one_image_takes_the_threshold_of_the_others() -> None:
    logits, truth = drawn(3000, 4)
    truth[:, 3] = False
    truth[0, 3], logits[0, 3] = True, 9.0  # by itself it would take anything below 1
    found = fit_label_thresholds(sigmoid(logits), truth)
    assert np.ptp(found[:3]) < 0.1
    assert found.min() >= 0.02
    assert found.max() <= 0.98


def test_no_label_is_an_answer_only_where_training_had_images_without() -> None:
    stated = np.array([[0.9, 0.1], [0.2, 0.1], [0.2, 0.1]])
    limits, scores = np.array([0.5, 0.5]), np.array([0.0, 0.0, 1.0])
    assert label_sets_decision(stated, limits, scores, 0.5, False).tolist() == ["label", "ambiguous", "unknown"]
    assert label_sets_decision(stated, limits, None, None, True).tolist() == ["label", "label", "label"]


def test_answers_are_joined_and_confidence_is_that_of_the_least_sure_label() -> None:
    logits = np.log(np.array([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]]) / (1 - np.array([[0.9, 0.6, 0.1], [0.2, 0.3, 0.1]])))
    truth = np.array([[True, True, False], [False, True, False]])
    found = LabelPredictions(("a", "b", "c"), np.arange(2), truth, logits, np.full(3, 0.5))
    assert found.answers == ["a|b", ""]
    assert found.correct.tolist() == [True, False]
    np.testing.assert_allclose(found.confidence, [0.6, 0.3])
    assert found.take(np.array([False, True])).answers == [""]
