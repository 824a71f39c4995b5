"""Features on disk, keyed by the content of the image and the fingerprint of everything else.

One folder per fingerprint, Parquet shards inside. Only the keys are in memory; blocks of features are read on demand. A
killed run loses at most one unfinished shard. Shards are verified when opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.data.shards import Shards, matrix_column, matrix_of, room_for

ROWS_PER_SHARD = 1024
BLOCKS = ("last", "stages")


class FeatureStore(Shards):
    """The stored features of one backbone, input spec and engine.

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
        for positions, table in self.read(hashes, [block]):
            values = matrix_of(table[block])
            if not n_read:
                result = room_for((len(hashes), values.shape[1]), values.dtype)
            result[positions] = values
            n_read += len(positions)
        if n_read < len(hashes):
            raise KeyError(next(content_hash for content_hash in hashes if content_hash not in self))
        return result
