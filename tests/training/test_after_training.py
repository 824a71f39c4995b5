"""Interpolation and averages, cached activations, the range test, and the estimate of auto mode."""

import dataclasses

import numpy as np
import pytest
import timm
import torch

from topwork.data.transforms import InputSpec
from topwork.errors import UsageError
from topwork.training import average
from topwork.training.average import choose_weights, interpolate, mean_of
from topwork.training.batches import ImageStream
from topwork.training.distributed import Processes
from topwork.training.estimate import REMOVED, estimate, training_rate
from topwork.training.loop import Judged, Prepared, fit, judge
from topwork.training.lr_range import range_test, smooth, suggest
from topwork.training.optimizer import stages_of
from topwork.training.recipe import DataFacts, TuneSettings, plan
from topwork.training.tail import border_of, split_children, tail_streams
from training.drawn import TinyNetwork, drawn_images, recipe_for, streams


def test_interpolation_is_the_line_between_and_counters_are_kept():
    start, end = (
        {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)},
        {"w": torch.tensor([4.0, 4.0]), "n": torch.tensor(9)},
    )
    middle = interpolate(start, end, 0.25)
    torch.testing.assert_close(middle["w"], torch.tensor([1.0, 2.5]))
    assert int(middle["n"]) == 9
    torch.testing.assert_close(mean_of([start, end])["w"], torch.tensor([2.0, 3.0]))


def trained(**settings):
    recipe = recipe_for(epochs=6, strategy="all", **settings)
    train, valid = streams(recipe=recipe)
    return recipe, valid, fit(TinyNetwork(), recipe, train, valid)


def test_the_chosen_weights_are_what_the_table_says():
    recipe, valid, tuned = trained(average_best=2)
    chosen = choose_weights(TinyNetwork(seed=4), tuned, recipe, valid)
    last = tuned.history[-1]
    names = [f"epoch {last['epoch']}"]
    if tuned.best_epoch != last["epoch"]:
        names.append(f"epoch {tuned.best_epoch}")
    names += ["the start", "0.25 tuned", "0.5 tuned", "0.75 tuned"]
    assert [mixture.name for mixture in chosen.tried][:-1] == names
    assert chosen.tried[-1].name.startswith("mean of epochs")
    (kept,) = [mixture for mixture in chosen.tried if mixture.chosen]
    frozen = dataclasses.replace(
        recipe, phases=tuple(dataclasses.replace(p, batch_norm="frozen") for p in recipe.phases)
    )
    network = TinyNetwork()
    network.load_state_dict(chosen.state)
    judged = judge(Prepared(network, frozen, valid, "cpu"), valid, recipe)
    assert judged.calibrated_loss == pytest.approx(kept.loss, rel=1e-4)
    assert chosen.tried[0].loss == pytest.approx(last["valid_calibrated_loss"], rel=1e-4)


def judged_as(losses, accuracy=0.5):
    losses = np.asarray(losses, float)
    return Judged(losses.mean(), accuracy, losses.mean(), np.stack([losses, np.ones(len(losses))], 1))


def choice(monkeypatch, *figures, ending="finished", **settings):
    """The reason of a choice among the last epoch and epoch 2, whose figures on valid are given."""
    recipe, valid, tuned = trained(interpolate=False, **settings)
    found = iter(figures)
    monkeypatch.setattr(average, "judge", lambda *_: next(found))
    return choose_weights(TinyNetwork(), dataclasses.replace(tuned, best_epoch=2, ending=ending), recipe, valid)


def test_in_doubt_the_last_epoch_is_kept_and_otherwise_the_clearly_better_one(monkeypatch):
    rng = np.random.default_rng(0)
    last = rng.gamma(1.0, 0.3, 200)
    other = last + rng.permuted(np.tile([-0.3, 0.28], 100))  # better by 0.01, and by chance as likely worse
    found = choice(monkeypatch, judged_as(last), judged_as(other))
    assert found.reason == "epoch 6: epoch 2 is better on valid, but within its error (loss, by 0.010 ± 0.021)."
    assert [mixture.chosen for mixture in found.tried] == [True, False]
    found = choice(monkeypatch, judged_as(last), judged_as(last - 0.05 + 0.1 * rng.normal(size=200)))
    assert found.reason.startswith("epoch 2: on valid clearly better than epoch 6 (loss, by 0.0")
    assert [mixture.chosen for mixture in found.tried] == [False, True]
    found = choice(monkeypatch, judged_as(last), judged_as(last + 0.1))
    assert found.reason == "epoch 6: best loss on valid."
    # the last epoch of a training that was ended early is nothing special
    assert choice(monkeypatch, ending="patience").reason == "epoch 2: there is nothing to compare it with."


def test_weights_of_images_count_in_the_error():
    """Images of weight 0 make no difference; two images as one of weight 2 give the same mean."""
    first, second = judged_as([1.0, 2.0, 3.0, 0.0]), judged_as([0.5, 2.5, 2.0, 0.0])
    for found in (first, second):
        found.by_image[3] = 0.0
    error = average._standard_error(first, second, Processes())
    difference = np.array([0.5, -0.5, 1.0])
    assert error == pytest.approx(difference.std() / 3**0.5)


def test_by_accuracy_one_image_is_no_clear_difference(monkeypatch):
    n = len(trained()[1].labels)
    last, one_more, four_more = (judged_as(np.ones(n), 0.5 + k / n) for k in (0, 1, 4))
    assert choice(monkeypatch, last, one_more, monitor="accuracy").reason.startswith(
        "epoch 6: epoch 2 is better on valid, but"
    )
    assert choice(monkeypatch, last, four_more, monitor="accuracy").reason.startswith(
        "epoch 2: on valid clearly better"
    )


def test_without_valid_the_tuned_weights_are_kept():
    recipe = recipe_for(n_valid=0, epochs=1)
    tuned = fit(TinyNetwork(), recipe, streams(recipe=recipe)[0])
    torch.testing.assert_close(choose_weights(TinyNetwork(), tuned, recipe, None).state, tuned.best)


# ---- cached activations


def real_network(name="resnet18"):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=2).eval()


def tail_recipe(network, **settings):
    names = [stage.name for stage in stages_of(network)]
    settings = {"strategy": "last", "last_stages": 1, "tail_views": 2, "precision": "f32", "epochs": 2, "ema": None,
                "augment": "none", "batch_size": 8, "lr": "1e-4"} | settings  # fmt: skip
    return plan(TuneSettings(**settings), DataFacts((12, 12), 8), names)


@pytest.fixture(scope="module")
def small_streams():
    spec = InputSpec(height=32, width=32)
    pixels, labels = drawn_images(24, side=32)
    others, other_labels = drawn_images(8, seed=3, side=32)
    return ImageStream(pixels, labels, spec), ImageStream(others, other_labels, spec)


def test_the_border_is_the_first_stage_that_moves():
    network = real_network()
    recipe = tail_recipe(network)
    assert border_of(network, recipe) == "layer4"
    assert [name for name, _ in split_children(network, "layer4")[1]] == ["layer4", "global_pool", "fc"]
    assert border_of(network, tail_recipe(network, strategy="lp-ft")) is None


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_training_from_cached_activations_is_training_of_the_same_stages(name, small_streams):
    """Without augmentation the only difference is the half precision of the cached maps."""
    results = []
    for cached in (False, True):
        network = real_network(name)
        recipe = tail_recipe(network)
        data = tail_streams(network, recipe, *small_streams) if cached else small_streams
        results.append(fit(network, recipe, *data))
    plain, tail = results
    assert set(plain.best) == set(tail.best)
    for kind in ("train_loss", "valid_loss"):
        found, expected = ([record[kind] for record in run.history] for run in (tail, plain))
        assert found == pytest.approx(expected, rel=0.03)
    frozen = [key for key in tail.best if key.startswith(("layer1", "blocks.0")) and "num_batches" not in key]
    assert frozen
    assert all(torch.equal(tail.best[key], tail.start[key]) for key in frozen)


def test_views_take_turns(small_streams):
    network = real_network()
    recipe = tail_recipe(network, augment="flip")
    train = ImageStream(
        small_streams[0].pixels, small_streams[0].labels, small_streams[0].spec, recipe.augmentation, seed=1
    )
    tail, _ = tail_streams(network, recipe, train, None)
    rows = np.arange(24)
    assert tail.maps.shape[:2] == (2, 24)
    assert np.array_equal(tail.load(rows, 0), tail.load(rows, 2))
    assert not np.array_equal(tail.load(rows, 0), tail.load(rows, 1))


def test_what_cannot_be_cut_is_named(small_streams):
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=2, img_size=32)
    with pytest.raises(UsageError, match="tail-views"):
        tail_streams(network, tail_recipe(network), *small_streams)
    network = real_network()
    with pytest.raises(UsageError, match="all stages move"):
        tail_streams(network, tail_recipe(network, strategy="all"), *small_streams)


# ---- range test


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
    assert "75 %" in found.reason


def test_a_flat_curve_says_that_it_says_little():
    found = suggest(np.geomspace(1e-6, 1, 50), np.full(50, 0.7) - np.linspace(0, 0.001, 50))
    assert "neither falls nor rises" in found.reason
    rates = np.geomspace(1e-6, 1, 121)
    rising = suggest(rates, np.where(rates < 1e-2, 0.3, 0.3 + 0.2 * np.log10(rates / 1e-2)))
    assert "hardly falls" in rising.reason
    assert rising.suggestion == pytest.approx(1e-3 * 10**0.15, rel=0.15)  # 0.33 is passed at 10**-1.85


def test_smoothing_starts_at_the_first_value():
    np.testing.assert_allclose(smooth(np.full(10, 3.0)), 3.0)


# ---- estimate


def test_the_estimate_is_quartiles_of_what_others_found():
    recipe = recipe_for(epochs=10)
    low, high = np.quantile(REMOVED, [0.25, 0.75])
    found = estimate(0.85, 2000, 1000, recipe, images_per_second=50, budget_minutes=None)
    assert (found.gain_low, found.gain_high) == pytest.approx((15 * low, 15 * high))
    assert found.minutes == pytest.approx(10 * 1000 / 50 / 60)
    assert found.worth_it
    assert found.words.endswith("Tuning.")


def test_no_tuning_where_noise_is_larger_than_the_gain_or_time_too_short():
    recipe = recipe_for(epochs=10)
    near = estimate(0.99, 100, 1000, recipe, 50, None)
    assert not near.worth_it
    assert "noise" in near.words
    long = estimate(0.7, 10_000, 100_000, recipe, 50, 5.0)
    assert not long.worth_it
    assert "--time-budget" in long.words


def test_the_training_rate_is_measured():
    recipe = recipe_for()
    assert training_rate(TinyNetwork(), recipe, streams(recipe=recipe)[0], seconds=0.05) > 1
