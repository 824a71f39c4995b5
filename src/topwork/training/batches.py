"""Batches for training: pixels decoded once, then augmented by a random stream of their own.

In: images and labels. Out: for any rows and epoch, the input of the network, uint8 (B, H, W, 3). What happens to a
sample depends on (seed, epoch, key of the sample) only: not on workers, on batch size, on other samples, or on where a
run was interrupted. The training loop asks for nothing but what :class:`Dataset` says.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from topwork.data.augment import pipeline, stream
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.transforms import InputSpec, Pixels, fit_to_input, resize
from topwork.errors import ImageError, TopworkError, changed_since_scan
from topwork.settings import cache_folder

IN_MEMORY_BYTES = 1_000_000_000  # more decoded pixels than this are kept in a file
AHEAD = 4  # batches prepared while the network is busy
MAX_LOADING_THREADS = 8


class Dataset(Protocol):
    """N samples with labels, (N,) classes or (N, C) zeros and ones.

    Attributes:
        shape: (3, H, W) of the images that the network was made for.
    """

    labels: NDArray[Any]
    shape: tuple[int, int, int]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as a module that takes what :meth:`load` gives."""

    def load(self, rows: NDArray[np.int64], epoch: int | None) -> NDArray[Any]:
        """Inputs of some rows as training sees them in an epoch; as judging sees them for None."""


class ImageDataset:
    """Decoded images that are cropped, turned and colored on the way to the network.

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
        self._whole = replace(spec, fit="squash")  # what decode_all made has the input's shape already
        self.keys = np.arange(len(pixels)) if keys is None else keys
        self.shape = (3, spec.height, spec.width)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with normalization in front."""
        return InputNetwork(network, self.spec)

    def load(self, rows: NDArray[np.int64], epoch: int | None) -> Pixels:
        """(B, H, W, 3) uint8."""
        if epoch is None:
            return np.stack([self._fitted(self.pixels[row]) for row in rows])
        return np.stack([self.view(row, epoch) for row in rows])

    def view(self, row: int, epoch: int) -> Pixels:
        """One augmented image (H, W, 3)."""
        rng = stream(self.seed, epoch, int(self.keys[row]))
        return self.augmentation.view(self.pixels[row], self._whole, rng)

    def _fitted(self, pixels: Pixels) -> Pixels:
        return resize(pixels, self.spec.height, self.spec.width, self.spec.interpolation)


class InputNetwork(nn.Module):
    """A network that takes uint8 (B, H, W, 3), normalization inside."""

    def __init__(self, network: nn.Module, spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (spec.mean, spec.std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C). The permuted view is channels-last as it is, which convolutions on CPUs like best."""
        logits: Tensor = self.network((images.permute(0, 3, 1, 2).float() - self.mean) / self.std)
        return logits


# ---- decoding once


def decode_all(
    read: Callable[[int], bytes],
    rows: Sequence[int] | NDArray[np.int64],
    spec: InputSpec,
    *,
    margin: float = 1.0,
    name: Callable[[int], str] = str,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """Decodes images and fits them to ``margin`` times the input size, once.

    Decoding takes as long as a training step on a GPU and more than the augmentation, so it is not done every epoch.
    Up to 1 GB stays in memory; more goes to a file in the cache folder that vanishes with the process.

    Args:
        read: bytes of the image of a row.
        name: what to call the image of a row in an error.

    Returns:
        (N, h, w, 3) uint8, in the order of ``rows``.

    Raises:
        TopworkError: an image changed or vanished since it was scanned.
    """
    larger = replace(spec, height=math.ceil(spec.height * margin), width=math.ceil(spec.width * margin))

    def load(row: int) -> Pixels:
        try:
            return fit_to_input(decode(read(row), min_side=larger.min_side).pixels, larger)
        except (ImageError, OSError) as error:
            raise changed_since_scan(name(row), error) from None

    shape = (len(rows), larger.height, larger.width, 3)
    result = np.empty(shape, np.uint8) if math.prod(shape) <= IN_MEMORY_BYTES else in_file(shape)
    for n_done, pixels in enumerate(in_order(load, [int(row) for row in rows], n_threads)):
        result[n_done] = pixels
        if on_progress:
            on_progress(n_done + 1, len(rows))
    return result


def in_file(shape: tuple[int, ...]) -> Pixels:
    """An array in a temporary file of the cache folder, gone when the process ends, however it ends.

    Raises:
        TopworkError: no room for it.
    """
    folder: Path = cache_folder()
    n_bytes = math.prod(shape)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(file, "fileno"):
                _reserve(file.fileno(), n_bytes)
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)
    except OSError as error:
        raise TopworkError(
            f"{folder}: no room for {n_bytes / 1e9:.1f} GB of prepared images: {error.strerror or error}. "
            "Set TOPWORK_CACHE to a folder on a larger disk."
        ) from None


def _reserve(descriptor: int, n_bytes: int) -> None:
    """Takes the disk space now: a full disk must show here and not as a crash while pixels are written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.truncate(descriptor, n_bytes)


# ---- batches


def loading_threads() -> int:
    """One beside a network on the CPU, which takes all cores; beside a GPU up to eight, as the cores have no other work.

    One prepares 300 to 1,300 images a second here, a GPU trains on thousands.
    """
    if not torch.cuda.is_available():
        return 1
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes that share this machine's cores
    return max(1, min(MAX_LOADING_THREADS, (os.cpu_count() or 1) // n_here))


def epoch_order(n: int, seed: int, epoch: int, weights: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
    """The order of the samples in an epoch; with (N,) weights as many draws with replacement (``--balance sampler``)."""
    rng = np.random.default_rng([seed, epoch, n])
    return rng.permutation(n) if weights is None else rng.choice(n, n, p=weights / weights.sum())


def batches_of(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Batches of nearly equal size, none larger than asked.

    Equal rather than full with a rest: a last batch of one image breaks batch norm, and a small one has as much say in
    the step as a full one.
    """
    return [np.asarray(part) for part in np.array_split(order, max(1, math.ceil(len(order) / batch_size)))]


def ahead(
    load: Callable[[NDArray[np.int64]], Any], batches: Sequence[NDArray[np.int64]]
) -> Generator[tuple[NDArray[np.int64], Any]]:
    """(rows, load(rows)) in order, a few batches ahead."""
    n_threads = loading_threads()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="batches") as pool:
        pending: deque[tuple[NDArray[np.int64], Future[Any]]] = deque()
        try:
            for rows in batches:
                pending.append((rows, pool.submit(load, rows)))
                if len(pending) > max(AHEAD, n_threads + 1):
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()
