"""Append-only Parquet shards in a folder: how facts and features outlive a process, killed or not.

A shard is written under a temporary name, flushed to the disk, and renamed: at its final name it is always whole. The name
holds a checksum of the file, and every page carries one, so what is read is what was written. Several processes may append at once. A shard that is damaged
or of another format is removed with a note in the log (``topwork.cache``), and what it held is computed again.

With ``TOPWORK_STORE=URL`` several machines share what they found: a shard is also written there, and what others wrote is
copied into the cache before it is read (docs/decisions/0100-urls-for-what-is-written.md).
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import mmap
import os
import tempfile
import threading
import uuid
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from topwork.data import remote
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.files import atomic_file, writing_cache
from topwork.settings import cache_folder
from topwork.text import escape

IN_MEMORY = 1 << 28  # bytes; larger arrays are files
DAMAGE = (OSError, ValueError, pa.ArrowException, KeyError)  # what reading a shard raises if it cannot be used

_LOG = logging.getLogger("topwork.cache")


class Shards:
    """Rows by content hash in the shards of a folder. Only the hashes are in memory; rows are read when asked for.

    A content is known if its whole shard is, bit for bit, what was written; a damaged shard is forgotten.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, int] = {}  # content hash to row, counted through all shards
        self._files: list[Path] = []
        self._ends: list[int] = []  # of each shard, in rows
        self._sound: dict[int, bool] = {}
        self._lock = threading.Lock()
        for path, table in read_shards(folder, ["content_hash"], verify=False):
            self._add(path, table["content_hash"].to_pylist())

    def __contains__(self, content_hash: str) -> bool:
        """Called from threads."""
        row = self._index.get(content_hash)
        return row is not None and self._is_sound(bisect.bisect_right(self._ends, row))

    def __len__(self) -> int:
        return len(self._index)

    def append(self, hashes: Sequence[str], columns: dict[str, pa.Array]) -> None:
        """Writes one shard."""
        path = append_shard(self.folder, pa.table({"content_hash": pa.array(list(hashes), pa.string()), **columns}))
        self._sound[len(self._files)] = True
        self._add(path, list(hashes))

    def check_writable(self) -> None:
        """Raises TopworkError if nothing can be stored: to be asked before the work whose results are."""
        check_writable(self.folder)

    def read(
        self, hashes: Sequence[str], columns: list[str]
    ) -> Iterator[tuple[NDArray[np.int64], pa.Table, NDArray[np.int64]]]:
        """Shard by shard: positions in ``hashes``, the shard, and their rows in it; unknown contents are left out.

        Rows are for numpy: ``Table.take`` imports pyarrow's compute functions, which takes 0.1 s.

        Raises:
            TopworkError: a shard has gone or is damaged since the folder was opened.
        """
        rows = np.array([self._index.get(content_hash, -1) for content_hash in hashes], np.int64)
        order = np.argsort(rows, kind="stable")[np.count_nonzero(rows < 0) :]
        limits = np.searchsorted(rows[order], [0, *self._ends])
        for number, (low, high) in enumerate(pairwise(limits)):
            if low == high:
                continue
            path, positions = self._files[number], order[low:high]
            try:
                yield positions, _read_again(path, tuple(columns)), rows[positions] - self._first_row(number)
            except DAMAGE as error:
                forget(path, error)
                raise TopworkError(f"{path}: was damaged during the run. Run the command again.") from None

    def _is_sound(self, number: int) -> bool:
        with self._lock:
            if number not in self._sound:
                path = self._files[number]
                try:
                    verify_shard(path)
                    self._sound[number] = True
                except DAMAGE as error:
                    forget(path, error)
                    self._sound[number] = False
                    first = self._first_row(number)
                    gone = range(first, self._ends[number])
                    self._index = {key: row for key, row in self._index.items() if row not in gone}
            return self._sound[number]

    def _first_row(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _add(self, path: Path, hashes: list[str]) -> None:
        first = self._first_row(len(self._files))
        self._files.append(path)
        self._ends.append(first + len(hashes))
        for row, content_hash in enumerate(hashes, start=first):
            self._index.setdefault(content_hash, row)


def room_for(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array to be filled. One of more than 256 MB is a file in the cache folder, whose pages the system may put away.

    The file has no name and is gone with the array, or with the process.

    Raises:
        TopworkError: the disk of the cache is full.
    """
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes <= IN_MEMORY:
        return np.empty(shape, dtype)
    folder = cache_folder()
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash when a page is written
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.truncate(n_bytes)
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def matrix_column(values: NDArray[Any]) -> pa.Array:
    """An (N, D) array as a column of lists of D numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def matrix_of(column: pa.ChunkedArray) -> NDArray[Any]:
    """The (N, D) array that :func:`matrix_column` made a column of."""
    values = column.combine_chunks()
    rows = slice(values.offset, values.offset + len(values))
    # Not flatten(), which imports pyarrow's compute functions.
    return np.asarray(values.values).reshape(-1, values.type.list_size)[rows]


def append_shard(folder: Path, table: pa.Table) -> Path:
    """Writes one shard and returns its path.

    Raises:
        TopworkError: the folder cannot be written (full disk, permissions), with the reason.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    data = sink.getvalue()
    final = folder / f"shard-{uuid.uuid4().hex}-{zlib.crc32(data):08x}.parquet"
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(final) as partial:
            partial.write_bytes(data)
    if (shared := _shared(folder)) is not None:
        remote.upload(final, f"{shared}/{final.name}")
    return final


def _shared(folder: Path) -> str | None:
    """Where ``TOPWORK_STORE`` keeps the shards of a folder of the cache; the cache holds a copy of them."""
    store = os.environ.get("TOPWORK_STORE")
    if not store or not folder.is_relative_to(cache_folder()):
        return None
    if not remote.is_url(store):
        raise UsageError(f"TOPWORK_STORE={escape(store)}: give a URL such as s3://bucket/features.")
    return f"{remote.url_of(store).rstrip('/')}/{folder.relative_to(cache_folder()).as_posix()}"


def _fetch(folder: Path) -> None:
    """Copies shards missing from the cache from the shared store; damaged ones are skipped with a note in the log."""
    shared = _shared(folder)
    if shared is None:
        return
    names = [name for name in remote.names_in(shared) if name.endswith(".parquet") and not (folder / name).exists()]
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        try:
            data = remote.read(f"{shared}/{name}")
        except ImageError as error:
            raise TopworkError(f"TOPWORK_STORE: {shared}/{name}: {error}.") from None
        if not _is_as_named(name, data):
            _LOG.warning("%s: damaged (the checksum is wrong); what it held is computed again.", f"{shared}/{name}")
            return
        with atomic_file(folder / name) as partial:
            partial.write_bytes(data)

    with ThreadPoolExecutor(remote.N_READERS) as pool:
        list(pool.map(fetch, names))


def check_writable(folder: Path) -> None:
    """Raises TopworkError if the folder cannot be written: to be asked before the work whose result goes there."""
    probe = folder / f".{uuid.uuid4().hex}.partial"
    with writing_cache(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()


def shard_files(folder: Path) -> list[Path]:
    """The whole shards of a folder, in a fixed order; those of older versions have no checksum in their name."""
    return sorted(folder.glob("shard-*-*.parquet")) if folder.is_dir() else []


def read_shards(folder: Path, columns: list[str], *, verify: bool = True) -> Iterator[tuple[Path, pa.Table]]:
    """Every sound shard with the columns asked for; without ``verify`` only the pages of these columns are checked."""
    _fetch(folder)
    for path in shard_files(folder):
        try:
            if verify:
                verify_shard(path)
            table = read_parquet(path, columns)
        except FileNotFoundError:
            continue  # another process found it damaged
        except DAMAGE as error:
            forget(path, error)
            continue
        yield path, table


def verify_shard(path: Path) -> None:
    """Raises OSError unless a shard is, bit for bit, what was written."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not _is_as_named(path.name, data):
            raise OSError("the checksum is wrong")


def _is_as_named(name: str, data: bytes | mmap.mmap) -> bool:
    """Whether the checksum in the name of a shard is that of its bytes."""
    return name.endswith(f"-{zlib.crc32(data):08x}.parquet")


def forget(path: Path, error: Exception) -> None:
    """Removes a damaged shard, as far as it can be, and says so."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    _LOG.warning("%s: damaged (%s); what it held is computed again.", escape(str(path)), escape(reason))
    with contextlib.suppress(OSError):
        path.unlink()


def row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, one after another; raises as :func:`read_parquet`."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns)


@lru_cache(maxsize=8)
def _read_again(path: Path, columns: tuple[str, ...]) -> pa.Table:
    """A shard that was read lately; the checksum in its name stands for its contents."""
    return read_parquet(path, list(columns))


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file with the columns asked for, or all.

    Not by ``pq.read_table``, which first imports pyarrow's datasets, a quarter of a second, and takes folder names such as
    ``a=b`` for columns.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        KeyError: it has no such column.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise KeyError(min(missing))
        return file.read(columns)
