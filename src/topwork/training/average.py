"""What is done with the weights after training: mixtures chosen on valid.

In: a network, what :func:`topwork.training.loop.fit` returned, and the validation stream. Out: :class:`Chosen`: one
state dict, and the table of what was tried. Weights on a line between a good start and a tuned end often are better
than both, under a shift of the data most of all (WiSE-FT: Wortsman et al. 2021, arXiv 2109.01903, eq. 1: theta =
(1 - alpha) theta_start + alpha theta_tuned). Ours differs in that the start already has the probe's head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.training.distributed import Processes
from topwork.training.folding import State
from topwork.training.loop import Judged, Prepared, Tuned, judge, predict
from topwork.training.recipe import Recipe
from topwork.training.streams import ImageStream, Stream

COEFFICIENTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Mixture:
    """One candidate: its name, its share of tuned weights, and what valid says about it, at the best temperature."""

    name: str
    coefficient: float
    loss: float
    accuracy: float
    chosen: bool = False


@dataclass(frozen=True)
class Chosen:
    """The weights that are kept, and what they were chosen from."""

    state: State
    tried: tuple[Mixture, ...]
    reason: str


def choose_weights(
    network: nn.Module, tuned: Tuned, recipe: Recipe, valid: Stream | None, group: Processes | None = None
) -> Chosen:
    """The best of: the best epoch, mixtures of it with the start, the mean of the best epochs.

    Args:
        network: of the same kind as the tuned one; its weights are used up.
    """
    candidates = list(_candidates(tuned, recipe))
    if valid is None or len(candidates) == 1:
        return Chosen(tuned.best, (), "The best epoch.")
    group = group or Processes()
    net = Prepared(network, _unfolded(recipe), valid, group.device)
    judged: list[tuple[str, float, Judged]] = []
    for name, coefficient, state in candidates:
        net.load(state)
        judged.append((name, coefficient, judge(net, valid, recipe, group)))

    def quality(place: int) -> tuple[float, float]:
        found = judged[place][2]
        loss = found.calibrated_loss
        return (loss, -found.accuracy) if recipe.monitor == "loss" else (-found.accuracy, loss)

    best = min(range(len(candidates)), key=quality)
    tried = tuple(
        Mixture(name, coefficient, found.calibrated_loss, found.accuracy, place == best)
        for place, (name, coefficient, found) in enumerate(judged)
    )
    return Chosen(candidates[best][2], tried, f"{tried[best].name}: best {recipe.monitor} on valid.")


def interpolate(start: State, tuned: State, coefficient: float) -> State:
    """(1 - coefficient) · start + coefficient · tuned; whole numbers (counters of batch norms) are the tuned ones."""
    return {
        name: torch.lerp(start[name], value, coefficient) if value.is_floating_point() else value
        for name, value in tuned.items()
    }


def mean_of(states: list[State]) -> State:
    """The mean of several weights, as in model soups (Wortsman et al. 2022, arXiv 2203.05482)."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }


def _candidates(tuned: Tuned, recipe: Recipe) -> Iterator[tuple[str, float, State]]:
    yield f"epoch {tuned.best_epoch}", 1.0, tuned.best
    if recipe.interpolate:
        yield "the start", 0.0, tuned.start
        for coefficient in COEFFICIENTS:
            yield f"{coefficient:g} tuned", coefficient, interpolate(tuned.start, tuned.best, coefficient)
    if len(tuned.best_epochs) > 1:
        epochs = ", ".join(str(epoch) for epoch, _, _ in tuned.best_epochs)
        yield f"mean of epochs {epochs}", 1.0, mean_of([state for _, _, state in tuned.best_epochs])


def _unfolded(recipe: Recipe) -> Recipe:
    """The same recipe for judging weights that come under the network's own names."""
    return replace(recipe, phases=tuple(replace(phase, batch_norm="frozen") for phase in recipe.phases), compile=False)


def tuned_logits(network: nn.Module, state: State, recipe: Recipe, stream: ImageStream) -> NDArray[np.float32]:
    """(N, C) logits of tuned weights."""
    net = Prepared(network, _unfolded(recipe), stream, Processes().device)
    net.load(state)
    return np.asarray(torch.cat([part for _, part in predict(net, stream)]).cpu().numpy(), np.float32)
