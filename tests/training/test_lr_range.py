"""The range test leaves weights untouched, and its rules read known curves."""

import numpy as np
import pytest
import torch

from topwork.training.loop import fit
from topwork.training.lr_range import range_test, smooth, suggest
from training.drawn import TinyNetwork, recipe_for, streams


def test_range_test_leaves_weights_untouched_and_suggests_a_rate_that_learns():
    recipe = recipe_for(ema=None, augment="none", strategy="all")
    train, valid = streams(recipe=recipe)
    network = TinyNetwork()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = range_test(network, recipe, train, n_steps=60)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(found.rates) == len(found.losses)
    assert f"{found.suggestion:.1e}" in found.reason
    scores = {}
    for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        swept = recipe_for(ema=None, augment="none", strategy="all", epochs=4, lr=str(rate))
        scores[rate] = min(r["valid_loss"] for r in fit(TinyNetwork(), swept, train, valid).history)
    best = min(scores, key=scores.get)
    assert best / 10 <= found.suggestion <= best * 10


def test_the_rules_read_a_drawn_curve():
    rates = np.geomspace(1e-6, 1, 121)  # 20 steps a decade
    x = np.log10(rates)
    losses = np.where(x < -4, 2.0, np.where(x < -2, 2 - (x + 4) * 0.75, 0.5 + (x + 2) ** 2))
    found = suggest(rates, losses)
    assert found.rules["minimum/10"] == pytest.approx(1e-3, rel=0.2)
    assert 1e-4 <= found.rules["steepest"] <= 1e-2
    assert 1e-4 < found.rules["valley"] < 1e-2
    assert found.suggestion == sorted(found.rules[rule] for rule in ("steepest", "valley", "minimum/10"))[1]
    assert "75%" in found.reason


def test_a_flat_curve_says_that_it_says_little():
    found = suggest(np.geomspace(1e-6, 1, 50), np.full(50, 0.7) - np.linspace(0, 0.001, 50))
    assert "neither falls nor rises" in found.reason
    rates = np.geomspace(1e-6, 1, 121)
    rising = suggest(rates, np.where(rates < 1e-2, 0.3, 0.3 + 0.2 * np.log10(rates / 1e-2)))
    assert "hardly falls" in rising.reason
    assert rising.suggestion == pytest.approx(1e-3 * 10**0.15, rel=0.15)  # 0.33 is passed at 10**-1.85


def test_smoothing_starts_at_the_first_value():
    np.testing.assert_allclose(smooth(np.full(10, 3.0)), 3.0)
