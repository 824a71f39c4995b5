"""Which weights are kept, whether the tuned network is, and the estimate of auto mode."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from topwork.training import selection
from topwork.training.loop import EvalResult, TrainableNetwork, evaluate, fit
from topwork.training.selection import (
    REMOVED,
    estimate,
    interpolate,
    mean_of,
    select_model,
    select_weights,
    training_rate,
)
from training.drawn import TinyNetwork, recipe_for, streams


def test_interpolation_is_the_line_between_and_counters_are_kept():
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([4.0, 4.0]), "n": torch.tensor(9)},
    )
    middle = interpolate(start, end, 0.25)
    torch.testing.assert_close(middle["w"], torch.tensor([1.0, 2.5]))
    assert int(middle["n"]) == 9
    torch.testing.assert_close(mean_of([start, end])["w"], torch.tensor([2.0, 3.0]))


@functools.cache
def trained(**settings):
    recipe = recipe_for(epochs=6, strategy="all", **settings)
    train, valid = streams(recipe=recipe)
    return recipe, valid, fit(TinyNetwork(), recipe, train, valid)


def test_the_chosen_weights_are_what_the_table_says():
    recipe, valid, tuned = trained(average_best=2)
    selected = select_weights(TinyNetwork(seed=4), tuned, recipe, valid)
    last = tuned.history[-1]
    names = [f"epoch {last['epoch']}"]
    if tuned.best_epoch != last["epoch"]:
        names.append(f"epoch {tuned.best_epoch}")
    names += [
        "the original weights",
        *(f"a blend of {n}% fine-tuned and {100 - n}% original weights" for n in (25, 50, 75)),
    ]
    assert [candidate.name for candidate in selected.tried][:-1] == names
    assert selected.tried[-1].name.startswith("the mean of epochs")
    (kept,) = [candidate for candidate in selected.tried if candidate.chosen]
    frozen = dataclasses.replace(
        recipe, phases=tuple(dataclasses.replace(p, batch_norm="frozen") for p in recipe.phases)
    )
    network = TinyNetwork()
    network.load_state_dict(selected.state)
    judged = evaluate(TrainableNetwork(network, frozen, valid, "cpu"), valid, recipe)
    assert judged.calibrated_loss == pytest.approx(kept.loss, rel=1e-4)
    assert selected.tried[0].loss == pytest.approx(last["valid_calibrated_loss"], rel=1e-4)


def figures(losses, accuracy=0.5):
    """Figures whose accuracy is that of the last images."""
    losses = np.asarray(losses, float)
    correct = (np.arange(len(losses)) >= round((1 - accuracy) * len(losses))).astype(float)
    return EvalResult(losses.mean(), accuracy, losses.mean(), losses, correct, np.ones(len(losses)))


def choice(monkeypatch, *results, ending="finished", **settings):
    """The reason of a choice among the last epoch and epoch 2, whose figures on valid are given."""
    recipe, valid, tuned = trained(interpolate=False, **settings)
    found = iter(results)
    monkeypatch.setattr(selection, "evaluate", lambda *_: next(found))
    return select_weights(TinyNetwork(), dataclasses.replace(tuned, best_epoch=2, ending=ending), recipe, valid)


def test_in_doubt_the_last_epoch_is_kept_and_otherwise_the_clearly_better_one(monkeypatch):
    rng = np.random.default_rng(0)
    last = rng.gamma(1.0, 0.3, 200)
    other = last + rng.permuted(np.tile([-0.3, 0.28], 100))  # better by 0.01, and by chance as likely worse
    found = choice(monkeypatch, figures(last), figures(other))
    assert found.reason == "Kept epoch 6: epoch 2 would be better, but not clearly (validation loss by 0.010 ± 0.021)."
    assert [candidate.chosen for candidate in found.tried] == [True, False]
    found = choice(monkeypatch, figures(last), figures(last - 0.05 + 0.1 * rng.normal(size=200)))
    assert found.reason.startswith("Kept epoch 2: clearly better than epoch 6 (validation loss by 0.0")
    assert [candidate.chosen for candidate in found.tried] == [False, True]
    found = choice(monkeypatch, figures(last), figures(last + 0.1))
    assert found.reason == "Kept epoch 6: it has the best validation loss."
    # the last epoch of a training that was ended early is nothing special
    assert choice(monkeypatch, ending="patience").reason == "Kept epoch 2, the only candidate."


def test_by_accuracy_one_image_is_no_clear_difference(monkeypatch):
    n = len(trained()[1].labels)
    last, one_more, four_more = (figures(np.ones(n), 0.5 + k / n) for k in (0, 1, 4))
    assert choice(monkeypatch, last, one_more, monitor="accuracy").reason.startswith(
        "Kept epoch 6: epoch 2 would be better, but not clearly"
    )
    assert choice(monkeypatch, last, four_more, monitor="accuracy").reason.startswith("Kept epoch 2: clearly better")


def test_without_valid_the_tuned_weights_are_kept():
    recipe = recipe_for(n_valid=0, epochs=1)
    tuned = fit(TinyNetwork(), recipe, streams(recipe=recipe)[0])
    torch.testing.assert_close(select_weights(TinyNetwork(), tuned, recipe, None).state, tuned.best)


# ---- estimate


def test_the_estimate_is_quartiles_of_what_others_found():
    recipe = recipe_for(epochs=10)
    low, high = np.quantile(REMOVED, [0.25, 0.75])
    found = estimate(0.85, 2000, 1000, recipe, images_per_second=50, budget_minutes=None)
    assert (found.gain_low, found.gain_high) == pytest.approx((15 * low, 15 * high))
    assert found.minutes == pytest.approx(10 * 1000 / 50 / 60)
    assert found.worth_it
    assert found.message.endswith("Tuning.")


def test_no_tuning_where_noise_is_larger_than_the_gain_or_time_too_short():
    recipe = recipe_for(epochs=10)
    near = estimate(0.99, 100, 1000, recipe, 50, None)
    assert not near.worth_it
    assert "noise" in near.message
    long = estimate(0.7, 10_000, 100_000, recipe, 50, 5.0)
    assert not long.worth_it
    assert "--time-budget" in long.message


def test_the_training_rate_is_measured():
    recipe = recipe_for()
    assert training_rate(TinyNetwork(), recipe, streams(recipe=recipe)[0], "cpu", seconds=0.05) > 1


# ---- probe or tuned


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
    found = select_model(answers(n_probe), answers(n_tuned, seed=1), LABELS, asked_for=asked_for)
    assert found.keeps_tuned == keeps
    assert found.message.startswith("Kept the tuned network" if keeps else "Kept the probe")
    assert "200 validation images" in found.message


def test_scale_does_not_decide():
    """Overconfident logits are compared at the temperature that suits them."""
    probe = answers(20)
    assert "by 0.000" in select_model(probe, 10 * probe, LABELS, asked_for=False).message
