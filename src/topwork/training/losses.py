"""Losses: the loss of a recipe, mixup and cutmix, and terms on images of a target domain.

In: logits and targets as tensors. Out: one loss per sample, or a weighted sum of terms. The rows of a target domain in
a step depend on (seed, epoch, step), so a resumed run uses the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from topwork.evaluation.domains import MCC_TEMPERATURE
from topwork.training.batches import ImageDataset
from topwork.training.recipe import Recipe


class Loss:
    """The loss of a recipe per sample, with class weights; ``sum of losses / sum of weights`` is the mean."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self.outputs, self.smoothing, self.n_classes = recipe.outputs, recipe.label_smoothing, recipe.n_classes
        weights = recipe.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, device=device)
        self.device = device

    def targets(self, labels: NDArray[Any]) -> Tensor:
        """(B, C) probabilities from (B,) classes or (B, C) zeros and ones; (B, 1) for one sigmoid over two classes."""
        number = np.int64 if labels.ndim == 1 else np.float32  # MPS has no float64
        tensor = torch.from_numpy(np.asarray(labels, number)).to(self.device)
        if self.outputs == "softmax" and tensor.ndim == 1:
            return F.one_hot(tensor.long(), self.n_classes).float()
        return (tensor[:, None] if tensor.ndim == 1 else tensor).float()

    def weights(self, targets: Tensor) -> Tensor:
        """(B,) weight of each sample."""
        if self.class_weights is None:
            return torch.ones(len(targets), device=self.device)
        if self.outputs == "binary":
            return self.class_weights[0] + (self.class_weights[1] - self.class_weights[0]) * targets[:, 0]
        return (targets * self.class_weights).sum(1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) losses times weights."""
        if self.outputs == "softmax":
            p = targets * (1 - self.smoothing) + self.smoothing / logits.shape[1]
            losses = -(p * logits.log_softmax(1)).sum(1)
        else:
            p = targets * (1 - self.smoothing) + self.smoothing / 2
            losses = F.binary_cross_entropy_with_logits(logits, p, reduction="none").mean(1)
        return losses * self.weights(targets)

    def mean(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The weighted mean over the batch."""
        return self(logits, targets).sum() / self.weights(targets).sum()

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(B,) 1 for a correct prediction, else 0; with several labels, the fraction of correct ones."""
        if self.outputs == "softmax":
            return (logits.argmax(1) == targets.argmax(1)).float()
        return ((logits > 0) == (targets > 0.5)).float().mean(1)


def mix(inputs: Tensor, targets: Tensor, recipe: Recipe, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412) or cutmix (Yun et al. 2019, arXiv 1905.04899), or neither.

    If both are enabled, each batch gets one of them.

    Args:
        inputs: (B, H, W, 3) of any number type; mixup returns float32.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(recipe, kind)]
    if not kinds or len(targets) < 2 or recipe.outputs == "multilabel":
        return inputs, targets
    kind = kinds[int(rng.integers(len(kinds)))]
    share = float(rng.beta(*(getattr(recipe, kind),) * 2))
    other = torch.from_numpy(rng.permutation(len(inputs))).to(inputs.device)
    if kind == "mixup":
        inputs = share * inputs.float() + (1 - share) * inputs[other].float()
    else:
        inputs, share = _cut(inputs, inputs[other], share, rng)
    return inputs, share * targets + (1 - share) * targets[other]


def _cut(inputs: Tensor, others: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    height, width = inputs.shape[1:3]
    side = math.sqrt(1 - share)
    y, x = rng.integers(height), rng.integers(width)
    top, bottom = (int(np.clip(y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
    mixed = inputs.clone()
    mixed[:, top:bottom, left:right] = others[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


@dataclass(frozen=True, eq=False)
class TargetTerms:
    """Terms on images of a target domain: cross-entropy with pseudo-labels, and minimum class confusion.

    Attributes:
        images: with (M, C) probabilities as labels, one-hot for labels given by the user.
        batch_size: target images per step.
        weight: of all terms, relative to 1 for the loss of the labeled images.
        confusion: weight of class confusion, relative to 1 for the cross-entropy with the pseudo-labels.
    """

    images: ImageDataset
    batch_size: int = 32
    weight: float = 1.0
    confusion: float = 1.0

    def rows(self, seed: int, epoch: int, step: int) -> NDArray[np.int64]:
        """(B,) rows of one step, without repetition."""
        n = len(self.images.labels)
        return np.random.default_rng([seed, epoch, step, 3]).choice(n, min(self.batch_size, n), replace=False)

    def loss(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """The weighted terms for the (B, C) logits of some rows."""
        pseudo_labels = torch.from_numpy(np.asarray(self.images.labels[rows], np.float32)).to(logits.device)
        fit = -(pseudo_labels * logits.log_softmax(1)).sum(1).mean()
        return self.weight * (fit + self.confusion * class_confusion(logits))


def class_confusion(logits: Tensor) -> Tensor:
    """Minimum class confusion of (B, C) logits, 0 to 1: see :func:`topwork.adaptation.align.class_confusion`.

    Jin et al. 2020, arXiv 1912.03699, eq. 3 to 6, over a batch as there.
    """
    y = (logits / MCC_TEMPERATURE).softmax(1)
    with torch.no_grad():
        w = 1 + torch.exp((y * torch.log(y + 1e-12)).sum(1))
        w = (w * (len(y) / w.sum()))[:, None]
    rows, diagonal = (w * y).sum(0) + 1e-9, (w * y * y).sum(0)
    return 1 - (diagonal / rows).mean()
