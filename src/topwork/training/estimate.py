"""Auto mode: is tuning worth its time here? What it may add, how long it takes, and the decision in words.

In: the probe's cross-validated accuracy and a measured training rate. Out: :class:`Estimate`. The gain is not
predicted from this data set, because nothing cheap does that well; it is what others found, applied to the errors that
are left: for ResNet-18 on eleven data sets, tuning everything removed these shares of a frozen network's errors
(Salman et al. 2020, arXiv 2007.08489, tables of microsoft/robust-models-transfer).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from topwork.training.batches import ImageStream, Stream
from topwork.training.distributed import processes
from topwork.training.loop import Loss, Prepared
from topwork.training.optimizer import freeze, make_optimizer, train_mode
from topwork.training.recipe import Recipe
from topwork.training.tail import tail_streams

# Errors before and after in percent: Caltech-101, Caltech-256, Pets, Flowers, DTD, CIFAR-10, SUN397, Birdsnap, Food-101,
# Aircraft, Cars
_FROZEN = np.array([10.5, 21.6, 10.2, 8.6, 32.9, 8.4, 48.2, 54.1, 39.7, 58.1, 54.3])
_TUNED = np.array([7.9, 19.8, 8.0, 3.8, 27.8, 2.9, 40.4, 31.5, 15.9, 19.1, 11.8])
REMOVED = 1 - _TUNED / _FROZEN
DEFAULT_MINUTES = 10.0  # what auto mode spends unasked


@dataclass(frozen=True)
class Estimate:
    """Expected gain in accuracy (points, quartiles of what others found), minutes, decision, and why."""

    gain_low: float
    gain_high: float
    minutes: float
    worth_it: bool
    words: str


def estimate(
    accuracy: float,
    n_judged: int,
    n_train: int,
    recipe: Recipe,
    images_per_second: float,
    budget_minutes: float | None,
    before_seconds: float = 0.0,
) -> Estimate:
    """Weighs what tuning may add against its time.

    Args:
        accuracy: of the probe, cross-validated, in [0, 1].
        n_judged: images that the accuracy comes from.
        images_per_second: of training, from :func:`training_rate`.
        budget_minutes: what the user grants; by default ten minutes.
        before_seconds: what has to be done first, such as caching activations.
    """
    error = 100 * (1 - accuracy)
    low, high = (float(np.quantile(REMOVED, q)) * error for q in (0.25, 0.75))
    minutes = (before_seconds + recipe.n_epochs * n_train / images_per_second) / 60
    allowed = DEFAULT_MINUTES if budget_minutes is None else budget_minutes
    noise = 100 * float(np.sqrt(max(accuracy * (1 - accuracy), 1e-4) / max(n_judged, 1)))
    facts = (
        f"The probe is right in {100 * accuracy:.1f} % (cross-validated). Where others tuned after a probe, half of the "
        f"times between {100 * np.quantile(REMOVED, 0.25):.0f} and {100 * np.quantile(REMOVED, 0.75):.0f} % of the "
        f"errors went away: here +{low:.1f} to +{high:.1f} points, in about {_minutes(minutes)}."
    )
    if high < noise:
        return Estimate(low, high, minutes, False, f"{facts} That is less than the noise (±{noise:.1f}): not tuning.")
    if minutes > allowed:
        advice = f"--mode tune --time-budget {60 * allowed:.0f}s does as much as fits" if budget_minutes is None else (
            "a larger --time-budget allows it")  # fmt: skip
        return Estimate(low, high, minutes, False, f"{facts} That is over {_minutes(allowed)}: not tuning; {advice}.")
    return Estimate(low, high, minutes, True, f"{facts} Tuning.")


def training_rate(network: nn.Module, recipe: Recipe, train: Stream, seconds: float = 3.0) -> float:
    """Images a second of training steps by this recipe on this machine, measured; the network is used up."""
    phase = recipe.phases[-1]
    net = Prepared(network, recipe, train, processes().device)
    loss_of = Loss(recipe, net.device)
    freeze(net.core, phase)
    train_mode(net.core, phase)
    optimizer = make_optimizer(net.core, recipe, phase)
    rows = np.arange(min(recipe.batch_size, len(train.labels)))

    def step() -> None:
        targets = loss_of.targets(train.labels[rows])
        optimizer.zero_grad()
        loss = loss_of(net.logits(train.load(rows, 0)), targets).sum() / loss_of.weights(targets).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss.detach()):
            return
        optimizer.step()

    step()  # the first one prepares kernels and memory
    n_steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or n_steps == 0:
        step()
        n_steps += 1
    return n_steps * len(rows) / (time.perf_counter() - began)


def tail_rate(network: nn.Module, recipe: Recipe, train: ImageStream) -> tuple[float, float]:
    """Views a second of caching, and images a second of training from what is cached, measured; uses the network up.

    Raises:
        UsageError: the network cannot be cut before the first stage that moves.
    """
    few = train.some(np.arange(min(len(train.labels), max(64, recipe.batch_size))))
    one_view = replace(recipe, tail_views=1)
    tail_streams(network, one_view, few, None)  # the first call compiles
    began = time.perf_counter()
    cached, _ = tail_streams(network, one_view, few, None)
    seconds = time.perf_counter() - began
    return len(few.labels) / seconds, training_rate(network, recipe, cached)


def _minutes(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min"
