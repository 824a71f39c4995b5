"""Heads as torch modules, and networks with their classifier replaced: what fine-tuning trains.

In: a timm network (``Backbone.module()``) and a :class:`HeadSpec`, or a module of your own. Out: the same network with
a new head; if timm's last layer is linear, the head has its name, so that timm can load the state dict. NumPy
heads for frozen features are in ``models/head.py``; training itself is in ``training/loop.py``.

Nothing on the path of ``predict`` imports this file, so it may import torch at the top.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from topwork.errors import UsageError
from topwork.models.head import ACTIVATIONS, Changes, HeadSpec, Power, parse_head
from topwork.settings import Pooling

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "hardswish": nn.Hardswish,
}  # fmt: skip
assert set(_ACTIVATIONS) == set(ACTIVATIONS), "one module for each activation that a head may name"


class CosineHead(nn.Module):
    """Logits = scale · cos(features, class direction), independent of the norm of the rows (arXiv 1804.09170)."""

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
    """Number of logits: one for two classes with a sigmoid, otherwise one per class."""
    return 1 if outputs == "binary" else n_classes


def powered(columns: torch.Tensor, power: Power, least: float = 0.0) -> torch.Tensor:
    """:func:`topwork.models.head.powered` for joined (B, D) features.

    Args:
        least: below it the square root counts as constant, since its gradient at zero is infinite.
    """
    if power == "sqrt":
        size = torch.abs(columns)
        return torch.sign(columns) * torch.sqrt(size.clamp_min(least) if least else size)
    if power == "unit":
        length = torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-6)
        columns = columns * (columns.shape[1] ** 0.5 / length)
    return columns


# ---- replacing a classifier

OWN_HEAD = "topwork_head"  # the head's name if it cannot replace timm's last layer


def build_classifier(
    network: nn.Module,
    head: HeadSpec | nn.Module,
    n_outputs: int,
    *,
    pooling: Pooling | None = None,
    drop_hidden: bool = False,
    n_features: int | None = None,
) -> nn.Module:
    """Puts a new head in place of the last linear layer of a timm network; everything else keeps its weights.

    In networks whose classifier has several layers (VGG) only the last one is replaced, unless asked otherwise. In
    networks with several classifiers (LeViT's two) the head reads the mean of what those would read.

    Args:
        network: changed in place and returned.
        head: a spec, or a module from (B, D) features to (B, n_outputs) logits.
        pooling: another way of pooling the last map, in timm's words.
        drop_hidden: also removes the hidden layers before the last one (VGG's two of 4,096 units).
        n_features: number of input features of the head; by default found by running the network once.

    Raises:
        UsageError: the network does not have this part.
    """
    if drop_hidden:
        _drop_hidden(network)
    if pooling is not None:
        _repool(network, pooling)
    last = dict(network.named_modules()).get(classifier_name(network))
    if isinstance(last, nn.Linear) and pooling is None and not drop_hidden:
        n_features = last.in_features
    headless(network)
    if not isinstance(head, nn.Module):
        head = make_head(head, feature_width(network) if n_features is None else n_features, n_outputs)
    replace_module(network, classifier_name(network), head)
    network.num_classes = n_outputs  # type: ignore[assignment]  # timm's own record of it
    return network


def headless(network: nn.Module) -> nn.Module:
    """Ends a network before its last linear layer: normalized images (B, 3, H, W) to features (B, D).

    Batch norms and hidden layers of timm's classifiers before that layer keep their weights.
    Distilled networks average what their two classifiers read, as they would average their logits. Networks that
    combine several classifiers in other ways give what timm calls ``pre_logits``. Changed in place and returned.
    """
    if isinstance(network, _HeadBehind):
        network.topwork_head = nn.Identity()
        return network
    layers = timm_layers(network)
    modules = dict(network.named_modules())
    if len(layers) == 1 and isinstance(modules.get(layers[0]), nn.Linear | nn.Identity | nn.Sequential | CosineHead):
        replace_module(network, layers[0], nn.Identity())
        return network
    if len(layers) == 1 or hasattr(network, "set_distilled_training"):
        for name in layers:
            replace_module(network, name, nn.Identity())
        return _put_head_behind(network, "output")
    network.reset_classifier(0)  # type: ignore[operator]
    return _put_head_behind(network, "pre_logits")


Reads = Literal["output", "pre_logits", "both"]


class _HeadBehind:
    """Marks networks whose head reads the output of timm's network instead of being inside it."""

    topwork_head: nn.Module


def _put_head_behind(network: nn.Module, reads: Reads) -> nn.Module:
    network.__class__ = _with_head_behind(type(network), reads)  # type: ignore[arg-type]
    network.topwork_head = nn.Identity()
    return network


@cache
def _with_head_behind(kind: type[nn.Module], reads: Reads) -> type[nn.Module]:
    """A subclass of a timm network whose forward pass ends in ``topwork_head``; parameters keep their names."""

    class HeadBehind(_HeadBehind, kind):  # type: ignore[misc, valid-type]
        head_reads = reads

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.topwork_head(self._features(images))
            return logits

        def _features(self, images: torch.Tensor) -> Any:
            if reads == "output":
                return super().forward(images)
            tokens = self.forward_features(images)
            if reads == "pre_logits":
                return self.forward_head(tokens, pre_logits=True)
            return torch.cat([self.fc_norm(self.pool(tokens, pool_type=one)) for one in ("token", "avg")], 1)

    HeadBehind.__name__ = kind.__name__
    return HeadBehind


def reads_output(network: nn.Module) -> bool:
    """Whether the head reads what timm's own last layers read, or the mean of it."""
    return getattr(network, "head_reads", "output") == "output"


def changed(network: nn.Module, changes: Changes) -> nn.Module:
    """A headless timm network with the changes that a backbone records."""
    if changes.drop_hidden:
        _drop_hidden(network)
    if changes.pooling:
        _repool(network, changes.pooling)
    headless(network)
    if changes.hidden:
        layers = make_head(parse_head(changes.hidden), feature_width(network), 1)
        assert isinstance(layers, nn.Sequential), "hidden layers make a sequence"
        layers[-1] = nn.Identity()
        replace_module(network, classifier_name(network), layers)
    return network


def timm_layers(network: nn.Module) -> tuple[str, ...]:
    """Dotted names of timm's last linear layers: one in most networks, two in distilled ones."""
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or "classifier"
    return (names,) if isinstance(names, str) else tuple(names)


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Dotted names of everything that turns features into logits."""
    return (OWN_HEAD,) if isinstance(network, _HeadBehind) else timm_layers(network)


def classifier_name(network: nn.Module) -> str:
    """Dotted name of the head of a timm network, or of one of ours."""
    return classifier_names(network)[0]


def feature_width(network: nn.Module) -> int:
    """Length D of the features of a headless network.

    Raises:
        UsageError: its forward pass fails.
    """
    was_training = network.training
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    try:
        with torch.inference_mode():
            return int(network.eval()(torch.zeros(1, *(cfg.get("input_size") or (3, 224, 224)))).shape[-1])
    except RuntimeError as error:
        raise UsageError(f"{type(network).__name__}: its classifier cannot be replaced: {error}") from None
    finally:
        network.train(was_training)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Sets the sub-module of a dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def set_linear(network: nn.Module, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    """Initializes the last linear layer from a fitted head: weight (C, D), bias (C,).

    With one output (two classes, sigmoid) the difference of the two rows is equivalent.
    """
    layer = network.get_submodule(classifier_name(network))
    assert isinstance(layer, nn.Linear), "only a linear head can start from a linear probe"
    if layer.out_features == 1 and len(weight) == 2:
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.asarray(weight, np.float32)))
        layer.bias.copy_(torch.from_numpy(np.asarray(bias, np.float32)))


def _drop_hidden(network: nn.Module) -> None:
    if not hasattr(network, "pre_logits"):
        raise UsageError(f"{type(network).__name__}: it has no hidden layers before its classifier.")
    network.pre_logits = nn.Identity()


def _repool(network: nn.Module, pooling: str) -> None:
    """Changes the pooling of a network; for ``both`` it then ends before the classifier."""
    kind, reset = type(network).__name__, getattr(network, "reset_classifier", None)
    if pooling in ("token", "both") and not getattr(network, "num_prefix_tokens", 0):
        raise UsageError(f"--pooling {pooling}: {kind} has no class token.")
    if pooling == "both":
        if not (hasattr(network, "pool") and hasattr(network, "fc_norm")):
            raise UsageError(f"--pooling both: {kind} does not support it.")
        replace_module(network, classifier_name(network), nn.Identity())
        _put_head_behind(network, "both")
        return
    if getattr(network, "global_pool", None) == pooling:
        return
    if reset is None:
        raise UsageError(f"--pooling {pooling}: {kind} does not support it.")
    try:
        reset(1, global_pool=pooling)
        network.get_submodule(timm_layers(network)[-1])  # RepViT loses its second classifier
    except (TypeError, AssertionError, ValueError, RuntimeError, AttributeError) as error:
        what = f" ({error})" if str(error) else ""
        raise UsageError(f"--pooling {pooling}: {kind} does not support it{what}.") from None


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
        pooling = nn.MaxPool2d(2, ceil_mode=padding > 0)  # a single position stays one
        return nn.Sequential(convolution, nn.ReLU(), nn.BatchNorm2d(after), pooling)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 224, 224) to (B, n_outputs) logits."""
        logits: torch.Tensor = self.classifier(self.flatten(self.blocks(images)))
        return logits


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """(all, trainable) parameters."""
    sizes = [(value.numel(), value.requires_grad) for value in network.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, moves in sizes if moves)
