"""From a phase of a recipe to an optimizer: parameter groups by stage, freezing, and the table that shows both.

In: a network, its stages and a Phase. Out: a torch optimizer whose rates :func:`set_rates` moves. Freezing a stage
means rate 0, no gradients, and modules in eval mode, which also freezes batch-norm statistics and dropout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from topwork.models.modules import classifier_names
from topwork.models.stages import Stage, find_stages, no_decay
from topwork.training.lora import adapted_modules, is_adapter, n_adapter_parameters
from topwork.training.recipe import HEAD, Phase, Recipe
from topwork.training.schedule import momentum_schedule, rate_schedule


@dataclass(frozen=True)
class StageRow:
    """A line of the table printed before training; the rate is the peak of the last phase that trains the stage.

    Attributes:
        n_parameters: of the network; ``n_trained`` are trained (with LoRA, those of the adapters).
    """

    stage: str
    n_parameters: int
    trainable: bool
    rate: float
    n_trained: int


def stages_of(network: nn.Module) -> tuple[Stage, ...]:
    """The network's stages in forward order, classifier last; every parameter is in exactly one."""
    adapted: tuple[Stage, ...] | None = getattr(network, "adapted_stages", None)
    return adapted or find_stages(network, classifier_names(network))


def stage_table(network: nn.Module, recipe: Recipe) -> list[StageRow]:
    """Stages, parameters, trainable or not, and rates."""
    rates = {stage: rate for phase in recipe.phases for stage, rate in phase.rates if rate}
    adapters: dict[str, int] = {}
    if recipe.lora_rank is not None:
        for name, module in adapted_modules(network, classifier_names(network)[0]).items():
            adapters[f"{name}.weight"] = n_adapter_parameters(module, recipe.lora_rank)
    rows = []
    for stage in stages_of(network):
        rate = rates.get(stage.name, 0.0)
        n_trained = stage.n_parameters if rate else 0
        if recipe.lora_rank is not None and stage.name != HEAD:
            n_trained = sum(adapters.get(name, 0) for name in stage.parameters)
        rows.append(StageRow(stage.name, stage.n_parameters, n_trained > 0, rate if n_trained else 0.0, n_trained))
    return rows


def freeze(network: nn.Module, phase: Phase) -> None:
    """Enables or disables gradients of each parameter; with adapters, only they and the head are trained."""
    trained = trained_names(network, [phase])
    for name, value in network.named_parameters():
        value.requires_grad_(name in trained)


def trained_names(network: nn.Module, phases: Iterable[Phase]) -> set[str]:
    """Names of the parameters that are trained in any of these phases."""
    frozen = frozenset.intersection(*(phase.frozen for phase in phases))
    has_adapters = hasattr(network, "adapted_stages")
    return {
        name
        for stage in stages_of(network)
        for name in stage.parameters
        if stage.name not in frozen and (not has_adapters or is_adapter(name) or stage.name == HEAD)
    }


def train_mode(network: nn.Module, phase: Phase) -> None:
    """Sets training mode for modules that are trained, eval mode elsewhere.

    A batch norm is in training mode only if its stage is trained and the phase updates statistics. Call after
    :func:`freeze`.
    """
    network.train()
    for module in network.modules():
        own = list(module.parameters())
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            moves = phase.batch_norm == "train" and all(value.requires_grad for value in own) and bool(own)
            module.train(moves)
        elif own and not any(value.requires_grad for value in own):
            module.eval()


def make_optimizer(network: nn.Module, recipe: Recipe, phase: Phase) -> torch.optim.Optimizer:
    """Two groups per trainable stage: with weight decay, and without it (:func:`topwork.models.stages.no_decay`).

    Call after :func:`freeze`.
    """
    parameters, without = dict(network.named_parameters()), no_decay(network)
    rates = dict(phase.rates)
    groups: list[dict[str, Any]] = []
    for stage in stages_of(network):
        rate = rates[stage.name] if stage.parameters else 0.0
        if rate == 0:
            continue
        own = [name for name in stage.parameters if parameters[name].requires_grad]
        for decay, names in (
            (recipe.weight_decay, [name for name in own if name not in without]),
            (0.0, [name for name in own if name in without]),
        ):
            chosen = [parameters[name] for name in names]
            if chosen:
                groups.append({"params": chosen, "peak": rate, "lr": rate, "weight_decay": decay, "stage": stage.name})
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, phase: Phase, position: float) -> float:
    """Sets rates and momentum for a position in [0, 1] of the phase; returns the factor on the rates."""
    factor = rate_schedule(phase.schedule, phase.warmup)(position)
    momentum = momentum_schedule(phase.schedule, phase.warmup)(position)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
        if recipe.optimizer == "sgd":
            group["momentum"] = momentum
        else:
            group["betas"] = (momentum, group["betas"][1])
    return factor


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float | None) -> torch.Tensor:
    """Clips the gradient to the norm ``largest`` and returns its norm."""
    moving: Sequence[nn.Parameter] = [value for value in parameters if value.grad is not None]
    return nn.utils.clip_grad_norm_(moving, float("inf") if largest is None else largest)
