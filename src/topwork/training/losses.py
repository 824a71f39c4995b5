"""Terms of the training loss beside the labels' own: what an unlabeled domain may contribute.

In: images of a target domain with what is believed about each (probabilities from ``adaptation/guards.py``, certain
where the user gave a label). Out: a loss that the one loop adds at every step, cross-entropy with the beliefs and
minimum class confusion of the answers. Which rows a step sees follows from (seed, epoch, step), so a resumed run sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topwork.evaluation.domains import MCC_TEMPERATURE
from topwork.training.batches import ImageStream


@dataclass(frozen=True, eq=False)
class TargetTerms:
    """Terms on images of a target domain.

    Attributes:
        stream: its labels are beliefs, (M, C) probabilities.
        batch_size: images of it at each step.
        weight: of all terms together, against 1 for the loss of the labeled images.
        confusion: of class confusion, against 1 for the cross-entropy with the beliefs.
    """

    stream: ImageStream
    batch_size: int = 32
    weight: float = 1.0
    confusion: float = 1.0

    def rows(self, seed: int, epoch: int, step: int) -> NDArray[np.int64]:
        """(B,) rows of one step, without repetition."""
        n = len(self.stream.labels)
        return np.random.default_rng([seed, epoch, step, 3]).choice(n, min(self.batch_size, n), replace=False)

    def loss(self, logits: Tensor, rows: NDArray[np.int64]) -> Tensor:
        """The weighted terms for the (B, C) logits of some rows."""
        beliefs = torch.from_numpy(np.asarray(self.stream.labels[rows], np.float32)).to(logits.device)
        fit = -(beliefs * logits.log_softmax(1)).sum(1).mean()
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
