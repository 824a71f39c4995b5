"""The loop learns, keeps the best weights, and ends the way it should; losses are those of torch."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from topwork.errors import TopworkError, UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.progress import Reporter
from topwork.training.batches import ImageDataset, epoch_order
from topwork.training.loop import TrainableNetwork, TrainerContext, evaluate, fit, predict
from topwork.training.losses import Loss, mix
from topwork.training.recipe import DataFacts, TuneSettings, plan
from training.drawn import SPEC, STAGES, TinyNetwork, drawn_images, recipe_for, streams


def run(network=None, context=None, data=None, **settings):
    recipe = recipe_for(**settings)
    return fit(network or TinyNetwork(), recipe, *(data or streams(recipe=recipe)), context)


def test_it_learns_and_keeps_the_epoch_that_valid_likes_best():
    tuned = run(epochs=8, augment="none")
    assert tuned.ending == "finished"
    losses = [record["valid_calibrated_loss"] for record in tuned.history]
    assert tuned.best_epoch == 1 + int(np.argmin(losses))
    assert max(record["valid_accuracy"] for record in tuned.history) >= 0.9
    assert [record["best"] for record in tuned.history] == [
        loss == min(losses[: n + 1]) for n, loss in enumerate(losses)
    ]
    assert set(tuned.best) == set(TinyNetwork().state_dict())


def test_best_weights_give_the_recorded_figures_when_loaded_again():
    recipe = recipe_for(epochs=4, ema=0.9)
    train, valid = streams(recipe=recipe)
    tuned = fit(TinyNetwork(), recipe, train, valid)
    network = TinyNetwork(seed=9)
    network.load_state_dict(tuned.best)
    plain = dataclasses.replace(
        recipe, phases=tuple(dataclasses.replace(phase, batch_norm="frozen") for phase in recipe.phases)
    )
    judged = evaluate(TrainableNetwork(network, plain, valid, "cpu"), valid, recipe)
    record = tuned.history[tuned.best_epoch - 1]
    assert judged.loss == pytest.approx(record["valid_loss"], rel=1e-4)
    assert judged.calibrated_loss == pytest.approx(record["valid_calibrated_loss"], rel=1e-4)
    assert judged.accuracy == record["valid_accuracy"]


def test_the_calibrated_loss_is_the_loss_at_the_best_temperature():
    """Weights 20 times as large answer the same, overconfidently: only the plain loss rises."""
    recipe = recipe_for(epochs=4, augment="none", precision="f32")
    train, valid = streams(recipe=recipe)
    network, judged = TinyNetwork(), []
    network.load_state_dict(fit(TinyNetwork(), recipe, train, valid).last)
    for factor in (1.0, 20.0):
        with torch.no_grad():
            network.classifier.weight *= factor
            network.classifier.bias *= factor
        net = TrainableNetwork(copy.deepcopy(network), recipe, valid, "cpu")
        judged.append(evaluate(net, valid, recipe))
        logits = predict(net, valid)
        scaled = torch.from_numpy(logits / fit_temperature(logits, valid.labels))
        best = float(F.cross_entropy(scaled, torch.from_numpy(valid.labels)))
        assert judged[-1].calibrated_loss == pytest.approx(best, rel=0.02)
    assert judged[1].loss > 1.2 * judged[1].calibrated_loss
    assert judged[1].calibrated_loss == pytest.approx(judged[0].calibrated_loss, rel=0.02)


def test_folded_and_frozen_norms_start_from_the_same_function():
    folded, frozen = (run(epochs=1, lr="1e-9", ema=None, batch_norm=policy) for policy in ("folded", "frozen"))
    assert folded.history[0]["valid_loss"] == pytest.approx(frozen.history[0]["valid_loss"], rel=1e-4)


@pytest.mark.parametrize(("strategy", "moved"), [("head", {"classifier"}), ("last", {"blocks", "classifier"})])
def test_only_what_should_move_moves(strategy, moved):
    stages = {"last_stages": 1} if strategy == "last" else {}
    tuned = run(strategy=strategy, batch_norm="train", ema=None, **stages)
    changed = {name.split(".")[0] for name in tuned.last if not torch.equal(tuned.last[name], tuned.start[name])}
    assert changed == moved


@pytest.mark.parametrize("outputs", ["binary", "multilabel"])
def test_sigmoid_outputs_learn(outputs):
    recipe = recipe_for(epochs=16, outputs=outputs, augment="none")
    train, valid = streams(recipe=recipe)
    n_outputs = 1
    if outputs == "multilabel":
        n_outputs = 2
        for stream in (train, valid):
            stream.labels = np.eye(2)[stream.labels]
    tuned = fit(TinyNetwork(n_outputs), recipe, train, valid)
    assert max(record["valid_accuracy"] for record in tuned.history) >= 0.9


def test_from_scratch_with_three_classes_and_every_option_on():
    recipe = recipe_for(
        n_classes=3, strategy="scratch", epochs=2, mixup=0.2, cutmix=1.0, label_smoothing=0.1, clip_norm=0.5, ema=0.9,
        balance="weights", augment="standard", precision="bf16", schedule="step", average_best=2,
    )  # fmt: skip
    tuned = fit(TinyNetwork(3), recipe, *streams(recipe=recipe, n_classes=3))
    assert len(tuned.best_epochs) == 2
    assert all(value.isfinite().all() for value in tuned.best.values())


def test_same_seed_same_bits_and_another_seed_others():
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert all(torch.equal(value, again.last[name]) for name, value in first.last.items())
    assert not all(torch.equal(value, other.last[name]) for name, value in first.last.items())


def test_the_global_random_stream_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    run(epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_patience_ends_a_run_that_gets_no_better():
    tuned = run(epochs=30, patience=2, lr="1e-12", ema=None, schedule="flat", monitor="accuracy", augment="none")
    assert tuned.ending == "patience"
    assert len(tuned.history) == 3
    assert tuned.best_epoch == 1


def test_a_time_budget_ends_after_a_whole_epoch():
    tuned = run(epochs=1000, time_budget="0.001s")
    assert tuned.ending == "time budget"
    assert len(tuned.history) == 1


def test_without_valid_the_last_epoch_counts():
    recipe = recipe_for(n_valid=0, epochs=2)
    tuned = fit(TinyNetwork(), recipe, streams(recipe=recipe)[0])
    assert tuned.best_epoch == 2
    assert "valid_loss" not in tuned.history[0]


class NaNLater(TinyNetwork):
    """Gives finite logits for a while."""

    def __init__(self, n_good):
        super().__init__()
        self.n_left = n_good

    def forward(self, x):
        self.n_left -= self.training
        return super().forward(x) * (math.nan if self.n_left < 0 else 1.0)


def test_a_loss_that_is_not_finite_is_named_and_never_the_best(tmp_path):
    with pytest.raises(TopworkError, match=r"NaN or infinite in epoch 1, step 3.*--lr"):
        run(NaNLater(2), batch_norm="frozen")
    tuned = run(NaNLater(8), TrainerContext(folder=tmp_path), batch_norm="frozen")
    assert tuned.ending == "loss not finite"
    assert "epoch 2, step 3" in tuned.message
    assert tuned.best_epoch == 1
    assert all(value.isfinite().all() for value in tuned.best.values())


class Hungry(TinyNetwork):
    """Runs out of memory on more than three images."""

    def forward(self, x):
        if self.training and len(x) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return super().forward(x)


def test_out_of_memory_halves_what_is_done_at_once_and_not_the_step():
    settings = {"epochs": 2, "augment": "none", "batch_norm": "frozen"}
    networks = TinyNetwork(), Hungry()
    for network in networks:
        network.dropout.p = 0.0
    whole, parts = (run(network, **settings) for network in networks)
    assert "2 images at a time" in parts.notes[-1]
    assert "learning rate stays" in parts.notes[-1]
    for name, value in whole.last.items():
        torch.testing.assert_close(parts.last[name], value, rtol=1e-3, atol=1e-4)


class Starving(TinyNetwork):
    def forward(self, x):
        raise MemoryError


def test_no_memory_at_all_is_an_error_with_a_way_out():
    with pytest.raises(TopworkError, match="--size"):
        run(Starving(), batch_norm="frozen")


def test_one_image_and_moving_statistics_are_refused():
    pixels, labels = drawn_images(1)
    recipe = recipe_for(batch_norm="train", n_valid=0)
    with pytest.raises(UsageError, match="--batch-norm frozen"):
        fit(TinyNetwork(), recipe, ImageDataset(pixels, labels, SPEC))


def test_records_hold_curves_rates_and_speed():
    seen, done = [], []
    reporter = Reporter()
    reporter.progress = lambda n, total: done.append((n, total))
    tuned = run(context=TrainerContext(on_epoch=seen.append, reporter=reporter))
    assert seen == tuned.history
    record = seen[0]
    assert [round(x, 3) for x, _, _ in record["curve"]] == [0, 0.167, 0.333, 0.5, 0.667, 0.833]
    assert all(0 <= factor <= 1 for _, _, factor in record["curve"])
    assert record["images_per_second"] > 0
    assert done[-1] == (144, 144)


def test_a_sampler_draws_every_class_equally_often():
    labels = np.repeat([0, 1], [270, 30])
    recipe = plan(TuneSettings(balance="sampler", epochs=1), DataFacts((270, 30), 10), STAGES)
    assert recipe.class_weights is None
    order = epoch_order(300, 0, 1, recipe.draw_weights(labels))
    assert len(order) == 300
    assert np.bincount(labels[order]) == pytest.approx([150, 150], abs=30)
    pixels, _ = drawn_images(300)
    tuned = fit(TinyNetwork(), recipe, ImageDataset(pixels, labels, SPEC))
    assert 0.3 < tuned.history[0]["train_accuracy"] < 0.99  # of draws, half of them of the rare class


def test_loss_is_torchs_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), np.array([0, 1, 2, 2, 1, 0])
    recipe = dataclasses.replace(recipe_for(n_classes=3), class_weights=(1.0, 2.0, 0.5))
    loss = Loss(recipe)
    targets = loss.targets(labels)
    found = loss(logits, targets).sum() / loss.weights(targets).sum()
    expected = F.cross_entropy(logits, torch.from_numpy(labels), weight=torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(found, expected)
    smoothed = Loss(dataclasses.replace(recipe, class_weights=None, label_smoothing=0.1))
    expected = F.cross_entropy(logits, torch.from_numpy(labels), label_smoothing=0.1)
    torch.testing.assert_close(smoothed(logits, targets).mean(), expected)


def test_mixup_mixes_images_and_labels_in_the_same_share():
    recipe = dataclasses.replace(recipe_for(), mixup=1.0)
    images = torch.stack([torch.zeros(4, 4, 3), torch.full((4, 4, 3), 200)]).byte()
    targets = torch.eye(2)
    for seed in range(8):
        mixed, p = mix(images, targets, recipe, np.random.default_rng(seed))
        np.testing.assert_allclose(mixed[:, 0, 0, 0] / 200, p[:, 1].numpy(), atol=1e-5)
        torch.testing.assert_close(p.sum(1), torch.ones(2))


def test_cutmix_labels_follow_the_area():
    recipe = dataclasses.replace(recipe_for(), cutmix=1.0)
    images = torch.stack([torch.zeros(16, 16, 3), torch.full((16, 16, 3), 200)]).byte()
    for seed in range(8):
        mixed, p = mix(images, torch.eye(2), recipe, np.random.default_rng(seed))
        np.testing.assert_allclose((mixed == 200).float().mean((1, 2, 3)), p[:, 1].numpy(), atol=1e-6)
