"""Distances between sets of images: against the formula, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from topwork.evaluation.domains import class_shifts, energy_distance, farthest


def test_the_energy_distance_is_its_formula():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (20, 5)), rng.normal(0.5, 1, (30, 5))
    joint = np.concatenate([a, b])
    spread = joint.std(0)
    z = (joint - joint.mean(0)) / (spread + 0.1 * np.sqrt(np.mean(spread**2)))
    d = np.linalg.norm(z[:, None] - z[None], axis=2)
    energy = 2 * d[:20, 20:].mean() - d[:20, :20].mean() - d[20:, 20:].mean()
    found = energy_distance(a, b)
    assert found.energy == pytest.approx(energy / (d.sum() / (50 * 49)), rel=1e-4)
    assert (found.n_a, found.n_b) == (20, 30)


def test_equal_sets_show_no_clear_difference_and_moved_ones_do():
    rng = np.random.default_rng(1)
    chances = [
        energy_distance(rng.normal(0, 1, (60, 20)), rng.normal(0, 1, (60, 20)), seed=s).p_value for s in range(20)
    ]
    assert np.mean(np.array(chances) < 0.05) <= 0.15
    assert 0.2 < np.mean(chances) < 0.8
    moved = energy_distance(rng.normal(0, 1, (60, 20)), rng.normal(0.7, 1, (60, 20)))
    assert moved.p_value < 0.01
    assert moved.auc > 0.9
    assert moved.energy > 3 * moved.expected


def test_tiny_and_constant_sets_do_not_break():
    assert energy_distance(np.zeros((1, 3)), np.zeros((1, 3))).energy == 0
    assert energy_distance(np.ones((4, 3)), np.ones((5, 3))).p_value == 1


def test_only_the_class_that_moved_is_named():
    rng = np.random.default_rng(2)
    labels = np.repeat(["ant", "bee"], 40)
    a, b = rng.normal(0, 1, (80, 20)), rng.normal(0, 1, (80, 20))
    b[labels == "bee"] += 1.0
    found = class_shifts(a, labels, b, labels)
    assert found["bee"].p_value < 0.01 < found["ant"].p_value
    assert found["bee"].shift == pytest.approx(1.0, abs=0.15)
    assert found["ant"].shift < 0.2
    assert class_shifts(a, labels, b[:2], labels[:2]) == {}


def test_the_farthest_comes_first():
    a = np.array([[1.0, 0.0], [0.9, 0.1]])
    assert farthest(a, np.array([[1.0, 0.05], [-1.0, 0.0], [0.0, 1.0]])).tolist() == [1, 2, 0]
