"""Append-only Parquet shards in a folder: how facts and features outlive a process, killed or not.

A shard is written under a temporary name, flushed to the disk, and renamed: at its final name it is always whole.
Several processes may append at once. A shard that cannot be read is left out and reported by name, never repaired.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from topwork.errors import TopworkError
from topwork.files import atomic_file


def append_shard(folder: Path, table: pa.Table) -> Path:
    """Writes one shard and returns its path.

    Raises:
        TopworkError: the folder cannot be written (full disk, permissions), with the reason.
    """
    final = folder / f"shard-{uuid.uuid4().hex}.parquet"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(final) as partial:
            pq.write_table(table, partial, compression="none", use_dictionary=False)
    except OSError as error:
        reason = error.strerror or error
        raise TopworkError(f"{folder}: cannot be written: {reason}. Set TOPWORK_CACHE elsewhere.") from None
    return final


def shard_files(folder: Path) -> list[Path]:
    """The whole shards of a folder, in a fixed order."""
    return sorted(folder.glob("shard-*.parquet")) if folder.is_dir() else []


def read_shards(folder: Path, columns: list[str]) -> Iterator[tuple[Path, pa.Table]]:
    """Every readable shard with the columns asked for."""
    for path in shard_files(folder):
        try:
            yield path, read_parquet(path, columns)
        except (OSError, pa.ArrowException, KeyError):
            continue  # damaged or from another writer: what it held is computed again


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file with the columns asked for, or all.

    Not by ``pq.read_table``, which first imports pyarrow's data sets, a quarter of a second, and takes folder names such as
    ``a=b`` for columns.

    Raises:
        OSError, pa.ArrowException: it cannot be read.
        KeyError: it has no such column.
    """
    with pq.ParquetFile(path) as file:
        missing = set(columns or ()) - set(file.schema_arrow.names)
        if missing:
            raise KeyError(min(missing))
        return file.read(columns)
