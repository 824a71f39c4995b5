"""Puts the probe's head into the network to tune, and splits the tuned network into backbone and head.

:func:`put_extended` replaces the classifier of a timm network by a probe's extended head (square roots, maps of earlier
stages), so that it initially predicts the same as the probe. With a plain head, the network would have to relearn the
gain from earlier stages (docs/lab-log.md, 2026-11-26).

:func:`adopt` goes the other way: a :class:`Backbone` with the tuned weights and a :class:`LinearHead` with one row per
class. Hidden layers become part of the network, a sigmoid for two classes becomes an equivalent softmax, and cosine
logits become linear on normalized features. So engine, store, model folder, export and server need not know about
tuning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from topwork.errors import TopworkError, UsageError
from topwork.features.engine import feature_stages, map_layout, pool_map
from topwork.models.backbone import Backbone, adopt_weights
from topwork.models.head import FeatureTransform, Floats, HeadSpec, LinearHead, Power
from topwork.models.modules import classifier_name, powered, replace_module
from topwork.training.cpu import State

LEAST_ROOT = 1e-6  # below it the square root is constant: its slope at zero is infinite


class ExtendedHead(nn.Module):
    """Maps pooled features, and pooled maps of earlier stages, to logits: (B, D) to (B, C), like ``LinearHead.logits``."""

    def __init__(self, head: LinearHead) -> None:
        super().__init__()
        self.blocks, self.power = head.transform.blocks, head.transform.power
        self.weight, self.bias = (nn.Parameter(torch.from_numpy(value.copy())) for value in (head.weight, head.bias))
        self.mean: Tensor
        self.scale: Tensor
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.from_numpy(getattr(head.transform, name).copy()))
        self.watched: list[str] = []
        self.pooled: dict[str, Tensor] = {}

    def watch(self, network: nn.Module, stages: list[str]) -> None:
        """Pools the maps of these modules into ``pooled`` whenever they run."""
        self.watched = stages
        layout = map_layout(network)
        for name in stages:
            network.get_submodule(name).register_forward_hook(_Keep(self.pooled, name, layout))

    def forward(self, last: Tensor) -> Tensor:
        """Computes the logits; the stages have run before."""
        values = {"last": last.float()}
        if "stages" in self.blocks:
            values["stages"] = torch.cat([self.pooled[name] for name in self.watched], 1)
        self.pooled.clear()  # frees the graph of this batch
        joined = torch.cat([values[name] for name in self.blocks], 1)
        columns = (powered(joined, self.power, LEAST_ROOT) - self.mean) / self.scale
        with torch.autocast(columns.device.type, enabled=False):
            logits: Tensor = nn.functional.linear(columns, self.weight, self.bias)
        return logits


class _Keep:
    """A hook that is copied together with its target, unlike a closure."""

    def __init__(self, pooled: dict[str, Tensor], name: str, layout: tuple[int, bool]) -> None:
        self._pooled, self._name, self._layout = pooled, name, layout

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._pooled[self._name] = pool_map(output, *self._layout).float()


def put_extended(network: nn.Module, backbone: Backbone, head: LinearHead) -> nn.Module:
    """Replaces the classifier of a timm network by an extended head, in place; returns the network."""
    module = ExtendedHead(head)
    replace_module(network, classifier_name(network), module)
    if "stages" in head.transform.blocks:
        module.watch(network, feature_stages(backbone))
    return network


def adopt(
    backbone: Backbone, state: State, head: HeadSpec, n_classes: int, probe: LinearHead | None = None
) -> tuple[Backbone, LinearHead]:
    """The tuned network as a backbone, and its last layer as a head.

    Args:
        probe: the initial extended head, which has the same columns.

    Raises:
        TopworkError: the weights do not fit the network.
        UsageError: the last layer of this network is not supported.
    """
    classifier = replace(backbone, changes=replace(backbone.changes, hidden=None)).classifier_name
    is_sequence = bool(head.hidden or head.dropout)
    last = f"{classifier}.{head.last_index}." if is_sequence else f"{classifier}."
    rows = {key.removeprefix(last): value for key, value in state.items() if key.startswith(last)}
    if "weight" not in rows or rows["weight"].ndim != 2:
        raise UsageError(
            f"--backbone {backbone.name}: its classifier is not a single linear layer, so it cannot be fine-tuned."
        )
    if head.kind == "extended":
        assert probe is not None, "an extended head is the probe's own"
        linear = replace(probe, weight=_floats(rows["weight"].float()), bias=_floats(rows["bias"].float()))
    else:
        linear = _cosine_head(rows) if head.kind == "cosine" else _linear_head(rows)
    below = f"{classifier}." if not head.hidden else last
    rest = {key: value for key, value in state.items() if not key.startswith(below)}
    changes = replace(backbone.changes, hidden=str(head) if head.hidden else None)
    network = replace(backbone, changes=changes).skeleton()
    missing, unexpected = network.load_state_dict(rest, strict=False)
    if missing or unexpected or len(linear.weight) != n_classes:
        raise TopworkError(f"{backbone.name}: the fine-tuned weights do not fit the network: {missing or unexpected}")
    name = f"{backbone.name.removesuffix(' (tuned)')} (tuned)"
    return adopt_weights(backbone, network, changes=changes, name=name), linear


def _linear_head(rows: dict[str, Tensor]) -> LinearHead:
    weight = rows["weight"].float()
    bias = rows["bias"].float() if "bias" in rows else torch.zeros(len(weight))
    return _head(weight, bias, "none")


def _cosine_head(rows: dict[str, Tensor]) -> LinearHead:
    """Scale · cos(f, w) = (scale · w/|w| / √D) · (√D · f/|f|); ``unit`` features have length √D."""
    unit = torch.nn.functional.normalize(rows["weight"].float(), dim=1)
    weight = rows["scale"].float() * unit / unit.shape[1] ** 0.5
    return _head(weight, torch.zeros(len(weight)), "unit")


def _head(weight: Tensor, bias: Tensor, power: Power) -> LinearHead:
    if len(weight) == 1:  # sigmoid(s) = softmax(0, s)
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    n = weight.shape[1]
    transform = FeatureTransform(("last",), power, np.zeros(n, np.float32), np.ones(n, np.float32))
    return LinearHead(transform, _floats(weight), _floats(bias))


def _floats(values: Tensor) -> Floats:
    return np.ascontiguousarray(values.numpy(), np.float32)
