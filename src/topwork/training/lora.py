"""LoRA: trains small low-rank adapters instead of the weights, and merges them at the end.

In: a network. Out: the same network with adapters from ``peft`` on its linear layers and plain convolutions, except the
classifier, and the way back to a state dict without them. Weights W are frozen; B·A of rank r is trained and added to W
with scale alpha / r (Hu et al. 2021, arXiv 2106.09685, eq. 3). For a convolution, A has its kernel size and B is 1×1.
Only the adapters need memory for gradients and optimizer; model folder, exports and timm get an ordinary network.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import nn

from topwork.models.stages import Stage

State = dict[str, torch.Tensor]
SCALE = 2.0  # alpha / r, the usual value


def adapted_modules(network: nn.Module, classifier: str) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name.

    Only plain ones: grouped convolutions cannot be merged, and subclasses may pad differently.
    """
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
        if name != classifier and not name.startswith(f"{classifier}.")
    }


def n_adapter_parameters(module: nn.Module, rank: int) -> int:
    """Parameters of the adapter of one layer: A and B."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return rank * (weight[0].numel() + len(weight))


def add_adapters(network: nn.Module, stages: tuple[Stage, ...], classifier: str, rank: int, seed: int) -> None:
    """Adds adapters to a network in place; initially they change nothing, because every B is zero.

    ``network.adapted_stages`` are its stages with the adapters' parameters; :func:`topwork.training.optimizer.stages_of`
    reads them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = adapted_modules(network, classifier)
    pattern = "|".join(re.escape(name) for name in names)
    torch.manual_seed(seed)  # A is random
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=pattern), network)
    by_layer: dict[str, list[str]] = {}
    for name, _ in network.named_parameters():
        by_layer.setdefault(_original(name).rpartition(".")[0], []).append(name)
    network.adapted_stages = tuple(  # type: ignore[assignment]
        replace(
            stage,
            parameters=tuple(
                name
                for layer in dict.fromkeys(one.rpartition(".")[0] for one in stage.parameters)
                for name in by_layer[layer]
                if is_adapter(name) or _original(name) in stage.parameters
            ),
        )
        for stage in stages
    )


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return ".lora_" in name


def merged(state: State) -> State:
    """A state dict with the adapters merged into the weights, under the original names."""
    result: State = {}
    for name, value in state.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(".base_layer.weight")
        if layer != name and f"{layer}.lora_A.default.weight" in state:
            a, b = (state[f"{layer}.lora_{which}.default.weight"].float() for which in "AB")
            value = value + (SCALE * b.flatten(1) @ a.flatten(1)).view_as(value).to(value.dtype)  # noqa: PLW2901
        result[_original(name)] = value
    return result


def _original(name: str) -> str:
    """The name without adapters; for an adapter, that of a weight of its layer."""
    return re.sub(r"\.lora_[AB]\.default\.", ".", name).replace(".base_layer.", ".")
