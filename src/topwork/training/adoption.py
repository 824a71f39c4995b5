"""From trained weights to a backbone and a head as the rest of topwork knows them.

In: the backbone that training started from, the trained state, what kind of head it has. Out: a :class:`Backbone` with
the tuned weights and a :class:`LinearHead`. Every head ends in one row a class: hidden layers before it become part of
the network, one sigmoid for two classes becomes two rows whose softmax says the same, and cosine logits are linear ones
on features of unit length. So engine, store, model folder, export and server need to know nothing of tuning.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from topwork.errors import TopworkError, UsageError
from topwork.models.backbone import Backbone, adopt_weights
from topwork.models.head import FeatureTransform, Floats, HeadSpec, LinearHead, Power
from topwork.training.folding import State


def adopt(
    backbone: Backbone, state: State, head: HeadSpec, n_classes: int, probe: LinearHead | None = None
) -> tuple[Backbone, LinearHead]:
    """The tuned network as a backbone of its own, and its last layer as a head.

    Args:
        probe: what an extended head started from; it still reads the same columns.

    Raises:
        TopworkError: the weights are not those of such a network.
        UsageError: the last layer of this network is none that topwork knows.
    """
    classifier = replace(backbone, changes=replace(backbone.changes, hidden=None)).classifier_name
    is_sequence = bool(head.hidden or head.dropout)
    last = f"{classifier}.{head.last_index}." if is_sequence else f"{classifier}."
    rows = {key.removeprefix(last): value for key, value in state.items() if key.startswith(last)}
    if "weight" not in rows or rows["weight"].ndim != 2:
        raise UsageError(f"--backbone {backbone.name}: its classifier is not one linear layer; topwork cannot tune it.")
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
        raise TopworkError(f"{backbone.name}: the tuned weights do not fit the network: {missing or unexpected}")
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
