"""Images that a Parquet file holds: a column with the bytes, as Hugging Face datasets writes it.

In: a file and the user's :class:`Rules`. Out: a :class:`Listing` whose paths are row numbers, and the bytes of a row.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.data.columns import listing_of, meaning_of, rows_of
from topwork.data.named_files import Files
from topwork.data.samples import Listing, Rules
from topwork.data.tables import Table, cells_of, class_names_of
from topwork.errors import ImageError, UsageError
from topwork.text import escape

if TYPE_CHECKING:
    import pyarrow as pa


_NAMES = ("image", "images", "img", "jpg", "jpeg", "png", "picture", "photo", "image_bytes", "bytes")


def holds_images(path: Path) -> bool:
    """Whether a Parquet file has a column with the bytes of image files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    return image_column(schema) is not None


def image_column(schema: pa.Schema) -> str | None:
    """The column that holds image files: bytes, or, as Hugging Face stores them, bytes with a path."""
    import pyarrow as pa

    for field in schema:
        is_struct = pa.types.is_struct(field.type) and _has_bytes(field.type)
        inner = field.type.field("bytes").type if is_struct else field.type
        is_bytes = pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
        if is_bytes and (is_struct or field.name.lower() in _NAMES):
            return str(field.name)
    return None


def _has_bytes(kind: Any) -> bool:
    return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))


def list_embedded(path: Path, rules: Rules) -> Listing:
    """The images of a Parquet file; the path of a row is its number, and its own name if it has one.

    Raises:
        UsageError: unreadable, or without a label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns = [name for name in file.schema_arrow.names if name != image_column(file.schema_arrow)]
        table = file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    names = class_names_of(file.schema_arrow)
    return table_listing(path, "table", {name: cells_of(table[name], names.get(name)) for name in columns}, rules)


def table_listing(path: Path, layout: str, columns: dict[str, Any], rules: Rules, n_rows: int | None = None) -> Listing:
    """The listing of rows that hold their images; they are known by number, with their own name after it.

    Args:
        n_rows: needed if there are no columns.
    """
    n_rows = len(next(iter(columns.values()))) if columns else n_rows or 0
    own = next((name for name in columns if name.lower() == "path"), None)
    numbered = [f"{n}/{columns[own][n]}" if own and columns[own][n] else str(n) for n in range(n_rows)]
    others = {name: cells for name, cells in columns.items() if name != own}
    table = Table(path.name, {"path": numbered} | others)
    there = Files(exists=lambda _: True, list_all=list, read=lambda _: b"")
    rows, notes = rows_of(table, meaning_of(table, there, rules), None, rules)
    return listing_of(path, layout, rows, rules, notes)


def read_row(root: Path, path: str) -> bytes:
    """The bytes of one image of a Parquet file that holds images."""
    status = root.stat()
    return image_bytes(_row_group_of(root, (status.st_mtime_ns, status.st_size), int(path.split("/", 1)[0])))


def _row_group_of(root: Path, version: tuple[int, int], number: int) -> Any:
    starts = _starts(root, version)
    group = max(index for index, start in enumerate(starts) if start <= number)
    return _row_group(root, version, group)[number - starts[group]].as_py()


@lru_cache(maxsize=8)
def _starts(root: Path, _version: tuple[int, int]) -> list[int]:
    """Number of the first row of each row group."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(root)
    counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    return [sum(counts[:index]) for index in range(len(counts))]


@lru_cache(maxsize=3)
def _row_group(root: Path, _version: tuple[int, int], group: int) -> Any:
    """The image column of a row group; a few are kept, since neighboring rows are read one after the other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(root)
        column = image_column(file.schema_arrow)
        return file.read_row_group(group, columns=[column])[column]
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"cannot be read from the Parquet file: {str(error).splitlines()[0]}") from None


def image_bytes(value: Any) -> bytes:
    """The bytes of one cell of an image column."""
    inner = value.get("bytes") if isinstance(value, dict) else value
    if inner is None:
        # A path in foreign data is not followed: it could lead anywhere.
        raise ImageError("the table has no data for this image")
    return bytes(inner)


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{escape(str(path))}: cannot be read as Parquet: {reason}")
