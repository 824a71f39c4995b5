"""Batches for training: pixels decoded once, then augmented with one random stream per sample.

In: images and labels. Out: for any rows and epoch, uint8 pixels and random augmentation parameters, applied on the
training device (:func:`to_device`). The augmentation of a sample depends only on (seed, epoch, key of the sample): not
on workers, batch size, other samples, or interruptions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from topwork.data.augment import Draw, apply, pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.shards import room_for
from topwork.data.transforms import InputSpec, Pixels, fit_to_input, resize
from topwork.errors import ImageError, changed_since_scan

AHEAD = 4  # batches prepared while the network is busy


class Dataset(Protocol):
    """N samples with labels, (N,) classes or (N, C) zeros and ones.

    Attributes:
        shape: (3, H, W), the network's input.
    """

    labels: NDArray[Any]
    shape: tuple[int, int, int]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as a module that takes the output of :meth:`load`."""

    def load(self, rows: NDArray[np.int64], epoch: int | None) -> NDArray[Any] | Views:
        """Some rows for training in an epoch, or for evaluation if None; pass them to :func:`to_device`."""


class ImageDataset:
    """Decoded images with augmentation.

    Args:
        pixels: (N, h, w, 3) uint8 from :func:`decode_all`, at least as large as the input.
        augmentation: name of a pipeline of ``data/augment.py``.
        keys: (N,) numbers that name the samples in the random stream; the row numbers by default.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: NDArray[Any],
        spec: InputSpec,
        augmentation: str = "none",
        seed: int = 0,
        keys: NDArray[np.int64] | None = None,
    ) -> None:
        assert len(pixels) == len(labels)
        self.pixels, self.labels, self.spec = pixels, labels, spec
        self.augmentation, self.seed = pipeline(augmentation), seed
        self.keys = np.arange(len(pixels)) if keys is None else keys
        self.shape = (3, spec.height, spec.width)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with normalization in front."""
        return InputNetwork(network, self.spec)

    def load(self, rows: NDArray[np.int64], epoch: int | None) -> Pixels | Views:
        """Pixels (B, H, W, 3) uint8, with augmentation parameters in training."""
        if epoch is None or not self.augmentation.steps:
            pixels = self.pixels[rows]
            height, width = self.spec.height, self.spec.width
            if pixels.shape[1:3] == (height, width):
                return pixels
            return np.stack([resize(image, height, width, self.spec.interpolation) for image in pixels])
        streams = (stream(self.seed, epoch, int(self.keys[row])) for row in rows)
        return Views(self.pixels[rows], [self.augmentation.draw(self.spec, rng) for rng in streams], self.spec)


@dataclass(frozen=True, eq=False)
class Views:
    """Pixels of a batch and their random augmentation parameters."""

    pixels: Pixels
    draws: list[Draw]
    spec: InputSpec


def to_device(loaded: NDArray[Any] | Views, device: str) -> Tensor:
    """The output of :meth:`Dataset.load` as network input; augmentation is computed on the device."""
    if isinstance(loaded, Views):
        return apply(torch.from_numpy(loaded.pixels).to(device, non_blocking=True), loaded.draws, loaded.spec)
    return torch.from_numpy(loaded).to(device, non_blocking=True)


class InputNetwork(nn.Module):
    """A network that takes uint8 (B, H, W, 3) and normalizes it."""

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C). The permuted view is already channels-last, the fastest layout for convolutions on CPUs."""
        logits: Tensor = self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return logits


# ---- decoding once


def decode_all(
    manifest: Manifest,
    rows: Sequence[int] | NDArray[np.int64],
    spec: InputSpec,
    *,
    margin: float = 1.0,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Decodes images and fits them to ``margin`` times the input size, once.

    Decoding takes as long as a training step on a GPU, so it is not repeated every epoch.

    Returns:
        (N, h, w, 3) uint8, in the order of ``rows``.

    Raises:
        TopworkError: an image was changed or deleted since the scan, or the disk of the cache is full.
    """
    larger = replace(spec, height=math.ceil(spec.height * margin), width=math.ceil(spec.width * margin))

    def load(row: int) -> Pixels:
        try:
            return fit_to_input(decode(manifest.read_unchanged(row), min_side=larger.min_side).pixels, larger)
        except (ImageError, OSError) as error:
            raise changed_since_scan(manifest.samples[row].path, error) from None

    result = room_for((len(rows), larger.height, larger.width, 3), np.uint8)
    for n_done, pixels in enumerate(in_order(load, [int(row) for row in rows], n_threads)):
        result[n_done] = pixels
        if on_progress:
            on_progress(n_done + 1, len(rows))
    return result


# ---- batches


def epoch_order(n: int, seed: int, epoch: int, weights: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """The order of the samples in an epoch; with (N,) weights, N draws with replacement (``--balance sampler``)."""
    rng = np.random.default_rng([seed, epoch, n])
    return rng.permutation(n) if weights is None else rng.choice(n, n, p=weights / weights.sum())


def batches_of(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Batches of nearly equal size, none larger than asked.

    Equal, because a last batch of one image breaks batch norm, and a small one has the same weight as a full one.
    """
    return [np.asarray(part) for part in np.array_split(order, max(1, math.ceil(len(order) / batch_size)))]


def ahead(
    load: Callable[[NDArray[np.int64]], Any], batches: Sequence[NDArray[np.int64]]
) -> Generator[tuple[NDArray[np.int64], Any]]:
    """Yields (rows, load(rows)) in order, loading a few batches ahead."""
    with closing(in_order(load, batches, 1, AHEAD + 1)) as loaded:
        yield from zip(batches, loaded, strict=True)
