"""Embedding: computes the features of each image once per fingerprint.

In: a backbone and a manifest, or a scan in progress that passes its images to :class:`Embedder`. Out:
:class:`Features`, read from the store block by block.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.data.loader import FactsStore, Loader, load_images
from topwork.data.manifest import Manifest
from topwork.data.remote import n_threads_for
from topwork.data.samples import Entry
from topwork.data.shards import Shards, matrix_column, matrix_of, room_for
from topwork.data.transforms import Pixels
from topwork.errors import TopworkError, changed_since_scan
from topwork.features.engine import BATCH, BLOCKS, LARGEST, Batch, Engine, fingerprint, load_engine, with_resizer
from topwork.models.backbone import Backbone
from topwork.settings import cache_folder
from topwork.text import Described, escape

ROWS_PER_SHARD = 1024


class FeatureStore(Shards):
    """The stored features of one backbone, input spec and engine: Parquet shards, keyed by the content of the image.

    Only the keys are in memory; blocks are read on demand. A killed run loses at most one unfinished shard.

    Args:
        cache: the cache folder.
        fingerprint: see :func:`topwork.features.engine.fingerprint`.
    """

    def __init__(self, cache: Path, fingerprint: str) -> None:
        super().__init__(cache / "features" / fingerprint)

    def put(self, hashes: Sequence[str], blocks: dict[str, NDArray[np.float16]]) -> None:
        """Writes one shard: ``blocks`` maps each name in BLOCKS to (n, D) float16."""
        self.append(hashes, {name: matrix_column(blocks[name]) for name in BLOCKS})

    def load(self, hashes: Sequence[str], block: str) -> NDArray[np.float16]:
        """The (N, D) float16 features of these contents, in order; large arrays are files (:mod:`topwork.data.shards`).

        Raises:
            KeyError: a content hash that is not in the store.
            TopworkError: a shard was deleted or damaged since the store was opened.
        """
        result, n_read = np.empty((0, 0), np.float16), 0
        for positions, table, rows in self.read(hashes, [block]):
            values = matrix_of(table[block])[rows]
            if not n_read:
                result = room_for((len(hashes), values.shape[1]), values.dtype)
            result[positions] = values
            n_read += len(positions)
        if n_read < len(hashes):
            raise KeyError(next(content_hash for content_hash in hashes if content_hash not in self))
        return result


@dataclass(frozen=True, repr=False)
class Features(Described):
    """Features of N images, in the order of ``hashes``; blocks are read from the store on demand."""

    hashes: tuple[str, ...]
    store: FeatureStore = field(repr=False)

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        shape = self.block("last", [0]).shape if self.hashes else (0, 0)
        return {"Images": f"{len(self.hashes):,}", "Features": f"{shape[1]:,}", "Store": self.store.folder}

    def block(self, name: str = "last", rows: Sequence[int] | NDArray[np.int64] | None = None) -> NDArray[np.float16]:
        """(N, D) float16: ``last`` or ``stages``, of all images or of some rows."""
        chosen = self.hashes if rows is None else [self.hashes[row] for row in rows]
        return self.store.load(chosen, name)

    def blocks(
        self, names: Sequence[str], rows: Sequence[int] | NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[np.float16]]:
        """Several blocks by name, for a head: ``head.logits(features.blocks(head.transform.blocks))``."""
        return {name: self.block(name, rows) for name in names}

    def __len__(self) -> int:
        return len(self.hashes)


class Embedder:
    """Collects images, runs them through the engine in batches, and stores the features in shards.

    Attributes:
        backbone: the given one, with the resizer for the precision of the engine.
        load: the function that reads and decodes images, in threads or on a cluster.
    """

    def __init__(
        self,
        backbone: Backbone,
        engine: Engine | None = None,
        store: FeatureStore | None = None,
        load: Loader = load_images,
    ) -> None:
        self.load = load
        self.engine = load_engine(backbone) if engine is None else engine
        self.backbone = with_resizer(backbone, self.engine)
        self.spec = self.backbone.spec
        # an empty store is falsy
        self.store = FeatureStore(cache_folder(), fingerprint(self.backbone, self.engine)) if store is None else store
        self.n_embedded = 0
        self.engine_seconds = 0.0
        self._taken: set[str] = set()
        self._images: list[tuple[str, Pixels]] = []
        self._rows: list[tuple[Sequence[str], Batch]] = []

    def wants(self, content_hash: str) -> bool:
        """Whether these contents have no features yet."""
        return content_hash not in self.store and content_hash not in self._taken

    def take(self, content_hash: str, pixels: Pixels) -> None:
        """Adds one image to the next batch; runs full batches and writes full shards."""
        if not self.wants(content_hash):
            return
        if not self._taken:
            self.store.check_writable()  # before the first batch is computed
        self._taken.add(content_hash)
        self._images.append((content_hash, pixels))
        if len(self._images) == BATCH:
            self._run()

    def keep(self, hashes: Sequence[str], batch: Batch, seconds: float) -> None:
        """Adds computed features, and writes full shards."""
        name = self.backbone.name
        if not all(np.isfinite(values).all() for values in batch.values()):
            raise TopworkError(f"{name}: the network produced features that are not finite; try --precision f32")
        if (np.abs(batch["last"]) >= LARGEST).any():  # they were clipped: exports of the model would answer differently
            raise TopworkError(
                f"{name}: the network produced features above {LARGEST:,}, which is too large. Its weights may be random, "
                "damaged or from training that diverged; use other weights or a lower --lr."
            )
        self.engine_seconds += seconds
        self.n_embedded += len(hashes)
        self._taken.update(hashes)
        self._rows.append((hashes, batch))
        if sum(len(keys) for keys, _ in self._rows) >= ROWS_PER_SHARD:
            self._write()

    def flush(self) -> None:
        """Embeds and writes the rest; call it at the end, and when interrupted."""
        self._run()
        self._write()

    def _run(self) -> None:
        """Always runs a whole batch: other batch sizes would change the last bits of the features."""
        if not self._images:
            return
        hashes, images = [key for key, _ in self._images], np.zeros((BATCH, *self._images[0][1].shape), np.uint8)
        for place, (_, pixels) in enumerate(self._images):
            images[place] = pixels
        self._images = []
        started = time.perf_counter()
        batch = {name: values[: len(hashes)] for name, values in self.engine.run(images).items()}
        self.keep(hashes, batch, time.perf_counter() - started)

    def _write(self) -> None:
        if self._rows:
            blocks = {name: np.concatenate([batch[name] for _, batch in self._rows]) for name in BLOCKS}
            self.store.put([key for keys, _ in self._rows for key in keys], blocks)
            self._rows = []


def embed_changed(embedder: Embedder, hashes: Sequence[str], pixels: Iterable[Pixels], change: str) -> Features:
    """Features of N changed images (H, W, 3), kept in the store by content hash and name of the change."""
    keys = tuple(hashlib.sha256(f"{content_hash} {change}".encode()).hexdigest() for content_hash in hashes)
    for key, image in zip(keys, pixels, strict=True):
        embedder.take(key, image)
    embedder.flush()
    return Features(keys, embedder.store)


def embed(
    backbone: Backbone,
    manifest: Manifest,
    *,
    embedder: Embedder | None = None,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of every sample of a manifest, in order; stored features are not computed again.

    Raises:
        TopworkError: an image was changed or deleted since the manifest was made.
    """
    embedder = Embedder(backbone) if embedder is None else embedder
    new: dict[str, Entry] = {}
    for sample in manifest.samples:
        if embedder.wants(sample.content_hash):
            new.setdefault(sample.content_hash, Entry(sample.path, sample.label))
    facts = FactsStore(cache_folder())
    n_threads = n_threads_for(manifest.root, [entry.path for entry in new.values()], n_threads)
    try:
        loaded_images = embedder.load(
            list(new.values()), lambda entry: manifest.read_path(entry.path), facts, embedder, n_threads
        )
        for n_done, loaded in enumerate(loaded_images, start=1):
            if loaded.reason is not None or loaded.content_hash not in new:
                manifest.check_is_there()
                reason = loaded.reason or "it has changed"
                raise changed_since_scan(escape(str(manifest.root / loaded.entry.path)), reason)
            if loaded.pixels is not None:
                embedder.take(loaded.content_hash, loaded.pixels)
            if on_progress:
                on_progress(n_done, len(new))
    finally:
        embedder.flush()
    return Features(tuple(sample.content_hash for sample in manifest.samples), embedder.store)
