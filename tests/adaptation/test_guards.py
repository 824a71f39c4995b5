"""The checks without labels: what they let through, and what they leave unchanged."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from topwork.adaptation import guards
from topwork.adaptation.align import AlignedHead, Domains
from topwork.adaptation.expected import expected_recall, predicted_accuracy
from topwork.adaptation.guards import choose, class_mix_entropy, images_to_label

C, D, N = 4, 60, 50


def images(rng, centers, counts):
    labels = np.repeat(np.arange(len(centers)), counts)
    return (centers[labels] + rng.normal(0, 1.0, (len(labels), D))).astype(np.float32), labels


def made(counts=(N,) * C, shift=4.0, other=False, seed=0):
    """A source, and a target that is moved and turned a little; ``other``: of classes that the source does not have."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(0, 1.0, (C, D))
    source, labels = images(rng, centers, (N,) * C)
    centers_of_target = centers
    if other:  # other directions altogether
        axes = np.linalg.qr(centers.T)[0]
        centers_of_target = rng.normal(0, 1.0, (C, D))
        centers_of_target = centers_of_target - centers_of_target @ axes @ axes.T
    target, truth = images(rng, centers_of_target, counts)
    moved = (target + shift * rng.normal(0, 0.5, D)).astype(np.float32)
    domains = Domains(source, labels, moved, np.full(len(truth), -1), C)
    return domains, AlignedHead(domains).probabilities(), truth


def accuracy(probabilities, truth):
    return (probabilities.argmax(1) == truth).mean()


def test_a_clear_shift_is_adapted_to_and_gains():
    domains, given, truth = made()
    choice = choose(domains, given)
    assert choice.outcome == "adapted"
    assert accuracy(choice.probabilities, truth) > accuracy(given, truth) + 0.2
    expected = predicted_accuracy(choice.probabilities.argmax(1), choice.votes)
    assert expected == pytest.approx(accuracy(choice.probabilities, truth), abs=0.15)
    assert "Similar images" in choice.reason
    assert choice.as_dict()["distance"]["p_value"] < 0.01


def test_a_target_like_the_source_is_left_as_it_is():
    domains, given, _ = made(shift=0.0)
    choice = choose(domains, given)
    assert (choice.outcome, choice.method) == ("unchanged", "none")
    assert "do not differ significantly" in choice.reason
    np.testing.assert_array_equal(choice.probabilities, given)


def of_pairs(shift):
    """A target whose classes lie between two of the source's each: near enough for every method to find something."""
    rng = np.random.default_rng(0)
    centers = rng.normal(0, 1.0, (C, D))
    source, labels = images(rng, centers, (N,) * C)
    pairs = list(itertools.combinations(range(C), 2))
    between = [(centers[i] + centers[j]) * 0.15 + rng.normal(0, 0.8, D) for i, j in pairs]
    target, _ = images(rng, np.stack(between), (30,) * len(pairs))
    target = (target + shift * rng.normal(0, 0.5, D)).astype(np.float32)
    noise = rng.normal(0, 0.7, (len(source) + len(target), D)).astype(np.float32)
    source, target = source + noise[: len(source)], target + noise[len(source) :]
    domains = Domains(source, labels, target, np.full(len(target), -1), C)
    return domains, AlignedHead(domains).probabilities()


def test_methods_that_contradict_each_other_on_images_of_the_same_look_are_not_believed(monkeypatch):
    domains, given = of_pairs(shift=0.5)
    choice = choose(domains, given)
    assert choice.outcome == "refused"
    assert "other classes" in choice.reason
    assert choice.checks["lead"] > guards.LEAST_LEAD  # the first rule lets them through
    np.testing.assert_array_equal(choice.probabilities, given)
    far = choose(*of_pairs(shift=2.0))  # another look explains the contradiction
    assert far.distance.energy > guards.FAR
    assert far.outcome != "refused"
    monkeypatch.setattr(guards, "LEAST_VOTES", 0.0)
    assert choose(domains, given).outcome == "adapted"
    monkeypatch.setattr(guards, "NO_MATCH", choice.checks["match"] + 0.01)
    assert "far from that class" in choose(domains, given).reason


def test_other_classes_are_not_relabeled():
    domains, given, _ = made(other=True)
    choice = choose(domains, given)
    assert choice.outcome != "adapted"
    np.testing.assert_array_equal(choice.probabilities, given)


def test_ten_images_are_too_few_without_labels():
    domains, given, _ = made(counts=(3, 3, 2, 2))
    choice = choose(domains, given)
    assert choice.outcome == "unchanged"
    assert "Too few" in choice.reason


@pytest.mark.parametrize("counts", [(60, 0, 0, 0), (60, 60, 0, 0), (80, 40, 20, 10)])
@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_another_class_mix_never_costs_more_than_chance(counts, shift):
    domains, given, truth = made(counts=counts, shift=shift, seed=3)
    choice = choose(domains, given)
    assert accuracy(choice.probabilities, truth) >= accuracy(given, truth) - 0.005


def test_few_labels_help_where_images_are_few():
    domains, given, truth = made(counts=(4, 4, 4, 4))
    known = np.where(np.arange(16) % 4 < 2, truth, -1)
    labeled = Domains(domains.source, domains.labels, domains.target, known, C)
    choice = choose(labeled, given)
    assert choice.method == "labels only"
    assert (choice.probabilities[known >= 0].argmax(1) == known[known >= 0]).all()


def test_images_to_label_are_unknown_ones_from_all_regions():
    domains, given, truth = made()
    known = np.full(len(truth), -1)
    known[:5] = truth[:5]
    labeled = Domains(domains.source, domains.labels, domains.target, known, C)
    asked = images_to_label(labeled, choose(labeled, given), 8)
    assert len(set(asked.tolist())) == 8
    assert (known[asked] < 0).all()
    assert len(set(truth[asked].tolist())) == C
    assert len(images_to_label(labeled, choose(labeled, given), 10_000)) == len(truth) - 5


def test_expected_accuracy_and_recall_by_hand():
    votes = np.array([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    assert predicted_accuracy(np.array([0, 0, 1]), votes) == pytest.approx((1 + 0.5 + 0.8) / 3)
    assert expected_recall(np.array([0, 0, 1]), votes, 0) == pytest.approx(1.5 / 1.7)
    assert expected_recall(np.array([0]), np.array([[1.0, 0.0]]), 1) is None


def test_class_mix_entropy_by_hand():
    assert class_mix_entropy(np.eye(2)[[0] * 50]) == 0
    assert class_mix_entropy(np.eye(2)[[0, 1] * 50]) == 1
