"""Was tuning worth it? The answers of the probe and of the tuned network on valid, compared in pairs.

In: logits of both. Out: :class:`Verdict`. Arrays only; nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.label_sets import fit_label_temperature


@dataclass(frozen=True)
class Verdict:
    """Whether the tuned network is kept, and why."""

    keeps_tuned: bool
    words: str


def weigh(probe: ArrayLike, tuned: ArrayLike, labels: NDArray[np.int64], *, asked_for: bool) -> Verdict:
    """Which of the two is kept, by their answers on the same validation images.

    The score is cross-entropy, each at the temperature that suits it best; a difference counts when it is more than one
    standard error and accuracy does not say the opposite. In doubt the one that was asked for is kept, else the probe:
    valid has already chosen the epoch and the mixture of weights, so it flatters the tuned network a little.

    Args:
        probe, tuned: (N, C) logits.
        asked_for: tuning was asked for (``--mode tune``), not just considered.
    """
    losses, right = [], []
    for logits in (np.asarray(probe, np.float64), np.asarray(tuned, np.float64)):
        scaled = logits / fit_temperature(logits, labels)
        shifted = scaled - scaled.max(1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels])
        right.append((logits.argmax(1) == labels).astype(float))
    return _verdict(losses, right, asked_for, "right in")


def weigh_label_sets(probe: ArrayLike, tuned: ArrayLike, truth: NDArray[np.bool_], *, asked_for: bool) -> Verdict:
    """The same where an image may have several labels: the loss is summed over the sigmoids, right is every label right.

    Args:
        probe, tuned: (N, C) logits.
        truth: (N, C) which labels each image has.
    """
    losses, right = [], []
    for logits in (np.asarray(probe, np.float64), np.asarray(tuned, np.float64)):
        scaled = logits / fit_label_temperature(logits, truth)
        losses.append(np.logaddexp(0, np.where(truth, -scaled, scaled)).sum(1))
        right.append(((logits > 0) == truth).all(1).astype(float))
    return _verdict(losses, right, asked_for, "right about every label in")


def _verdict(losses: list[NDArray[np.float64]], right: list[NDArray[np.float64]], asked_for: bool, how: str) -> Verdict:
    gains = losses[0] - losses[1]
    gain, error = float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
    ahead = float((right[1] - right[0]).mean())
    keeps = not (gain < -error and ahead < 0) if asked_for else gain > error and ahead >= 0
    kept = "The tuned network is kept" if keeps else "The probe is kept"
    accuracies = " and ".join(f"{100 * part.mean():.1f} %" for part in right)
    return Verdict(
        keeps,
        f"{kept}: on the {len(gains)} validation images, probe and tuned network are {how} {accuracies}, and "
        f"cross-entropy {'falls' if gain > 0 else 'rises'} by {abs(gain):.3f} (standard error {error:.3f}).",
    )
