"""Features on disk, keyed by the content of the image and the fingerprint of everything else.

One folder per fingerprint, Parquet shards inside. Only the keys are held in memory; a block of features is read when it
is asked for. A killed run loses at most the shard it was filling. A shard is verified before its features count as known.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topwork.data.shards import DAMAGE, append_shard, check_writable, forget, read_parquet, read_shards, verify_shard
from topwork.errors import TopworkError

ROWS_PER_SHARD = 1024
BLOCKS = ("last", "stages")


class FeatureStore:
    """The stored features of one backbone, input spec and engine.

    Args:
        cache: the cache folder.
        fingerprint: see :func:`topwork.features.engine.fingerprint`.
    """

    def __init__(self, cache: Path, fingerprint: str) -> None:
        self.folder = cache / "features" / fingerprint
        self._files: list[Path] = []
        self._index: dict[str, tuple[int, int]] = {}
        self._sound: set[int] = set()
        self._lock = threading.Lock()
        for path, table in read_shards(self.folder, ["content_hash"], verify=False):
            self._add(path, table["content_hash"].to_pylist())

    def __contains__(self, content_hash: str) -> bool:
        place = self._index.get(content_hash)
        return place is not None and self._is_sound(place[0])

    def __len__(self) -> int:
        return len(self._index)

    def append(self, hashes: Sequence[str], blocks: dict[str, NDArray[np.float16]]) -> None:
        """Writes one shard: ``blocks`` maps each name in BLOCKS to (n, D) float16."""
        columns = {"content_hash": pa.array(list(hashes), pa.string())}
        for name in BLOCKS:
            values = np.ascontiguousarray(blocks[name])
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        path = append_shard(self.folder, pa.table(columns))
        self._sound.add(len(self._files))
        self._add(path, list(hashes))

    def check_writable(self) -> None:
        """Raises TopworkError if nothing can be stored: to be asked before features are computed."""
        check_writable(self.folder)

    def load(self, hashes: Sequence[str], block: str) -> NDArray[np.float16]:
        """The (N, D) float16 features of these contents, in this order.

        Raises:
            TopworkError: a shard has gone or is damaged since the store was opened.
        """
        wanted: dict[int, list[tuple[int, int]]] = {}
        for position, content_hash in enumerate(hashes):
            file, row = self._index[content_hash]
            wanted.setdefault(file, []).append((position, row))
        result: NDArray[np.float16] | None = None
        for file, pairs in wanted.items():
            values = _read_block(self._files[file], block)
            if result is None:
                result = np.empty((len(hashes), values.shape[1]), values.dtype)
            positions, rows = np.array(pairs).T
            result[positions] = values[rows]
        return result if result is not None else np.empty((0, 0), np.float16)

    def _is_sound(self, number: int) -> bool:
        """Whether a shard is as it was written; if not, its contents are forgotten. Called from threads."""
        with self._lock:
            path = self._files[number]
            if number not in self._sound:
                try:
                    verify_shard(path)
                    self._sound.add(number)
                except DAMAGE as error:
                    forget(path, error)
                    self._index = {key: place for key, place in self._index.items() if place[0] != number}
            return number in self._sound

    def _add(self, path: Path, hashes: list[str]) -> None:
        self._files.append(path)
        for row, content_hash in enumerate(hashes):
            self._index.setdefault(content_hash, (len(self._files) - 1, row))


def _read_block(path: Path, block: str) -> NDArray[np.float16]:
    try:
        column = read_parquet(path, [block])[block].combine_chunks()
    except DAMAGE as error:
        forget(path, error)
        raise TopworkError(f"{path}: stored features were damaged during the run. Run the command again.") from None
    width = column.type.list_size
    return np.asarray(column.flatten()).reshape(-1, width) if width else np.empty((len(column), 0), np.float16)
