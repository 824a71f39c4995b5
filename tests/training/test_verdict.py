"""The tuned network is kept when it is clearly better, or was asked for and is not clearly worse."""

import numpy as np
import pytest

from topwork.training.verdict import weigh

LABELS = np.arange(200) % 2


def answers(n_wrong, margin=3.0, seed=0):
    """Logits that are right but for some, with a bit of noise."""
    rng = np.random.default_rng(seed)
    side = np.where(LABELS == 1, margin, -margin) + rng.normal(0, 0.5, 200)
    side[rng.choice(200, n_wrong, replace=False)] *= -1
    return np.stack([np.zeros(200), side], 1)


@pytest.mark.parametrize(
    ("n_probe", "n_tuned", "asked_for", "keeps"),
    [
        (40, 10, False, True),  # clearly better
        (40, 10, True, True),
        (20, 20, False, False),  # a draw: nobody asked for more
        (20, 20, True, True),
        (10, 40, False, False),  # clearly worse
        (10, 40, True, False),
    ],
)
def test_who_is_kept(n_probe, n_tuned, asked_for, keeps):
    found = weigh(answers(n_probe), answers(n_tuned, seed=1), LABELS, asked_for=asked_for)
    assert found.keeps_tuned == keeps
    assert found.words.startswith("The tuned network is kept" if keeps else "The probe is kept")
    assert "200 validation images" in found.words


def test_scale_does_not_decide():
    """Overconfident logits are compared at the temperature that suits them."""
    probe = answers(20)
    assert "by 0.000" in weigh(probe, 10 * probe, LABELS, asked_for=False).words
