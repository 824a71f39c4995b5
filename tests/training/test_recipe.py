"""Plans are decided once, follow from what was asked, and survive JSON."""

import json
from dataclasses import asdict

import pytest

from topwork.errors import UsageError
from topwork.training.recipe import DataFacts, TuneSettings, plan, spread_rates

STAGES = ("stem", "blocks.0", "blocks.1", "blocks.2", "neck", "classifier")
FACTS = DataFacts(class_counts=(100, 100), n_valid=50)


def planned(facts=FACTS, **settings):
    return plan(TuneSettings(**settings), facts, STAGES)


def rates(recipe, phase=0):
    return dict(recipe.phases[phase].rates)


def test_every_setting_has_help():
    from dataclasses import fields

    assert all(item.metadata["help"].endswith((".", ". ")) for item in fields(TuneSettings))


def test_a_recipe_survives_json():
    recipe = planned(strategy="gradual", augment="trivial", balance="weights", mixup=0.2)
    written = json.loads(json.dumps(asdict(recipe)))
    assert recipe.is_written_as(written)
    assert not recipe.is_written_as(written | {"seed": 1})
    assert not recipe.is_written_as(written | {"setting_of_another_version": 1})


def test_nothing_in_a_recipe_is_auto():
    assert "auto" not in json.dumps(asdict(planned()))


def test_head_only_moves_only_the_head():
    recipe = planned(strategy="head")
    assert [stage for stage, rate in rates(recipe).items() if rate] == ["classifier"]
    assert recipe.phases[0].frozen == set(STAGES) - {"classifier"}


def test_last_stages_come_with_what_follows_them():
    recipe = planned(strategy="last", last_stages=2)
    assert [stage for stage, rate in rates(recipe).items() if rate] == ["blocks.1", "blocks.2", "neck", "classifier"]
    with pytest.raises(UsageError, match="has 3"):
        planned(strategy="last", last_stages=4)


def test_gradual_unfreezing_ends_with_everything_and_loses_no_epoch():
    recipe = planned(strategy="gradual", epochs=10)
    assert recipe.n_epochs == 10
    moving = [sum(rate > 0 for _, rate in phase.rates) for phase in recipe.phases]
    assert moving[0] == 1
    assert moving[-1] == len(STAGES)
    assert moving == sorted(moving)
    assert planned(strategy="gradual", epochs=2).n_epochs == 2
    assert planned(strategy="gradual", epochs=1).n_epochs == 1


def test_a_head_that_starts_at_random_is_trained_alone_first():
    recipe = plan(TuneSettings(epochs=5), FACTS, STAGES, head_is_fitted=False)
    assert [phase.n_epochs for phase in recipe.phases] == [2, 5]
    assert recipe.phases[0].frozen == set(STAGES) - {"classifier"}
    assert not recipe.head_from_probe


def test_scratch_takes_no_head_from_the_probe_and_moves_statistics():
    recipe = planned(strategy="scratch")
    assert not recipe.head_from_probe
    assert not recipe.interpolate
    assert recipe.phases[0].batch_norm == "train"
    assert not recipe.folds


def test_a_range_is_spread_in_the_exponent_or_evenly():
    geometric = spread_rates(TuneSettings(lr="1e-6:1e-4"), ["a", "b", "c"])
    assert geometric == pytest.approx({"a": 1e-6, "b": 1e-5, "c": 1e-4})
    linear = spread_rates(TuneSettings(lr="1e-6:1e-4", lr_spread="linear"), ["a", "b", "c"])
    assert linear == pytest.approx({"a": 1e-6, "b": 5.05e-5, "c": 1e-4})
    decayed = spread_rates(TuneSettings(lr="1e-3", lr_decay=0.5), ["a", "b", "c"])
    assert decayed == pytest.approx({"a": 2.5e-4, "b": 5e-4, "c": 1e-3})
    assert spread_rates(TuneSettings(lr="1e-3"), ["a", "b"]) == pytest.approx({"a": 1e-3, "b": 1e-3})


@pytest.mark.parametrize("lr", ["fast", "1e-3:1e-5", "0", "-1", "1:2:3", "nan", "inf"])
def test_a_rate_that_is_none_is_refused(lr):
    with pytest.raises(UsageError, match="--lr"):
        planned(lr=lr)


def test_a_time_budget_plans_fewer_epochs_and_says_so():
    facts = DataFacts(class_counts=(500, 500), n_valid=0, images_per_second=10.0)
    recipe = planned(facts, time_budget="450s")  # 100 s an epoch, 90 % of the budget
    assert recipe.n_epochs == 4
    assert "4 instead of" in recipe.notes[0]
    assert not planned(facts, time_budget="1000h").notes


def test_class_weights_when_a_class_is_more_than_three_times_another():
    assert planned(DataFacts((100, 300), 10)).class_weights is None
    assert planned(DataFacts((100, 301), 10)).class_weights == pytest.approx((401 / 200, 401 / 602))
    assert planned(DataFacts((100, 301), 10), balance="none").class_weights is None


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"warmup": 1.0}, "--warmup"),
        ({"lr_decay": 2.0}, "--lr-decay"),
        ({"lr_decay": 0.5, "lr": "1e-5:1e-3"}, "--lr-decay"),
        ({"ema": 1.0}, "--ema"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
    ],
)
def test_contradictions_are_named(settings, word):
    with pytest.raises(UsageError, match=word):
        planned(**settings)


def test_zero_turns_off_what_the_command_line_cannot_name():
    recipe = planned(ema=0.0, clip_norm=0.0)
    assert (recipe.ema, recipe.clip_norm) == (None, None)


def test_what_needs_valid_is_off_without_it():
    facts = DataFacts((10, 10), 0)
    recipe = planned(facts)
    assert not recipe.interpolate
    with pytest.raises(UsageError, match="--patience"):
        planned(facts, patience=3)
    with pytest.raises(UsageError, match="two classes"):
        planned(DataFacts((5, 5, 5), 5), outputs="binary")
