"""Heads as torch modules, and networks with their classifier replaced: what fine-tuning trains.

In: a timm network (``Backbone.module()``) and a :class:`HeadSpec`, or a module of your own. Out: the same network with
a new last layer under the old name, so that its state dict is what timm would load. Numpy heads for frozen features
are in ``models/head.py``; training itself is in ``training/loop.py``.

Nothing on the path of ``predict`` imports this file, so it may import torch at the top.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import UsageError
from topwork.models.head import ACTIVATIONS, Changes, HeadSpec, Power, parse_head

Pooling = Literal["avg", "max", "avgmax", "catavgmax"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "hardswish": nn.Hardswish,
}  # fmt: skip
assert set(_ACTIVATIONS) == set(ACTIVATIONS), "one module for each activation that a head may name"


class CosineHead(nn.Module):
    """Logits = scale · cos(features, class direction): no class wins by the length of its row (arXiv 1804.09170)."""

    def __init__(self, n_features: int, n_outputs: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_outputs, n_features) / n_features**0.5)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, D) features to (B, C) logits."""
        unit = nn.functional.normalize(features, dim=1), nn.functional.normalize(self.weight, dim=1)
        return self.scale * nn.functional.linear(*unit)


def make_head(spec: HeadSpec, n_features: int, n_outputs: int) -> nn.Module:
    """The head as a module: (B, n_features) to (B, n_outputs)."""
    first = [nn.Dropout(spec.dropout)] if spec.dropout else []
    if spec.kind == "cosine":
        last: list[nn.Module] = [CosineHead(n_features, n_outputs)]
    else:
        last, width = [], n_features
        for layer in spec.hidden:
            last += [nn.Linear(width, layer.width), _ACTIVATIONS[layer.activation](), nn.Dropout(layer.dropout)]
            width = layer.width
        last.append(nn.Linear(width, n_outputs))
    return nn.Sequential(*first, *last) if len(first) + len(last) > 1 else last[0]


def n_outputs(n_classes: int, outputs: str) -> int:
    """Logits that a head needs: one for two classes told apart by a sigmoid, otherwise one a class."""
    return 1 if outputs == "binary" else n_classes


def powered(columns: torch.Tensor, power: Power, least: float = 0.0) -> torch.Tensor:
    """:func:`topwork.models.head.powered` for joined (B, D) features.

    Args:
        least: below it a square root is taken as flat, where gradients are wanted: its slope at zero is infinite.
    """
    if power == "sqrt":
        size = torch.abs(columns)
        return torch.sign(columns) * torch.sqrt(size.clamp_min(least) if least else size)
    if power == "unit":
        length = torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-6)
        columns = columns * (columns.shape[1] ** 0.5 / length)
    return columns


# ---- replacing a classifier


def build_classifier(
    network: nn.Module,
    head: HeadSpec | nn.Module,
    n_outputs: int,
    *,
    pooling: Pooling | None = None,
    drop_hidden: bool = False,
) -> nn.Module:
    """Puts a new head in place of the last linear layer of a timm network; everything else keeps its weights.

    In networks whose classifier has several layers (VGG) only the last one is replaced, unless asked otherwise.

    Args:
        network: changed in place and returned.
        head: what to build, or a ready module from (B, D) features to (B, n_outputs) logits.
        pooling: another way of pooling the last map, in timm's words.
        drop_hidden: also removes the hidden layers before the last one (VGG's two of 4,096 units).

    Raises:
        UsageError: the network has no such part.
    """
    if drop_hidden:
        _drop_hidden(network)
    if pooling is not None:
        _repool(network, pooling)
    name = classifier_name(network)
    last = network.get_submodule(name)
    is_as_built = isinstance(last, nn.Linear) and pooling is None and not drop_hidden
    n_features = int(last.weight.shape[1]) if is_as_built else feature_width(network)  # type: ignore[index]
    module = head if isinstance(head, nn.Module) else make_head(head, n_features, n_outputs)
    replace_module(network, name, module)
    network.num_classes = n_outputs  # type: ignore[assignment]  # timm's own record of it
    return network


def changed(network: nn.Module, changes: Changes, n_outputs: int) -> nn.Module:
    """A timm network with the changes that a backbone records; 0 outputs end it before the last layer."""
    if not changes:
        return network
    pooling: Any = changes.pooling
    spec = parse_head(changes.hidden) if changes.hidden else HeadSpec()
    build_classifier(network, spec, max(1, n_outputs), pooling=pooling, drop_hidden=changes.drop_hidden)
    if n_outputs == 0:
        last = classifier_name(network) + (f".{spec.last_index}" if spec.hidden else "")
        replace_module(network, last, nn.Identity())
    return network


def classifier_name(network: nn.Module) -> str:
    """Dotted name of the last layer of a timm network, or of one of ours."""
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    name = cfg.get("classifier") or "classifier"
    return name if isinstance(name, str) else str(name[0])


def feature_width(network: nn.Module) -> int:
    """Length D of the pooled features that the last layer sees."""
    was_training = network.training
    name = classifier_name(network)
    seen: list[int] = []
    place = network.get_submodule(name)
    hook = place.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[0].shape[-1])))
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *(cfg.get("input_size") or (3, 224, 224))))
    except RuntimeError as error:
        if not seen:  # a new width breaks the old last layer, after it has been seen
            raise UsageError(f"{type(network).__name__}: its classifier cannot be replaced: {error}") from None
    finally:
        hook.remove()
        network.train(was_training)
    return seen[-1]


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Sets the sub-module of a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def set_linear(network: nn.Module, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    """Starts the last linear layer from a fitted head: weight (C, D), bias (C,).

    With one output (two classes, sigmoid) the difference of the two rows says the same.
    """
    layer = network.get_submodule(classifier_name(network))
    assert isinstance(layer, nn.Linear), "only a linear head can start from a linear probe"
    if layer.out_features == 1 and len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(weight, np.float32)))
        layer.bias.copy_(torch.from_numpy(np.asarray(bias, np.float32)))


def grow_classes(network: nn.Module, n_classes: int) -> nn.Module:
    """Makes room for more classes; old rows keep their values, new ones start at zero weight and a low bias.

    Raises:
        UsageError: fewer classes than there are, or a head whose last layer has no row a class.
    """
    layer = _last_layer(network)
    weight = layer.weight
    old = int(weight.shape[0])
    if n_classes < old or old == 1:
        raise UsageError(f"A head of {old} outputs cannot be grown to {n_classes} classes.")
    rows = torch.zeros(n_classes - old, weight.shape[1])
    layer.weight = nn.Parameter(torch.cat([weight.detach(), rows]))
    if isinstance(layer, nn.Linear):
        layer.out_features = n_classes
        if layer.bias is not None:
            # As sure as the least sure old class: a new class must not win before it has seen an image.
            fresh = layer.bias.detach().min().expand(n_classes - old)
            layer.bias = nn.Parameter(torch.cat([layer.bias.detach(), fresh]))
    network.num_classes = n_classes  # type: ignore[assignment]
    return network


def _last_layer(network: nn.Module) -> nn.Linear | CosineHead:
    start = classifier_name(network)
    found = [m for m in network.get_submodule(start).modules() if isinstance(m, nn.Linear | CosineHead)]
    if not found:
        raise UsageError(f"{type(network).__name__}: its head has no row a class and cannot be grown.")
    return found[-1]


def _drop_hidden(network: nn.Module) -> None:
    if not hasattr(network, "pre_logits"):
        raise UsageError(f"{type(network).__name__}: it has no hidden layers before its last one.")
    network.pre_logits = nn.Identity()


def _repool(network: nn.Module, pooling: Pooling) -> None:
    reset: Any = getattr(network, "reset_classifier", None)
    if reset is None:
        raise UsageError(f"{type(network).__name__}: its pooling cannot be changed.")
    try:
        reset(1, global_pool=pooling)
    except (TypeError, AssertionError, ValueError) as error:
        raise UsageError(f"--pooling {pooling}: {type(network).__name__} does not take it: {error}") from None


# ---- from scratch


class SixBlockNetwork(nn.Module):
    """The small network that courses train on cats and dogs from scratch, 224 px, to compare with transfer.

    Six times 3×3 convolution without padding, ReLU, batch norm, 2×2 pooling, with 64 and then five times 512 channels:
    the map shrinks to one position and a linear layer reads it. With one output it has 9,742,209 parameters.

    Args:
        narrower: divides the channels, for slow machines.
        padding: 1 for inputs below 190 pixels, which the lecture's 0 would use up.
    """

    widths = (64, 512, 512, 512, 512, 512)

    def __init__(self, n_outputs: int = 1, *, narrower: int = 1, padding: int = 0) -> None:
        super().__init__()
        widths = [width // narrower for width in self.widths]
        channels = zip((3, *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(self._block(before, after, padding) for before, after in channels))
        self.flatten = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], n_outputs)
        self.num_classes = n_outputs

    @staticmethod
    def _block(before: int, after: int, padding: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, after, 3, padding=padding)
        pooling = nn.MaxPool2d(2, ceil_mode=padding > 0)  # one position stays one
        return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(after), pooling)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 224, 224) to (B, n_outputs) logits."""
        logits: torch.Tensor = self.classifier(self.flatten(self.blocks(images)))
        return logits


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(value.numel(), value.requires_grad) for value in network.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves)
