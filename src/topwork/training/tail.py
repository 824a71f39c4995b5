"""Tuning only the upper stages, from cached activations of the frozen lower ones.

In: a network, a recipe whose first stages never move, streams of images. Out: streams of feature maps at the border,
computed once for a few augmented views of each image, and the same network running from there. The loop is the same;
an epoch costs what the upper stages cost, without decoding, augmenting, or the large maps of the lower stages.

Views are drawn once: epoch e of a sample shows view (e + offset of the sample) mod K. Maps are kept in half precision.
An extended head also reads frozen stages; what it pools of them is kept behind the map it starts from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from topwork.errors import UsageError
from topwork.models.modules import classifier_name
from topwork.training.batches import IN_MEMORY_BYTES, ImageStream, InputNetwork, ahead, in_file
from topwork.training.extended import ExtendedHead
from topwork.training.optimizer import stages_of
from topwork.training.recipe import Recipe

BATCH = 16
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Cut:
    """Where a network is cut.

    Attributes:
        border: the first stage above.
        map_shape: (C, h, w) of the map that goes up.
        pooled: (stage, columns) of the frozen stages that an extended head reads, behind the map.
    """

    border: str
    map_shape: tuple[int, ...]
    pooled: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is kept of one view: the map, or the flat map and the pooled columns."""
        if not self.pooled:
            return self.map_shape
        return (math.prod(self.map_shape) + sum(n for _, n in self.pooled),)


class TailStream:
    """Cached maps (K, N, C, h, w) of K views of N samples, or (K, N, F) with pooled columns; and labels."""

    def __init__(
        self, maps: NDArray[np.float16], labels: NDArray[Any], shape: tuple[int, int, int], cut: Cut, seed: int = 0
    ) -> None:
        self.maps, self.labels, self.shape, self.cut = maps, labels, shape, cut
        self._offset = np.random.default_rng([seed, 2]).integers(len(maps), size=len(labels))

    def load(self, rows: NDArray[np.int64], epoch: int | None) -> NDArray[np.float16]:
        """(B, C, h, w) half-precision maps, or (B, F)."""
        views = np.zeros(len(rows), np.int64) if epoch is None else (epoch + self._offset[rows]) % len(self.maps)
        return np.stack([self.maps[view, row] for view, row in zip(views, rows, strict=True)])

    def wrap(self, network: nn.Module) -> nn.Module:
        """The part of the network above the border."""
        return UpperPart(network, self.cut)


class LowerPart(nn.Module):
    """Runs a network up to a border: the children before it, in order."""

    def __init__(self, network: nn.Module, border: str, shape: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(module for _, module in split_children(network, border)[0])).eval()
        self.pooled = _pooled_of(network)
        self.pooled.clear()
        with torch.inference_mode():
            map_shape = tuple(self.parts(torch.zeros(1, *shape)).shape[1:])
        self.cut = Cut(border, map_shape, tuple((name, int(v.shape[1])) for name, v in self.pooled.items()))
        self.pooled.clear()

    def forward(self, images: Tensor) -> Tensor:
        """What is kept (B, ...) of normalized images (B, 3, H, W)."""
        maps: Tensor = self.parts(images)
        if not self.cut.pooled:
            return maps
        return torch.cat([maps.flatten(1), *(self.pooled.pop(name) for name, _ in self.cut.pooled)], 1)


class UpperPart(nn.Module):
    """Runs a network from a border on: the children after it, in order."""

    def __init__(self, network: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(module for _, module in split_children(network, cut.border)[1]))
        self.cut, self.pooled = cut, _pooled_of(network)

    def forward(self, kept: Tensor) -> Tensor:
        """Logits from what :class:`LowerPart` gives."""
        kept = kept.float()
        if self.cut.pooled:
            sizes = [math.prod(self.cut.map_shape), *(n for _, n in self.cut.pooled)]
            flat, *columns = torch.split(kept, sizes, 1)
            self.pooled.update({name: value for (name, _), value in zip(self.cut.pooled, columns, strict=True)})
            kept = flat.reshape(-1, *self.cut.map_shape)
        logits: Tensor = self.parts(kept.contiguous(memory_format=torch.channels_last))
        return logits


def _pooled_of(network: nn.Module) -> dict[str, Tensor]:
    """Where an extended head finds what its stages pooled; of no use to other heads."""
    head = network.get_submodule(classifier_name(network))
    return head.pooled if isinstance(head, ExtendedHead) else {}


def border_of(network: nn.Module, recipe: Recipe) -> str | None:
    """Name of the first stage that ever moves, if all before it rest; None where the whole network moves."""
    names = [stage.name for stage in stages_of(network) if stage.parameters]
    frozen = recipe.frozen_throughout
    n_resting = next((place for place, name in enumerate(names) if name not in frozen), len(names))
    return names[n_resting] if n_resting else None


def split_children(network: nn.Module, border: str) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """(name, module) below and above the border, in forward order.

    Right for networks that are a plain sequence of their children; :func:`tail_streams` checks it with numbers.
    """
    first = next(stage for stage in stages_of(network) if stage.name == border)
    start = first.parameters[0]
    flat: list[tuple[str, nn.Module]] = []
    for name, child in network.named_children():
        inside = first.module is not None and first.module.startswith(f"{name}.")
        flat += [(f"{name}.{key}", part) for key, part in child.named_children()] if inside else [(name, child)]
    place = next((n for n, (name, _) in enumerate(flat) if start == name or start.startswith(f"{name}.")), None)
    if place is None:
        raise UsageError(f"{type(network).__name__}: it cannot be cut before {border}; leave --tail-views away.")
    return flat[:place], flat[place:]


def tail_streams(
    network: nn.Module,
    recipe: Recipe,
    train: ImageStream,
    valid: ImageStream | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[TailStream, TailStream | None]:
    """Runs the frozen part over ``recipe.tail_views`` views of each training image and over the validation images.

    Raises:
        UsageError: nothing is frozen, or the network is not a plain sequence of its parts.
    """
    border = border_of(network, recipe)
    if border is None or recipe.tail_views is None:
        raise UsageError("--tail-views caches the stages that rest, but all stages move; use --strategy last or head.")
    lower = _checked_lower(network, border, train.shape)
    n_views, cut, shape = recipe.tail_views, lower.cut, lower.cut.shape
    run = _frozen_runner(InputNetwork(copy.deepcopy(lower), train.spec).eval(), train.shape, recipe.precision)
    maps = _room((n_views, len(train.labels), *shape))
    plain = train.augmentation.crop is None
    n_train, n_valid = len(train.labels), 0 if valid is None else len(valid.labels)

    def report(n_before: int) -> Callable[[int], None]:
        return lambda n_done: on_progress(n_before + n_done, n_views * n_train + n_valid) if on_progress else None

    for view in range(n_views):
        # without crops the first view may as well be the image itself
        _fill(maps[view], run, train, None if view == 0 and plain else view, report(view * n_train))
    tail = TailStream(maps, train.labels, train.shape, cut, recipe.seed)
    if valid is None:
        return tail, None
    valid_maps = _room((1, len(valid.labels), *shape))
    _fill(valid_maps[0], run, valid, None, report(n_views * n_train))
    return tail, TailStream(valid_maps, valid.labels, valid.shape, cut)


def _fill(
    maps: NDArray[np.float16], run: Any, stream: ImageStream, epoch: int | None, report: Callable[[int], None]
) -> None:
    rows = np.arange(len(stream.labels))
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    for chosen, images in ahead(lambda chosen: stream.load(chosen, epoch), batches):
        padded = images if len(images) == BATCH else np.concatenate([images, np.zeros_like(images, shape=(
            BATCH - len(images), *images.shape[1:]))])  # fmt: skip
        maps[chosen] = np.clip(run(padded)[: len(chosen)], -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
        report(int(chosen[-1]) + 1)


def _checked_lower(network: nn.Module, border: str, shape: Sequence[int]) -> LowerPart:
    """The lower part, which together with the upper one must give what the network gives."""
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            lower = LowerPart(network, border, shape)
            expected, found = network(images), UpperPart(network, lower.cut)(lower(images))
        same = expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3, atol=1e-4)
    except (RuntimeError, TypeError):
        same = False
    finally:
        network.train(was_training)
    if not same:
        raise UsageError(
            f"{type(network).__name__}: it is not a plain sequence of its parts, so activations cannot be cached "
            "before a stage; leave --tail-views away."
        )
    return lower


def _frozen_runner(network: nn.Module, shape: Sequence[int], precision: str) -> Any:
    """uint8 (BATCH, H, W, 3) to float32 maps, by OpenVINO on CPUs, where it is several times as fast as torch."""
    if torch.cuda.is_available():
        return _torch_runner(network.to("cuda", memory_format=torch.channels_last), "cuda", precision)  # type: ignore[call-overload]
    try:
        return _openvino_runner(network, shape, precision)
    except (ImportError, RuntimeError):
        return _torch_runner(network, "cpu", precision)


def _torch_runner(network: nn.Module, device: str, precision: str) -> Any:
    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            maps: NDArray[np.float32] = network(torch.from_numpy(images).to(device)).float().cpu().numpy()
        return maps

    return run


def _openvino_runner(network: nn.Module, shape: Sequence[int], precision: str) -> Any:
    import warnings

    from topwork.features.engine import _openvino, openvino_core

    ov = _openvino()
    size = [BATCH, shape[1], shape[2], 3]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns about shapes that are constant for us
        example = torch.zeros(size, dtype=torch.uint8)
        model = ov.convert_model(network, example_input=example, input=[(size, ov.Type.u8)])
    compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})

    def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        outputs = compiled.create_infer_request().infer({0: images})
        return np.array(outputs[0], np.float32)

    return run


def _room(shape: tuple[int, ...]) -> NDArray[np.float16]:
    if 2 * math.prod(shape) <= IN_MEMORY_BYTES:
        return np.empty(shape, np.float16)
    return in_file(shape, np.float16)
