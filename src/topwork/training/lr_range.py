"""The learning-rate range test: how the loss answers to ever higher rates, and which rate that suggests.

In: a network, a recipe (its stages keep their relative rates), training samples. Out: :class:`RangeTest`: the curve,
what three rules read from it, and one suggestion with its reason. It works on a copy, so weights are left as they were.
Smith 2015, arXiv 1506.01186; the rules are those of fastai's learning-rate finder.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import UsageError
from topwork.training.distributed import processes
from topwork.training.loop import Loss, Prepared
from topwork.training.optimizer import clip_gradients, freeze, make_optimizer, train_mode
from topwork.training.recipe import Recipe
from topwork.training.streams import Stream, ahead, batches_of, epoch_order

LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9  # of the moving average of the loss
FLAT = 0.02  # a curve that falls by less than this share tells nothing


@dataclass(frozen=True)
class RangeTest:
    """Rates (the head's; other stages are proportional), smoothed losses, and what they suggest.

    Attributes:
        rules: rate by each rule: ``steepest`` (the loss falls fastest), ``valley`` (two thirds down the longest
            slope), ``minimum/10`` (a tenth of the rate with the lowest loss).
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    rules: dict[str, float]
    suggestion: float
    reason: str


def range_test(
    network: nn.Module,
    recipe: Recipe,
    train: Stream,
    n_steps: int = 100,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
) -> RangeTest:
    """Trains a copy for a few steps with a rate that rises exponentially, until the loss explodes.

    Raises:
        UsageError: the loss is not finite from the start.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        rates, losses = _rise(copy.deepcopy(network), recipe, train, np.geomspace(lowest, highest, n_steps))
    if len(losses) < 5:
        raise UsageError("The range test's loss is not finite from the start; try --precision f32 or a lower --lr.")
    return suggest(rates, smooth(losses))


def _rise(
    network: nn.Module, recipe: Recipe, train: Stream, rates: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    phase = recipe.phases[-1]
    net = Prepared(network, recipe, train, processes().device)
    loss_of = Loss(recipe, net.device)
    freeze(net.core, phase)
    train_mode(net.core, phase)
    optimizer = make_optimizer(net.core, recipe, phase)
    top = max(rate for _, rate in phase.rates)
    per_epoch = batches_of(epoch_order(len(train.labels), recipe.seed, 0), recipe.batch_size)
    n_epochs = math.ceil(len(rates) / len(per_epoch))
    losses: list[float] = []
    for epoch in range(n_epochs):
        batches = batches_of(epoch_order(len(train.labels), recipe.seed, epoch), recipe.batch_size)
        left = len(rates) - len(losses)
        loading = ahead(lambda rows, epoch=epoch: train.load(rows, epoch), batches[:left])  # type: ignore[misc]
        for rows, inputs in loading:
            for group in optimizer.param_groups:
                group["lr"] = rates[len(losses)] * group["peak"] / top
            targets = loss_of.targets(train.labels[rows])
            optimizer.zero_grad()
            loss = loss_of(net.logits(inputs), targets).sum() / loss_of.weights(targets).sum()
            value = float(loss.detach())
            if not math.isfinite(value) or (len(losses) > 10 and value > 4 * min(losses)):
                loading.close()  # type: ignore[attr-defined]
                return rates[: len(losses)], np.array(losses)
            loss.backward()  # type: ignore[no-untyped-call]
            clip_gradients(net.core.parameters(), recipe.clip_norm)
            optimizer.step()
            losses.append(value)
    return rates, np.array(losses)


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average, corrected for its start."""
    result, mean = np.empty(len(losses)), 0.0
    for n, value in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        result[n] = mean / (1 - SMOOTHING ** (n + 1))
    return result


def suggest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> RangeTest:
    """Reads a curve by three rules and suggests the middle one: any single rule is sometimes far off."""
    rules = {
        "steepest": float(rates[_steepest(rates, losses)]),
        "valley": float(rates[_valley(losses)]),
        "minimum/10": float(rates[int(losses.argmin())] / 10),
    }
    suggestion = float(np.median(list(rules.values())))
    name = min(rules, key=lambda rule: abs(rules[rule] - suggestion))
    fell = 1 - losses.min() / losses[0]
    if fell < FLAT:
        reason = (
            f"The loss hardly falls at any rate ({100 * fell:.1f} %), as when the head is already fitted; "
            f"{suggestion:.1e} ({name}) is the middle of three rules, and a low rate is safe."
        )
    else:
        others = ", ".join(f"{rule} {rate:.1e}" for rule, rate in rules.items() if rule != name)
        reason = (
            f"{suggestion:.1e} is the middle of three rules ({name}; {others}); the loss fell by {100 * fell:.0f} %."
        )
    return RangeTest(rates, losses, rules, suggestion, reason)


def _steepest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> int:
    """Where the loss falls fastest over the logarithm of the rate, before its minimum."""
    end = max(3, int(losses.argmin()) + 1)
    return int(np.gradient(losses[:end], np.log(rates[:end])).argmin())


def _valley(losses: NDArray[np.float64]) -> int:
    """Two thirds down the longest falling subsequence (fastai's ``valley``)."""
    n = len(losses)
    lengths = np.ones(n, int)
    for end in range(1, n):
        lower = losses[:end] > losses[end]
        if lower.any():
            lengths[end] = 1 + lengths[:end][lower].max()
    last = int(lengths.argmax())
    first = last - int(lengths[last]) + 1
    third = (last - first) / 3
    return min(n - 1, max(0, first + int(third) + int(third / 2)))
