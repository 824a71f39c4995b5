"""Heads, which turn features into one logit per class.

:class:`LinearHead` is the head of the probe: numpy arrays, fitted by ``features/probe.py``. It is *plain* when it reads
only the last pooled features through an affine map: then it is one linear layer and can be stored in timm's
classifier. Otherwise (square roots, further stages) it is *extended* and only topwork can use it.

:class:`HeadSpec` describes the head for fine-tuning (``models/modules.py``): linear, hidden layers, cosine. Once trained
it becomes a LinearHead: hidden layers then count as part of the network (:class:`Changes`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from topwork.errors import UsageError
from topwork.settings import Pooling

Floats = NDArray[np.float32]
Power = Literal["none", "sqrt", "unit"]
POOLINGS = get_args(Pooling)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "hardswish")


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
    """The joined blocks after the power, before centering and scaling."""
    joined: Floats = np.concatenate([blocks[name].astype(np.float32) for name in names], axis=1)
    if power == "sqrt":
        return np.copysign(np.sqrt(np.abs(joined)), joined, out=joined)
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
        """The head with logits divided by a temperature (Guo et al. 2017, arXiv 1706.04599)."""
        t = np.float32(temperature)
        return replace(self, weight=self.weight / t, bias=self.bias / t)

    def folded(self) -> LinearHead:
        """For a plain head: the same logits from the raw features, so that weight and bias are timm's classifier."""
        assert self.kind == "plain", "only an affine transform can be folded"
        weight = self.weight / self.transform.scale
        return last_features_head(weight, self.bias - weight @ self.transform.mean)


def last_features_head(weight: NDArray[Any], bias: NDArray[Any], power: Power = "none") -> LinearHead:
    """A head on the last features without centering and scaling: weight (C, D), bias (C,)."""
    n = weight.shape[1]
    transform = FeatureTransform(("last",), power, np.zeros(n, np.float32), np.ones(n, np.float32))
    return LinearHead(transform, np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32))


# ---- heads for fine-tuning


@dataclass(frozen=True)
class HiddenLayer:
    """One hidden layer of an MLP head; ``dropout`` in [0, 1) follows the activation."""

    width: int
    activation: str = "relu"
    dropout: float = 0.0


@dataclass(frozen=True)
class HeadSpec:
    """The layers between pooled features and logits.

    Attributes:
        kind: ``extended`` is the probe's head of that kind, with the square roots and stages that it reads.
        dropout: on the features, before anything else.
        hidden: layers of an MLP, first to last; empty for the other kinds.
    """

    kind: Literal["linear", "mlp", "cosine", "extended"] = "linear"
    hidden: tuple[HiddenLayer, ...] = ()
    dropout: float = 0.0

    def __str__(self) -> str:
        """The text that :func:`parse_head` reads back."""
        layers = [f"{layer.width}:{layer.activation}:{layer.dropout:g}" for layer in self.hidden]
        name = ",".join(layers) if self.kind == "mlp" else self.kind
        return f"drop:{self.dropout:g},{name}" if self.dropout else name

    @property
    def starts_from_probe(self) -> bool:
        """Whether it can start from a fitted probe; any other head is first trained with a frozen backbone."""
        return self.kind in ("linear", "extended")

    @property
    def last_index(self) -> int:
        """Where the last layer is in the sequence of an MLP: each hidden layer is linear, activation, dropout."""
        return bool(self.dropout) + 3 * len(self.hidden)


def parse_head(text: str) -> HeadSpec:
    """Reads a head from one line: ``linear``, ``cosine``, ``256:0.4`` or ``512:gelu:0.2,128``.

    A hidden layer is its width, then an activation (by default relu), then its dropout; ``drop:0.2,`` in front drops
    features.

    Raises:
        UsageError: any other text, with an example of a valid one.
    """
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    dropout = 0.0
    if parts and (match := re.fullmatch(r"drop:(0?\.\d+|0)", parts[0])):
        dropout = float(match[1])
        parts = parts[1:]
    if parts in (["linear"], ["cosine"]):
        return HeadSpec("linear" if parts == ["linear"] else "cosine", dropout=dropout)
    layers = [_hidden_layer(part, text) for part in parts]
    if not layers:
        raise _wrong_head(text)
    return HeadSpec("mlp", tuple(layers), dropout)


def _hidden_layer(part: str, text: str) -> HiddenLayer:
    match = re.fullmatch(r"([1-9]\d{0,5})(?::([a-z]+))?(?::(0?\.\d+|0))?", part)
    if match is None or (match[2] or "relu") not in ACTIVATIONS:
        raise _wrong_head(text)
    return HiddenLayer(int(match[1]), match[2] or "relu", float(match[3] or 0))


def _wrong_head(text: str) -> UsageError:
    return UsageError(
        f"{text or 'nothing'}: not a head. Give hidden layers as WIDTH:DROPOUT or WIDTH:ACTIVATION:DROPOUT, such as "
        f"256:0.4,128:0.2 (activations: {', '.join(ACTIVATIONS)})."
    )


@dataclass(frozen=True)
class Changes:
    """How a network differs from timm's; by default not at all.

    Attributes:
        pooling: another way of pooling, in timm's words: ``avg max avgmax`` of the last map or the patch tokens,
            ``catavgmax`` of the last map, ``token`` for the class token; ``both`` joins class token and mean patch token.
        drop_hidden: without the hidden layers before the last one (VGG's two of 4,096 units).
        hidden: hidden layers in front of the last one, as :func:`parse_head` reads them.
    """

    pooling: str | None = None
    drop_hidden: bool = False
    hidden: str | None = None

    def __bool__(self) -> bool:
        """Whether there are any changes."""
        return self != UNCHANGED


UNCHANGED = Changes()
