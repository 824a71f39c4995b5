"""What is done with the weights after training: mixtures chosen on valid.

In: a network, what :func:`topwork.training.loop.fit` returned, and the validation stream. Out: :class:`Chosen`: one
state dict, and the table of what was tried. Weights on a line between a good start and a tuned end often are better
than both, under a shift of the data most of all (WiSE-FT: Wortsman et al. 2021, arXiv 2109.01903, eq. 1: theta =
(1 - alpha) theta_start + alpha theta_tuned). Ours differs in that the start already has the probe's head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.training.batches import ImageStream, Stream
from topwork.training.distributed import Processes
from topwork.training.folding import State
from topwork.training.loop import Judged, Prepared, Tuned, judge, predict
from topwork.training.recipe import Recipe

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
    """The last epoch, unless another candidate is clearly better on valid: the best epoch, mixtures, a mean of epochs.

    Clearly: by more than one standard error of the paired difference (with ``monitor`` accuracy: of the accuracy's). Rates
    have come down when the last epoch ends, so it is where training leads, while the best of many epochs on a few hundred
    images is mostly luck. A training that ended early has no such end: there the best epoch comes first.

    Args:
        network: of the same kind as the tuned one; its weights are used up.
    """
    candidates = list(_candidates(tuned, recipe))
    if valid is None or len(candidates) == 1:
        name, _, state = candidates[0]
        return Chosen(state, (), f"{name}." if valid is None else f"{name}: there is nothing to compare it with.")
    group = group or Processes()
    net = Prepared(network, _unfolded(recipe), valid, group.device)
    judged: list[tuple[str, float, Judged]] = []
    for name, coefficient, state in candidates:
        net.load(state)
        judged.append((name, coefficient, judge(net, valid, recipe, group)))
    figures = [found for _, _, found in judged]
    best = min(range(len(figures)), key=lambda place: figures[place].rank(recipe.monitor))
    ahead, error = _lead(figures[best], figures[0], recipe, len(valid.labels), group)
    kept = best if ahead > error * (1 + 1e-9) else 0
    tried = tuple(
        Mixture(name, coefficient, found.calibrated_loss, found.accuracy, place == kept)
        for place, (name, coefficient, found) in enumerate(judged)
    )
    name = tried[kept].name
    if kept:
        reason = (
            f"{name}: on valid clearly better than {tried[0].name} ({recipe.monitor}, by {ahead:.3f} ± {error:.3f})."
        )
    elif best:
        reason = f"{name}: {tried[best].name} is better on valid, but within its error ({recipe.monitor}, by {ahead:.3f} ± {error:.3f})."
    else:
        reason = f"{name}: best {recipe.monitor} on valid."
    return Chosen(candidates[kept][2], tried, reason)


def _lead(one: Judged, other: Judged, recipe: Recipe, n_images: int, group: Processes) -> tuple[float, float]:
    """How far one is ahead of the other on the same images, and the standard error of that."""
    if recipe.monitor == "accuracy":
        ahead = one.accuracy - other.accuracy
        return ahead, math.sqrt(max(ahead, 0.0) / max(1, n_images))  # of so many images that differ, at least
    return other.calibrated_loss - one.calibrated_loss, _standard_error(other, one, group)


def _standard_error(first: Judged, second: Judged, group: Processes) -> float:
    """Of the difference of two calibrated losses on the same images."""
    difference, weight = first.by_image[:, 0] - second.by_image[:, 0], first.by_image[:, 1]
    total, all_weight = group.total([float(difference.sum()), float(weight.sum())])
    mean = total / max(all_weight, 1e-12)
    (squares,) = group.total([float(((difference - mean * weight) ** 2).sum())])
    return math.sqrt(squares) / max(all_weight, 1e-12)


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
    """First what is kept in doubt."""
    last = tuned.history[-1]["epoch"] if tuned.history else 0
    is_annealed = tuned.ending == "finished" and last > 0
    first = tuned.end if is_annealed else tuned.best
    yield f"epoch {last if is_annealed else tuned.best_epoch}", 1.0, first
    if is_annealed and tuned.best_epoch != last:
        yield f"epoch {tuned.best_epoch}", 1.0, tuned.best
    if recipe.interpolate:
        yield "the start", 0.0, tuned.start
        for coefficient in COEFFICIENTS:
            yield f"{coefficient:g} tuned", coefficient, interpolate(tuned.start, first, coefficient)
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
