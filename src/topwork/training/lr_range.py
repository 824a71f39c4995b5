"""The learning-rate range test, and the rate it suggests.

In: a network, a recipe (its stages keep their relative rates), training samples. Out: :class:`RangeTest`: the curve,
the results of three rules, and one suggestion with its reason. The network is not changed. Smith 2015, arXiv
1506.01186; the rules are those of fastai's learning-rate finder. Ours plots the loss of a batch relative to that of the
initial network on the same batch, so that hard and easy batches do not look like effects of the rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import UsageError
from topwork.training.batches import Dataset, ahead, batches_of, epoch_order
from topwork.training.distributed import processes
from topwork.training.loop import TrainableNetwork
from topwork.training.losses import Loss
from topwork.training.optimizer import start_phase
from topwork.training.recipe import Recipe

LOWEST, HIGHEST = 1e-6, 1.0
SMOOTHING = 0.9  # decay of the moving average of the loss
FLAT = 0.05  # if the loss falls by less than this share, only its rise is informative
RISEN = 0.1
SMALL_LOSS = 0.1  # below this, changes are relative to it instead of the loss


@dataclass(frozen=True)
class RangeTest:
    """Rates (the head's; other stages are proportional), smoothed losses, and what they suggest.

    Attributes:
        rules: rate by each rule: ``steepest`` (the loss falls fastest), ``valley`` (two thirds down the longest
            slope), ``minimum/10`` (a tenth of the rate with the lowest loss), ``edge/10`` (a tenth of the rate above which
            the loss has risen by a tenth).
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    rules: dict[str, float]
    suggestion: float
    reason: str


def range_test(
    network: nn.Module,
    recipe: Recipe,
    train: Dataset,
    n_steps: int = 100,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    on_progress: Callable[[int, int], None] | None = None,
) -> RangeTest:
    """Trains a copy for a few steps with an exponentially increasing rate, until the loss explodes.

    Raises:
        UsageError: the loss is not finite from the start, or the rates are not a range.
    """
    if not (0 < lowest < highest < math.inf) or n_steps < 10:
        raise UsageError(
            f"The range test needs at least 10 steps and a low rate below the high one, not {lowest:g} to {highest:g}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        wanted = np.geomspace(lowest, highest, n_steps)
        rates, losses = _rise(copy.deepcopy(network), recipe, train, wanted, on_progress or (lambda *_: None))
    if len(losses) < 5:
        raise UsageError(
            "The loss of the range test is NaN or infinite from the start; try --precision f32 or a lower --lr."
        )
    return suggest(rates, smooth(losses))


def _rise(
    network: nn.Module,
    recipe: Recipe,
    train: Dataset,
    rates: NDArray[np.float64],
    on_progress: Callable[[int, int], None],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    phase = recipe.phases[-1]
    untouched = TrainableNetwork(copy.deepcopy(network), recipe, train, processes().device)
    net = TrainableNetwork(network, recipe, train, processes().device)
    loss_of = Loss(recipe, net.device)
    _, optimizer = (start_phase(each.core, recipe, phase) for each in (untouched, net))
    top = max(rate for _, rate in phase.rates)
    before: list[float] = []
    changes: list[float] = []
    for inputs, targets in _batches(recipe, train, loss_of, len(rates)):

        def loss_with(one: TrainableNetwork, inputs: Any = inputs, targets: torch.Tensor = targets) -> torch.Tensor:
            return loss_of.mean(one.logits(one.inputs(inputs)), targets)

        for group in optimizer.param_groups:
            group["lr"] = rates[len(changes)] * group["peak"] / top
        with torch.no_grad():
            start = float(loss_with(untouched))
        optimizer.zero_grad()
        loss = loss_with(net)
        change = float(loss.detach()) - start
        usual = max(float(np.mean([*before, start])), SMALL_LOSS)
        if not math.isfinite(change) or (len(changes) > 10 and change > 3 * usual):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.core.parameters(), recipe.clip_norm or math.inf)
        optimizer.step()
        before.append(start)
        changes.append(change)
        on_progress(len(changes), len(rates))
    return rates[: len(changes)], np.array(changes) + (float(np.mean(before)) if before else 0.0)


def _batches(recipe: Recipe, train: Dataset, loss_of: Loss, n_steps: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yields (inputs, targets) of this many steps, epoch by epoch."""
    n_done = epoch = 0
    while n_done < n_steps:
        order = epoch_order(len(train.labels), recipe.seed, epoch, recipe.draw_weights(train.labels))
        batches = batches_of(order, recipe.batch_size)[: n_steps - n_done]
        with closing(ahead(partial(train.load, epoch=epoch), batches)) as loading:
            for rows, inputs in loading:
                yield inputs, loss_of.targets(train.labels[rows])
        n_done, epoch = n_done + len(batches), epoch + 1


def smooth(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential moving average, corrected for its start."""
    result, mean = np.empty(len(losses)), 0.0
    for n, value in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        result[n] = mean / (1 - SMOOTHING ** (n + 1))
    return result


def suggest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> RangeTest:
    """Applies three rules to a curve and suggests their median, because any single rule can be far off.

    If the loss hardly falls, as with a fitted head, these rules read noise. Then a tenth of the rate at which the loss
    starts to rise is suggested.
    """
    rules = {
        "steepest": float(rates[_steepest(rates, losses)]),
        "valley": float(rates[_valley(losses)]),
        "minimum/10": float(rates[int(losses.argmin())] / 10),
    }
    middle = float(np.median(list(rules.values())))
    name = min(rules, key=lambda rule: abs(rules[rule] - middle))
    rules["edge/10"] = float(rates[_edge(losses)] / 10)
    fell = (losses[0] - losses.min()) / max(losses[0], SMALL_LOSS)
    if fell < FLAT:
        suggestion = rules["edge/10"]
        reason = (
            f"The loss hardly falls at any rate ({100 * fell:.1f}%), as with a fitted head, so only its rise "
            f"can be read: {suggestion:.1e} is a tenth of the rate at which it has risen by {100 * RISEN:.0f}%."
        )
        if losses[-1] <= losses.min() + RISEN * max(float(losses.min()), SMALL_LOSS):
            reason = (
                f"Up to {rates[-1]:.1e} the loss neither falls nor rises; {suggestion:.1e}, a tenth of that, is a guess. More "
                "--steps or a higher --high would tell."
            )
        return RangeTest(rates, losses, rules, suggestion, reason)
    others = ", ".join(f"{rule} {rate:.1e}" for rule, rate in rules.items() if rule not in (name, "edge/10"))
    reason = f"{middle:.1e} is the median of three rules ({name}; {others}); the loss fell by {100 * fell:.0f}%."
    return RangeTest(rates, losses, rules, middle, reason)


def _edge(losses: NDArray[np.float64]) -> int:
    """The first point after which the loss stays more than a tenth above its lowest value; the last point if none."""
    low = np.flatnonzero(losses <= losses.min() + RISEN * max(float(losses.min()), SMALL_LOSS))
    return min(int(low[-1]) + 1, len(losses) - 1)


def _steepest(rates: NDArray[np.float64], losses: NDArray[np.float64]) -> int:
    """Index of the steepest descent of the loss over log rate, before its minimum."""
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
