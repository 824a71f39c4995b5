"""Fine-tuning the network on both domains: what it learns from, and when the result is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adaptation.test_guards import C, made
from topwork.adaptation.adapted_head import SURE, is_better, pseudo_labels, tuned_choice
from topwork.adaptation.align import AlignedHead
from topwork.adaptation.guards import choose


@pytest.fixture(scope="module")
def situation():
    """A shift that the features can follow only in part: classes overlap."""
    domains, _, truth = made()
    rng = np.random.default_rng(1)
    source, target = ((x + rng.normal(0, 1.6, x.shape)).astype(np.float32) for x in (domains.source, domains.target))
    noisy = replace(domains, source=source, target=target)
    choice = choose(noisy, AlignedHead(noisy).probabilities())
    assert choice.outcome == "adapted"
    return noisy, choice, truth


def test_only_what_the_methods_agree_on_is_learned(situation):
    domains, choice, _ = situation
    wanted = pseudo_labels(choice, domains.known)
    votes = choice.votes[np.arange(len(wanted)), choice.probabilities.argmax(1)]
    assert 0 < (votes < SURE).sum() < len(votes)
    assert np.array_equal(wanted.sum(1) > 0, votes >= SURE)
    assert np.array_equal(wanted.argmax(1)[votes >= SURE], choice.probabilities.argmax(1)[votes >= SURE])


def test_given_labels_are_certain(situation):
    choice = situation[1]
    answer = choice.probabilities.argmax(1)
    known = np.full(len(answer), -1)
    known[:10] = (answer[:10] + 1) % C  # the user says that the methods err
    assert np.array_equal(pseudo_labels(choice, known)[:10], np.eye(C)[known[:10]])


def test_a_network_that_sees_the_classes_better_is_kept(situation):
    domains, choice, truth = situation
    centers = np.random.default_rng(5).normal(0, 3.0, (C, domains.target.shape[1]))
    clear = replace(
        domains,
        source=(domains.source + centers[domains.labels]).astype(np.float32),
        target=(domains.target + centers[truth]).astype(np.float32),
    )
    verdict = is_better(domains, choice, clear, np.eye(C)[truth])
    assert verdict.is_kept
    after = tuned_choice(choice, np.eye(C)[truth], verdict)
    assert after.method.endswith("network fine-tuned")
    assert "The network was also fine-tuned" in after.reason
    assert np.array_equal(after.probabilities.argmax(1), truth)


def test_worse_answers_and_the_same_answers_are_not(situation):
    domains, choice, _ = situation
    worse = choice.probabilities.copy()
    worse[::3] = np.roll(worse[::3], 1, axis=1)
    assert not is_better(domains, choice, domains, worse).is_kept
    assert not is_better(domains, choice, domains, choice.probabilities).is_kept


def test_predictions_that_only_agree_with_themselves_are_not_kept(situation):
    """Drawn together by answers at random: they agree among their own neighbors; what was there before must not lie above."""
    domains, choice, _ = situation
    rng = np.random.default_rng(3)
    drawn = rng.integers(C, size=len(domains.target))
    blurred = replace(domains, target=rng.normal(0, 1, domains.target.shape).astype(np.float32))
    verdict = is_better(replace(domains), choice, blurred, np.eye(C)[drawn])
    assert not verdict.is_kept
