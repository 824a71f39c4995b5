"""The probe's extended head inside the network, so that tuning starts from it and keeps what it sees.

In: a timm network and an extended :class:`LinearHead` (square roots, maps of earlier stages). Out: the same network with
that head as its classifier: before the first step it answers what the probe answers. The stages' maps are pooled as
``features/engine.py`` pools them, and flow back into the stages. Where a probe gains from earlier stages, a tuned network
with a plain head has to learn again what it threw away (docs/lab-log.md, 2026-11-26).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from topwork.features.engine import feature_stages, pool_map
from topwork.models.backbone import Backbone
from topwork.models.head import LinearHead
from topwork.models.modules import classifier_name, powered, replace_module

LEAST_ROOT = 1e-6  # below it the square root is taken as flat: its slope at zero is infinite


class ExtendedHead(nn.Module):
    """Pooled features and the maps of the stages it watches to logits: (B, D) to (B, C), as ``LinearHead.logits``."""

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
        channels_last = getattr(network, "output_fmt", "NCHW") == "NHWC"
        for name in stages:
            network.get_submodule(name).register_forward_hook(_Keep(self.pooled, name, channels_last))

    def forward(self, last: Tensor) -> Tensor:
        """Called by the network, whose stages have run by then."""
        values = {"last": last.float()}
        if "stages" in self.blocks:
            values["stages"] = torch.cat([self.pooled[name] for name in self.watched], 1)
        self.pooled.clear()  # or the graph of this batch would live until the next
        joined = torch.cat([values[name] for name in self.blocks], 1)
        columns = (powered(joined, self.power, LEAST_ROOT) - self.mean) / self.scale
        with torch.autocast(columns.device.type, enabled=False):
            logits: Tensor = nn.functional.linear(columns, self.weight, self.bias)
        return logits


class _Keep:
    """A hook that is copied with what it writes to, as a closure would not be."""

    def __init__(self, pooled: dict[str, Tensor], name: str, channels_last: bool) -> None:
        self._pooled, self._name, self._channels_last = pooled, name, channels_last

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._pooled[self._name] = pool_map(output.float(), self._channels_last)


def put_extended(network: nn.Module, backbone: Backbone, head: LinearHead) -> nn.Module:
    """Puts an extended head in place of the classifier of a timm network, which is changed in place and returned."""
    module = ExtendedHead(head)
    replace_module(network, classifier_name(network), module)
    if "stages" in head.transform.blocks:
        module.watch(network, feature_stages(backbone))
    return network
