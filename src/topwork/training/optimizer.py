"""What a phase of a recipe trains, and at which rates: stages, freezing, the optimizer, schedules, LoRA adapters.

In: a network, its stages and a Phase. Out: a torch optimizer whose rates :func:`set_rates` moves. Freezing a stage
means rate 0, no gradients, and modules in eval mode, which also freezes batch-norm statistics and dropout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from topwork.models.modules import classifier_names
from topwork.models.stages import Stage, find_stages, is_inside, no_decay
from topwork.settings import ScheduleName
from topwork.training.recipe import HEAD, Phase, Recipe

Schedule = Callable[[float], float]
HIGH_MOMENTUM, LOW_MOMENTUM = 0.95, 0.85
LORA_SCALE = 2.0  # alpha / r, the usual value


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
        for name, module in adapted_modules(network).items():  # A and B
            adapters[f"{name}.weight"] = recipe.lora_rank * (module.weight[0].numel() + len(module.weight))
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


def start_phase(network: nn.Module, recipe: Recipe, phase: Phase) -> torch.optim.Optimizer:
    """Freezes stages, sets the modes of modules, and makes the optimizer.

    It has two groups per trained stage: with weight decay, and without it (:func:`topwork.models.stages.no_decay`).
    """
    freeze(network, phase)
    train_mode(network, phase)
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


# ---- schedules: factors on the rates by the position in [0, 1] of a phase, so that a resumed run needs only that


def cosine_between(start: float, end: float) -> Schedule:
    """Half a cosine wave."""
    return lambda position: end + (start - end) * (1 + math.cos(math.pi * position)) / 2


def combine(fractions: Sequence[float], schedules: Sequence[Schedule]) -> Schedule:
    """Schedules in sequence; ``fractions`` add up to 1 (fastai's ``combine_scheds``)."""
    edges = [sum(fractions[:n]) for n in range(len(fractions))] + [1.0]

    def combined(position: float) -> float:
        position = min(max(position, 0.0), 1.0)
        for (low, high), schedule in zip(pairwise(edges), schedules, strict=True):
            if position < high or high == 1.0:
                return schedule((position - low) / (high - low) if high > low else 1.0)
        raise AssertionError("the last edge is 1")

    return combined


def rate_schedule(name: ScheduleName, warmup: float = 0.25) -> Schedule:
    """The factor on all rates.

    Args:
        warmup: fraction of the phase in which the rate rises, in [0, 1); ignored by ``flat`` and ``step``.
    """
    if name == "flat":
        return lambda _: 1.0
    if name == "step":  # a tenth after each third
        return combine([1 / 3, 1 / 3, 1 / 3], [lambda _: 1.0, lambda _: 0.1, lambda _: 0.01])
    rise: Schedule
    if name == "cosine":
        rise, fall = lambda position: position, cosine_between(1.0, 0.0)
    else:  # Smith 2018, arXiv 1803.09820, with the cosine shape of fastai
        rise, fall = cosine_between(1 / 25, 1.0), cosine_between(1.0, 1e-5)
    return combine([warmup, 1 - warmup], [rise, fall]) if warmup else fall


def momentum_schedule(name: ScheduleName, warmup: float = 0.25) -> Schedule:
    """Momentum (Adam's first beta); one-cycle lowers it while the rate is high."""
    if name != "one-cycle" or not warmup:
        return lambda _: 0.9
    fall, rise = cosine_between(HIGH_MOMENTUM, LOW_MOMENTUM), cosine_between(LOW_MOMENTUM, HIGH_MOMENTUM)
    return combine([warmup, 1 - warmup], [fall, rise])


# ---- LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3)
# Weights W are frozen; adapters B·A of rank r, from peft, are trained and merged into W in the end, with scale alpha / r. For
# a convolution, A has its kernel size and B is 1×1. So only the adapters need memory for gradients and optimizer.


def adapted_modules(network: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get an adapter, by name: all but the classifier.

    Only plain ones: grouped convolutions cannot be merged, and subclasses may pad differently.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if (type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1))
        and not is_inside(name, classifier_names(network)[:1])
    }


def add_adapters(network: nn.Module, rank: int, seed: int) -> None:
    """Adds adapters to a network in place; initially they change nothing, because every B is zero.

    ``network.adapted_stages`` are its stages with the adapters' parameters, for :func:`stages_of`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    stages = stages_of(network)
    pattern = "|".join(re.escape(name) for name in adapted_modules(network))
    torch.manual_seed(seed)  # A is random
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=int(LORA_SCALE * rank), target_modules=pattern), network)
    by_layer: dict[str, list[str]] = {}
    for name, _ in network.named_parameters():
        by_layer.setdefault(_original(name).rpartition(".")[0], []).append(name)
    network.adapted_stages = tuple(  # type: ignore[assignment]
        replace(
            stage,
            parameters=tuple(
                name
                for layer in dict.fromkeys(one.rpartition(".")[0] for one in stage.parameters)
                for name in by_layer[layer]
                if is_adapter(name) or _original(name) in stage.parameters
            ),
        )
        for stage in stages
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return ".lora_" in name


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the adapters merged into the weights, under the original names."""
    result = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name and f"{layer}.lora_A.default.weight" in state:
            a, b = (state[f"{layer}.lora_{which}.default.weight"].float() for which in "AB")
            value = value + (LORA_SCALE * b.flatten(1) @ a.flatten(1)).view_as(value).to(value.dtype)  # noqa: PLW2901
        result[_original(name)] = value
    return result


def _original(name: str) -> str:
    """The name without adapters; for an adapter, that of a weight of its layer."""
    return re.sub(r"\.lora_[AB]\.default\.", ".", name).replace(".base_layer.", ".")
