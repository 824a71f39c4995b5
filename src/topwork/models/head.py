"""Heads: what turns features into one logit a class.

:class:`LinearHead` is the head of the probe: numpy arrays, fitted by ``features/probe.py``. It is *plain* when it reads
nothing but the last pooled features through an affine map: then it is one linear layer and can be written into timm's
classifier. Otherwise (square roots, further stages) it is *extended* and only topwork can answer with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Power = Literal["none", "sqrt", "unit"]


@dataclass(frozen=True)
class FeatureTransform:
    """How stored features become the columns that a linear layer sees: ``(power(blocks) - mean) / scale``.

    Attributes:
        blocks: names of the stored blocks that are joined, in order (``last``, ``stages``).
        power: ``sqrt`` takes the signed square root (Perronnin et al. 2010), ``unit`` scales every image's features
            to length sqrt(D).
        mean, scale: (D,) each.
    """

    blocks: tuple[str, ...]
    power: Power
    mean: Floats
    scale: Floats

    def apply(self, blocks: dict[str, NDArray[Any]]) -> Floats:
        """(N, D) float32 from a dict of (N, D_block) arrays."""
        return np.asarray((powered(blocks, self.blocks, self.power) - self.mean) / self.scale, np.float32)


def powered(blocks: dict[str, NDArray[Any]], names: tuple[str, ...], power: Power) -> Floats:
    """The joined blocks after the power, before centring and scaling."""
    joined: Floats = np.concatenate([blocks[name].astype(np.float32) for name in names], axis=1)
    if power == "sqrt":
        return np.asarray(np.sign(joined) * np.sqrt(np.abs(joined)), np.float32)
    if power == "unit":
        length = np.linalg.norm(joined, axis=1, keepdims=True)
        return np.asarray(joined * (np.float32(np.sqrt(joined.shape[1])) / np.maximum(length, 1e-6)), np.float32)
    return joined


@dataclass(frozen=True)
class LinearHead:
    """``logits = transform(features) @ weight.T + bias``, with weight (C, D) and bias (C,)."""

    transform: FeatureTransform
    weight: Floats
    bias: Floats

    @property
    def kind(self) -> str:
        """``plain`` or ``extended``."""
        plain = self.transform.blocks == ("last",) and self.transform.power == "none"
        return "plain" if plain else "extended"

    def logits(self, blocks: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        """(N, C) logits. In float64, so that the order of summation, and with it the batch size, does not show."""
        columns = self.transform.apply(blocks).astype(np.float64)
        return columns @ self.weight.T.astype(np.float64) + self.bias

    def divided_by(self, temperature: float) -> LinearHead:
        """The head whose softmax is already at that temperature (Guo et al. 2017, arXiv 1706.04599)."""
        t = np.float32(temperature)
        return replace(self, weight=self.weight / t, bias=self.bias / t)

    def folded(self) -> LinearHead:
        """For a plain head: the same logits from the raw features, so that weight and bias are timm's classifier."""
        assert self.kind == "plain", "only an affine transform can be folded"
        weight = self.weight / self.transform.scale
        bias = self.bias - weight @ self.transform.mean
        identity = replace(
            self.transform, mean=np.zeros_like(self.transform.mean), scale=np.ones_like(self.transform.scale)
        )
        return LinearHead(identity, np.asarray(weight, np.float32), np.asarray(bias, np.float32))
