"""Freezing covers gradients, batch-norm statistics and dropout; rates and decay go where they should; schedules are what their papers draw."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from topwork.training.optimizer import (
    combine,
    freeze,
    momentum_schedule,
    rate_schedule,
    set_rates,
    stage_table,
    stages_of,
    start_phase,
    train_mode,
)
from topwork.training.recipe import DataFacts, TuneSettings, plan
from training.drawn import STAGES, TinyNetwork, recipe_for


def prepared(**settings):
    recipe = recipe_for(**settings)
    network, phase = TinyNetwork(), recipe.phases[0]
    freeze(network, phase)
    train_mode(network, phase)
    return network, recipe, phase


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18", "vgg11", "convnext_atto", "vit_tiny_patch16_224"]
)
def test_every_parameter_belongs_to_exactly_one_stage(name):
    with torch.device("meta"):
        network = timm.create_model(name, pretrained=False)
    found = [parameter for stage in stages_of(network) for parameter in stage.parameters]
    assert sorted(found) == sorted(name for name, _ in network.named_parameters())
    assert stages_of(network)[-1].name == "classifier"


def test_frozen_stages_have_no_gradients_and_rest_in_eval_mode():
    network, _, _ = prepared(strategy="last", last_stages=1, batch_norm="train")
    assert {n.split(".")[0] for n, p in network.named_parameters() if p.requires_grad} == {"blocks", "classifier"}
    assert not network.bn1.training
    assert not network.blocks[0][1].training
    assert network.blocks[1][1].training
    assert network.dropout.training  # belongs to no stage and is on the way to the head


def test_frozen_statistics_rest_even_where_weights_move():
    network, _, _ = prepared(strategy="all", batch_norm="frozen")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)
    before = norms[0].running_mean.clone()
    network(torch.randn(4, 3, 16, 16))
    assert torch.equal(norms[0].running_mean, before)


def test_a_step_leaves_frozen_stages_bit_for_bit():
    network, recipe, phase = prepared(strategy="head", batch_norm="train")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = start_phase(network, recipe, phase)
    network(torch.randn(8, 3, 16, 16)).square().sum().backward()
    optimizer.step()
    changed = {n for n, v in network.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_norms_and_biases_have_no_weight_decay():
    network, recipe, phase = prepared(strategy="all", weight_decay=0.1, batch_norm="frozen")
    names = {id(value): name for name, value in network.named_parameters()}
    for group in start_phase(network, recipe, phase).param_groups:
        kinds = {names[id(value)].split(".")[-1] for value in group["params"]}
        dimensions = {value.ndim for value in group["params"]}
        assert (group["weight_decay"] == 0.1) == (dimensions != {1})
        if group["weight_decay"]:
            assert kinds == {"weight"}


def test_rates_follow_stage_and_position():
    network, recipe, phase = prepared(strategy="all", lr="1e-4:1e-1", batch_norm="frozen")
    optimizer = start_phase(network, recipe, phase)
    factor = set_rates(optimizer, recipe, phase, 0.25)
    assert factor == pytest.approx(1)
    found = {group["stage"]: group["lr"] for group in optimizer.param_groups}
    assert found == pytest.approx({"stem": 1e-4, "blocks.0": 1e-3, "blocks.1": 1e-2, "classifier": 1e-1})
    assert optimizer.param_groups[0]["betas"][0] == pytest.approx(0.85)
    set_rates(optimizer, recipe, phase, 0.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 / 25)


def test_sgd_gets_the_momentum_of_the_schedule():
    network, recipe, phase = prepared(strategy="all", optimizer="sgd")
    optimizer = start_phase(network, recipe, phase)
    set_rates(optimizer, recipe, phase, 0.0)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)


def test_stage_table_counts_and_marks():
    recipe = recipe_for(strategy="last", last_stages=1, lr="1e-3")
    rows = stage_table(TinyNetwork(), recipe)
    assert [row.stage for row in rows] == list(STAGES)
    assert [row.trainable for row in rows] == [False, False, True, True]
    assert sum(row.n_parameters for row in rows) == sum(p.numel() for p in TinyNetwork().parameters())
    assert [row.rate for row in rows] == pytest.approx([0, 0, 1e-3, 1e-3])


def test_a_plan_for_a_real_network_covers_its_stages():
    with torch.device("meta"):
        network = timm.create_model("resnet18", pretrained=False, num_classes=3)
    names = [stage.name for stage in stages_of(network)]
    recipe = plan(TuneSettings(strategy="last", last_stages=1), DataFacts((9, 9, 9), 0), names)
    assert [row.stage for row in stage_table(network, recipe) if row.trainable] == ["layer4", "classifier"]


@given(st.sampled_from(["one-cycle", "flat", "cosine", "step"]), st.floats(0, 0.99), st.floats(0, 1))
def test_schedules_stay_within_bounds(name, warmup, position):
    assert 0 <= rate_schedule(name, warmup)(position) <= 1
    assert 0.85 <= momentum_schedule(name, warmup)(position) <= 0.95


def test_one_cycle_rises_from_a_25th_and_momentum_moves_the_other_way():
    rate, momentum = rate_schedule("one-cycle", 0.25), momentum_schedule("one-cycle", 0.25)
    assert rate(0) == pytest.approx(1 / 25)
    assert rate(0.25) == pytest.approx(1.0)
    assert rate(1) == pytest.approx(1e-5)
    assert (momentum(0), momentum(0.25), momentum(1)) == pytest.approx((0.95, 0.85, 0.95))
    assert rate(0.625) == pytest.approx(0.5, abs=1e-4)


def test_step_divides_by_ten_after_each_third():
    values = [rate_schedule("step")(x) for x in (0, 0.3, 0.34, 0.66, 0.67, 1.0)]
    assert values == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_without_warmup_starts_at_the_top():
    assert rate_schedule("cosine", 0.0)(0) == 1
    assert rate_schedule("cosine", 0.5)(0.25) == pytest.approx(0.5)
    assert math.isclose(rate_schedule("cosine", 0.5)(0.75), 0.5)


def test_combine_runs_one_after_another():
    both = combine([0.5, 0.5], [lambda x: x, lambda _: 3])
    assert [both(x) for x in (0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.5, 3, 3])
