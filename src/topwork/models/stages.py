"""The stages of a network: slices in forward order that freezing, learning rates and multi-layer features work with.

In: a network. Out: stem, stages, neck and classifier; every parameter is in exactly one. The slices come from timm's
metadata (``group_matcher``, ``feature_info``). A transformer's equal blocks are bundled into four stages, so that the
last two stages are half of the network, as in a ConvNeXt. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

MOST_BLOCKS = 10  # networks whose blocks differ are bundled only beyond this many
BUNDLES = 4


@dataclass(frozen=True)
class Stage:
    """A slice of the network in forward order.

    Attributes:
        module: dotted name of the module whose output ends the stage; None for stem, neck and classifier.
        parameters: names of the parameters in it; every parameter belongs to exactly one stage.
    """

    name: str
    module: str | None
    parameters: tuple[str, ...]
    n_parameters: int


def find_stages(network: Any, classifier: str | Sequence[str]) -> tuple[Stage, ...]:
    """Slices a timm network (or one of ours, with its blocks under ``blocks``) into stages, the classifier last.

    Args:
        classifier: dotted name or names of the modules that turn features into logits.
    """
    heads = [classifier] if isinstance(classifier, str) else list(classifier)
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    body = [name for name in sizes if not is_inside(name, heads)]
    slices: list[tuple[str, str | None, list[str]]] = []
    groups = _groups(network, body)
    blocks = [(_block_of(names, sizes), names) for names in groups]
    blocks = _neck_apart(blocks, sizes)
    first = 1 if blocks and _is_stem(network, blocks[0]) else 0
    last = len(blocks) - 1 if len(blocks) - first > 1 and not _is_alike(blocks[-1][0], blocks[-2][0]) else len(blocks)
    if first:
        slices.append(("stem", None, blocks[0][1]))
    for bundle in _bundles(blocks[first:last], network):
        name = _bundle_name([block for block, _ in bundle])
        slices.append((name, bundle[-1][0], [name for _, names in bundle for name in names]))
    if last < len(blocks):
        slices.append(("neck", None, blocks[-1][1]))
    slices.append(("classifier", None, [name for name in sizes if is_inside(name, heads)]))
    return tuple(
        Stage(name, module, tuple(names), sum(sizes[one] for one in names))
        for name, module, names in slices
        if names or name == "classifier"
    )


def is_inside(parameter: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted name is inside one of these modules."""
    return any(parameter == prefix or parameter.startswith(prefix + ".") for prefix in prefixes)


def no_decay(network: Any) -> frozenset[str]:
    """Parameters without weight decay: timm's own list (class tokens, position embeddings) and all of one dimension."""
    listed = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    flat = (name for name, value in network.named_parameters() if value.ndim <= 1)
    return frozenset(listed) | frozenset(flat)


# ---- groups of parameters


def _groups(network: Any, names: Sequence[str]) -> list[list[str]]:
    """Parameter names of each block in forward order, the stem first and what follows the last block last."""
    from timm.models import group_parameters

    if not hasattr(network, "group_matcher"):
        numbers = _numbered_by_container(network, names)
    else:
        numbers = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    order = sorted(names, key=lambda name: numbers[name])  # stable: within a block as registered
    return [list(group) for _, group in groupby(order, key=lambda name: numbers[name])]


def _numbered_by_container(network: Any, names: Sequence[str]) -> dict[str, int]:
    """For networks without metadata: the children of the first list of blocks, and the layers before and after."""
    lists = ("blocks", "stages", "layers", "transformers", "features")
    sized = [name for name in lists if hasattr(getattr(network, name, None), "named_children")]
    container = next((name for name in sized if len(list(getattr(network, name).children())) > 1), "blocks")
    children = [key for key, _ in getattr(network, container).named_children()] if container in sized else []
    numbers, current = {}, 0
    for name in names:
        inside = re.match(rf"{container}\.([^.]+)\.", name)
        current = 1 + children.index(inside[1]) if inside else (len(children) + 1 if current else 0)
        numbers[name] = current
    return numbers


def _block_of(names: Sequence[str], sizes: dict[str, int]) -> str:
    """The module that most of these parameters lie in: their names up to the first part with a digit."""
    weights: dict[str, int] = {}
    for name in names:
        parts = name.split(".")[:-1]
        end = next((i + 1 for i, part in enumerate(parts) if re.search(r"\d", part)), len(parts))
        block = ".".join(parts[:end])
        weights[block] = weights.get(block, 0) + sizes[name]
    return max(weights, key=lambda block: weights[block])


def _neck_apart(blocks: list[tuple[str, list[str]]], sizes: dict[str, int]) -> list[tuple[str, list[str]]]:
    """Splits what follows the last block (a norm, a wider convolution) from it: timm counts it in."""
    if len(blocks) < 2 or not _is_alike(blocks[-1][0], blocks[-2][0]):
        return blocks  # nothing follows, or timm lists it separately
    block, names = blocks[-1]
    after = [name for name in names if not is_inside(name, [block])]
    if not after or len(after) == len(names) or is_inside(names[-1], [block]):
        return blocks
    inside = [name for name in names if name not in after]
    return [*blocks[:-1], (block, inside), (_block_of(after, sizes), after)]


def _is_stem(network: Any, block: tuple[str, list[str]]) -> bool:
    matcher = network.group_matcher(coarse=True) if hasattr(network, "group_matcher") else None
    if isinstance(matcher, dict) and "stem" in matcher:
        specs = matcher["stem"] if isinstance(matcher["stem"], list | tuple) else [(matcher["stem"],)]
        patterns = [spec if isinstance(spec, str) else spec[0] for spec in specs]
        return any(re.match(pattern, name) for pattern in patterns for name in block[1])
    return not re.search(r"(blocks|stages|layers?|transformers|features)\.?_?\d", block[0])


def _is_alike(one: str, other: str) -> bool:
    """Whether two modules are of the same list: their names differ in digits only, or they lie in one container."""
    plain = [re.sub(r"\d+[a-z]?$", "", name) for name in (one, other)]
    return plain[0] == plain[1]


def _bundles(blocks: list[tuple[str, list[str]]], network: Any) -> list[list[tuple[str, list[str]]]]:
    """One block each, or four bundles if all blocks have one resolution or there are very many."""
    n = len(blocks)
    info = getattr(network, "feature_info", None) or []
    reductions = {one["reduction"] for one in info if isinstance(one, dict) and "reduction" in one}
    most = BUNDLES if len(reductions) == 1 and len(info) > 1 else MOST_BLOCKS
    if n <= most:
        return [[block] for block in blocks]
    cuts = [round(i * n / BUNDLES) for i in range(BUNDLES + 1)]
    return [blocks[start:end] for start, end in pairwise(cuts)]


def _bundle_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    number = re.search(r"\d+$", names[-1])
    return f"{names[0]}-{number[0]}" if number and _is_alike(names[0], names[-1]) else f"{names[0]}-{names[-1]}"
