"""Selection of weights and models by results on validation images.

Three questions, in the order in which they come up. :func:`estimate`: is tuning worth its time here (auto mode)?
:func:`select_weights`: the last epoch, another one, or a mixture? :func:`select_model`: the tuned network or the probe?

Interpolations between good initial and tuned weights are often better than both, especially under distribution shift
(WiSE-FT: Wortsman et al. 2021, arXiv 2109.01903, eq. 1: theta = (1 - alpha) theta_start + alpha theta_tuned). In ours,
the initial weights include the probe's head.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from topwork.evaluation.calibration import fit_temperature
from topwork.features.probe import cross_entropies
from topwork.paired import is_clearly_better, paired
from topwork.text import count, percent
from topwork.training.batches import Dataset
from topwork.training.cpu import State
from topwork.training.distributed import Processes
from topwork.training.loop import EvalResult, TrainableNetwork, TrainingResult, evaluate
from topwork.training.losses import Loss
from topwork.training.optimizer import start_phase
from topwork.training.recipe import Recipe

# ---- is tuning worth its time?

# Errors in percent before and after for ResNet-18 (Salman et al. 2020, arXiv 2007.08489, tables of
# microsoft/robust-models-transfer): Caltech-101, Caltech-256, Pets, Flowers, DTD, CIFAR-10, SUN397, Birdsnap, Food-101,
# Aircraft, Cars
_FROZEN = np.array([10.5, 21.6, 10.2, 8.6, 32.9, 8.4, 48.2, 54.1, 39.7, 58.1, 54.3])
_TUNED = np.array([7.9, 19.8, 8.0, 3.8, 27.8, 2.9, 40.4, 31.5, 15.9, 19.1, 11.8])
REMOVED = 1 - _TUNED / _FROZEN
DEFAULT_MINUTES = 10.0  # default limit of auto mode


@dataclass(frozen=True)
class Estimate:
    """Expected gain in accuracy (points, quartiles of published results), minutes, decision, and why."""

    gain_low: float
    gain_high: float
    minutes: float
    worth_it: bool
    message: str


def estimate(
    accuracy: float,
    n_evaluated: int,
    n_train: int,
    recipe: Recipe,
    images_per_second: float,
    budget_minutes: float | None,
) -> Estimate:
    """Compares the expected gain of fine-tuning with its time.

    The gain is not predicted from this dataset, because no cheap method does that well; it is the published relative
    error reduction, applied to the remaining errors.

    Args:
        accuracy: of the probe, cross-validated, in [0, 1].
        n_evaluated: images that the accuracy comes from.
        images_per_second: of training, from :func:`training_rate`.
        budget_minutes: time limit; by default ten minutes.
    """
    error = 100 * (1 - accuracy)
    shares = [float(np.quantile(REMOVED, q)) for q in (0.25, 0.75)]
    low, high = (share * error for share in shares)
    minutes = recipe.n_epochs * n_train / images_per_second / 60
    allowed = DEFAULT_MINUTES if budget_minutes is None else budget_minutes
    noise = 100 * float(np.sqrt(max(accuracy * (1 - accuracy), 1e-4) / max(n_evaluated, 1)))
    facts = (
        f"The probe's cross-validated accuracy is {percent(accuracy)}. In published results, fine-tuning removed "
        f"{100 * shares[0]:.0f} to {100 * shares[1]:.0f}% of the errors of a frozen network (middle half): here "
        f"+{low:.1f} to +{high:.1f} points, in about {_minutes(minutes)}."
    )
    if high < noise:
        return Estimate(low, high, minutes, False, f"{facts} That is less than the noise (±{noise:.1f}): not tuning.")
    if minutes > allowed:
        advice = (
            f"--mode tune --time-budget {60 * allowed:.0f}s fine-tunes as much as fits"
            if budget_minutes is None
            else "a longer --time-budget allows it"
        )
        return Estimate(
            low, high, minutes, False, f"{facts} That is longer than {_minutes(allowed)}: not tuning; {advice}."
        )
    return Estimate(low, high, minutes, True, f"{facts} Tuning.")


def training_rate(network: nn.Module, recipe: Recipe, train: Dataset, device: str, seconds: float = 3.0) -> float:
    """Measured images per second of training with this recipe on this machine; overwrites the network."""
    net = TrainableNetwork(network, recipe, train, device)
    loss_of = Loss(recipe, net.device)
    optimizer = start_phase(net.core, recipe, recipe.phases[-1])
    rows = np.arange(min(recipe.batch_size, len(train.labels)))

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of.mean(net.logits(net.inputs(train.load(rows, 0))), loss_of.targets(train.labels[rows]))
        loss.backward()  # type: ignore[no-untyped-call]
        if torch.isfinite(loss.detach()):
            optimizer.step()

    step()  # warm-up
    n_steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds or n_steps == 0:
        step()
        n_steps += 1
    return n_steps * len(rows) / (time.perf_counter() - began)


def _minutes(minutes: float) -> str:
    return f"{60 * minutes:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min"


# ---- which weights?

COEFFICIENTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Candidate:
    """Candidate weights: a name, the share of tuned weights, and validation results at the best temperature."""

    name: str
    coefficient: float
    loss: float
    accuracy: float
    chosen: bool = False


@dataclass(frozen=True)
class SelectedWeights:
    """The selected weights, and all candidates."""

    state: State
    tried: tuple[Candidate, ...]
    reason: str


def select_weights(
    network: nn.Module, result: TrainingResult, recipe: Recipe, valid: Dataset | None, group: Processes | None = None
) -> SelectedWeights:
    """The last epoch, unless another candidate is clearly better on valid: the best epoch, mixtures, a mean of epochs.

    Clearly: by more than one standard error of the paired difference. The rate has decayed by the last epoch, while the
    best of many epochs on a few hundred images is mostly luck. If training ended early, the best epoch is the default.

    Args:
        network: with the architecture of the tuned one; its weights are overwritten.
    """
    candidates = list(_candidates(result, recipe))
    if valid is None or len(candidates) == 1:
        name, _, state = candidates[0]
        return SelectedWeights(state, (), f"Kept {name}." if valid is None else f"Kept {name}, the only candidate.")
    group = group or Processes()
    net = TrainableNetwork(network, unfolded(recipe), valid, group.device)
    found: list[EvalResult] = []
    for _, _, state in candidates:
        net.load(state)
        found.append(evaluate(net, valid, recipe, group))
    best = min(range(len(found)), key=lambda place: found[place].rank(recipe.monitor))
    by_loss = recipe.monitor == "loss"
    scores = [-one.losses if by_loss else one.correct for one in (found[best], found[0])]
    gain = paired(scores[0], scores[1], found[0].weights if by_loss else None)
    kept = best if is_clearly_better(gain) else 0
    tried = tuple(
        Candidate(name, coefficient, one.calibrated_loss, one.accuracy, place == kept)
        for place, ((name, coefficient, _), one) in enumerate(zip(candidates, found, strict=True))
    )
    difference = f"validation {recipe.monitor} by {gain.words(3)}"
    reason = f"Kept {tried[kept].name}: "
    if kept:
        reason += f"clearly better than {tried[0].name} ({difference})."
    elif best:
        reason += f"{tried[best].name} would be better, but not clearly ({difference})."
    else:
        reason += f"it has the best validation {recipe.monitor}."
    return SelectedWeights(candidates[kept][2], tried, reason)


def interpolate(start: State, tuned: State, coefficient: float) -> State:
    """(1 - coefficient) · start + coefficient · tuned; integers (batch-norm counters) are the tuned ones."""
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


def _candidates(result: TrainingResult, recipe: Recipe) -> Iterator[tuple[str, float, State]]:
    """(name, share of tuned weights, state); first the default."""
    last = result.history[-1]["epoch"] if result.history else 0
    is_annealed = result.ending == "finished" and last > 0
    first = result.end if is_annealed else result.best
    yield f"epoch {last if is_annealed else result.best_epoch}", 1.0, first
    if is_annealed and result.best_epoch != last:
        yield f"epoch {result.best_epoch}", 1.0, result.best
    if recipe.interpolate:
        yield "the original weights", 0.0, result.start
        for coefficient in COEFFICIENTS:
            name = f"a blend of {100 * coefficient:g}% fine-tuned and {100 - 100 * coefficient:g}% original weights"
            yield name, coefficient, interpolate(result.start, first, coefficient)
    if len(result.best_epochs) > 1:
        epochs = ", ".join(str(epoch) for epoch, _, _ in result.best_epochs)
        yield f"the mean of epochs {epochs}", 1.0, mean_of([state for _, _, state in result.best_epochs])


def unfolded(recipe: Recipe) -> Recipe:
    """The same recipe without folding, for weights under the network's own names."""
    phases = tuple(replace(phase, batch_norm="frozen") for phase in recipe.phases)
    return replace(recipe, phases=phases, lora_rank=None, compile=False)


# ---- the tuned network or the probe?


@dataclass(frozen=True)
class Selection:
    """Whether the tuned network is kept, and why."""

    keeps_tuned: bool
    message: str


def select_model(probe: ArrayLike, tuned: ArrayLike, labels: NDArray[Any], *, asked_for: bool) -> Selection:
    """Selects the probe or the tuned network by their predictions on the same validation images.

    The criterion is cross-entropy, each at its best temperature; a difference counts if it exceeds one standard error
    and accuracy does not contradict it. In doubt, the requested one is kept, else the probe: valid has already selected
    the epoch and the interpolation, so it slightly favors the tuned network.

    Args:
        probe, tuned: (N, C) logits.
        labels: (N,) class indices, or (N, C) booleans for several labels.
        asked_for: tuning was requested (``--mode tune``).
    """
    losses, correct = [], []
    for logits in (np.asarray(probe, np.float64), np.asarray(tuned, np.float64)):
        losses.append(cross_entropies(logits / fit_temperature(logits, labels), labels))
        correct.append(logits.argmax(1) == labels if labels.ndim == 1 else ((logits > 0) == labels).all(1))
    gain, ahead = paired(*losses), paired(correct[1], correct[0]).mean
    if asked_for:
        keeps = not (is_clearly_better(paired(*reversed(losses))) and ahead < 0)
    else:
        keeps = is_clearly_better(gain) and ahead >= 0
    accuracies = " and ".join(percent(float(part.mean())) for part in correct)
    measure = "accuracy" if labels.ndim == 1 else "exact match"
    return Selection(
        keeps,
        f"Kept the {'tuned network' if keeps else 'probe'}: on {count(len(labels), 'validation image')}, {measure} of the probe "
        f"and the tuned network is {accuracies}, and cross-entropy {'falls' if gain.mean > 0 else 'rises'} by {gain.words(3)}.",
    )
