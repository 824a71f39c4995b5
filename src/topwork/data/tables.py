"""Data sets described by a table: CSV, TSV, or Parquet, also Parquet that holds the images themselves.

In: a file and the user's :class:`Rules`. Out: a :class:`Listing`. A table has a row for each image with its path (or, in
Parquet, its bytes), its label, and optionally split, group and domain. Paths are the user's own and may be absolute.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.data import layouts
from topwork.data.samples import LABEL_SEPARATOR, Entry, Listing, Reject, Rules
from topwork.errors import ImageError, UsageError
from topwork.files import error_reason
from topwork.text import escape, first_names, natural_key

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "path": ("path", "file_name", "filename", "filepath", "file", "image_path", "image_name", "image"),
    "label": ("label", "labels", "class", "class_name", "category"),
    "split": ("split", "part"),
    "group": ("group",),
    "domain": ("domain",),
}
Row = dict[str, str | None]


def list_table(path: Path, rules: Rules) -> Listing:
    """The images that a table names.

    Raises:
        UsageError: unreadable, or without the columns it needs.
    """
    if path.suffix.lower() == ".parquet":
        if holds_images(path):
            return rows_listing(path, "table", _embedded_rows(path, rules), rules, [])
        rows = _read_parquet(path, rules)
    else:
        rows = _read_csv(path, rules)
    root = Path(rules.root) if rules.root else path.parent
    return rows_listing(root, "table", (row | {"path": _as_written(root, row.get("path"))} for row in rows), rules, [])


def _as_written(root: Path, name: str | None) -> str | None:
    """A path as this system spells it: one spelling a file, and that of Windows or with blanks where nothing else is."""
    if name is None:
        return None
    absolute = "/" if name.startswith("/") else ""
    name = absolute + "/".join(piece for piece in name.split("/") if piece not in ("", ".")) or name
    if ("\\" in name or name != name.strip()) and not os.path.lexists(root / name):
        return name.strip().replace("\\", "/")
    return name


def rows_listing(root: Path, layout: str, rows: Iterable[Row], rules: Rules, rejects: list[Reject]) -> Listing:
    """A listing from rows with ``path``, ``label`` and so on; rows without either, and repeated rows, are named."""
    take = layouts.label_taker(rules.label_regex) if rules.label_regex is not None else None
    entries: dict[str, Entry] = {}
    for row in rows:
        name = row.get("path") or ""
        label = (take(name) if take else row.get("label")) or ""
        if rules.multi_label:
            label = layouts.join_labels(label.split(LABEL_SEPARATOR))
        if not name or not (label or (rules.multi_label and take is None)):
            missing = "the name does not match --label-regex" if take else "no label"
            rejects.append(Reject(name or "(row without a path)", missing if name else "no path"))
        elif name not in entries:
            part = layouts.part_named(row.get("split"), f"the row of {name}")
            entries[name] = Entry(name, label, part, row.get("group"), row.get("domain"))
        elif rules.multi_label:
            both = layouts.join_labels([entries[name].label, *label.split(LABEL_SEPARATOR)])
            entries[name] = Entry(name, _flat(both), *_rest(entries[name]))
        else:
            same = entries[name].label == label
            reason = "listed twice" if same else f"listed twice, also as {escape(entries[name].label)}"
            rejects.append(Reject(name, reason))
    in_order = sorted(entries.values(), key=lambda entry: natural_key(entry.path))
    listing = layouts.make_listing(root, layout, in_order, set(), rejects, [])
    # A column was taken as it was read; everything else is a regular expression on the path.
    if rules.group_by is not None and entries and all(entry.group is None for entry in in_order):
        listing = layouts.with_groups(listing, rules.group_by)
    if rules.domain_by is not None and entries:
        listing = layouts.with_domains(listing, rules.domain_by)
    return listing


def _flat(text: str) -> str:
    return layouts.join_labels(text.split(LABEL_SEPARATOR))


def _rest(entry: Entry) -> tuple[str | None, str | None, str | None]:
    return entry.part, entry.group, entry.domain


# ---- text


def _read_csv(path: Path, rules: Rules) -> Iterator[Row]:
    try:
        with open(path, encoding=_encoding(path), errors="surrogateescape", newline="") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=False)
            columns = [name.strip().lower() for name in next(reader, [])]
            used = _used_columns(columns, path, rules)
            for cells in reader:
                row = dict(zip(columns, cells, strict=False))
                if any(cells):
                    yield {key: _cell(key, row.get(column)) for key, column in used.items()}
    except (OSError, csv.Error, UnicodeError) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read as CSV: {error_reason(error)}") from None


def _encoding(path: Path) -> str:
    """UTF-8, with or without its mark, unless the file starts with the mark of UTF-16, as Excel's Unicode text does."""
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _cell(key: str, value: str | None) -> str | None:
    """Text without the blanks around it, which only in a path may be meant."""
    if value is None:
        return None
    return (value if key == "path" else value.strip()) or None


def _used_columns(columns: list[str], path: Path, rules: Rules, *, needs_path: bool = True) -> dict[str, str]:
    """The column for each thing a row may say.

    Raises:
        UsageError: no path or label.
    """
    used = {}
    for key, names in COLUMNS.items():
        found = next((name for name in names if name in columns), None)
        if found is not None:
            used[key] = found
    if rules.group_by is not None:
        wanted = rules.group_by.strip().lower()
        used.pop("group", None)
        if wanted in columns:
            used["group"] = wanted
    needed = [*(["path"] if needs_path else []), *([] if rules.label_regex else ["label"])]
    missing = [name for name in needed if name not in used]
    if missing:
        raise UsageError(
            f"{escape(str(path))}: no column {' and no column '.join(missing)}; found: {first_names(columns) or 'none'}. "
            "The table needs the columns path and label, and may have split, group and domain."
        )
    return used


# ---- Parquet


def _read_parquet(path: Path, rules: Rules) -> Iterator[Row]:
    table = _lower(_parquet(path, None))
    used = _used_columns(table.column_names, path, rules)
    yield from table_rows(table, used, class_names_of(table.schema))


def holds_images(path: Path) -> bool:
    """Whether a Parquet file has a column ``image`` with the bytes of image files."""
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
        inner = (
            field.type.field("bytes").type if pa.types.is_struct(field.type) and _has_bytes(field.type) else field.type
        )
        if (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)) and field.name.lower() in (
            "image",
            "img",
            "jpg",
        ):
            return str(field.name)
    return None


def _has_bytes(kind: Any) -> bool:
    return any(kind.field(number).name == "bytes" for number in range(kind.num_fields))


def class_names_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names by column, as Hugging Face datasets keeps them in the schema; {} where there are none."""
    import json

    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        return {
            name: list(map(str, kind["names"])) for name, kind in features.items() if kind.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def table_rows(table: pa.Table, used: Mapping[str, str], class_names: Mapping[str, list[str]]) -> Iterator[Row]:
    """Rows of an Arrow table as text; class numbers become names where the names are known."""
    for batch in table.select(list(dict.fromkeys(used.values()))).to_batches():
        for row in batch.to_pylist():
            yield {key: _text(row[column], class_names.get(column)) for key, column in used.items()}


def _text(value: Any, names: list[str] | None) -> str | None:
    if value is None:
        return None
    if isinstance(value, list):
        return layouts.join_labels(text for item in value if (text := _text(item, names)))
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return os.fsdecode(value) if isinstance(value, bytes) else str(value)


def _embedded_rows(path: Path, rules: Rules) -> Iterator[Row]:
    """Rows of a Parquet file with images; the path of a row is its number, and its own name if it has one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    columns = [name for name in file.schema_arrow.names if name != image_column(file.schema_arrow)]
    lower = [name.lower() for name in columns]
    used = _used_columns(lower, path, rules, needs_path=False)
    used = {key: columns[lower.index(column)] for key, column in used.items()}
    names = class_names_of(file.schema_arrow)
    number = 0
    try:
        for batch in file.iter_batches(columns=list(dict.fromkeys(used.values()))):
            for row in table_rows(pa.Table.from_batches([batch]), used, names):
                own = row.get("path")
                yield row | {"path": f"{number}/{own}" if own else str(number)}
                number += 1
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


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
        raise ImageError("the table holds no bytes for this image")
    return bytes(inner)


def _parquet(path: Path, columns: list[str] | None) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=columns, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _lower(table: pa.Table) -> pa.Table:
    return table.rename_columns([name.strip().lower() for name in table.column_names])


def _unreadable(path: Path, error: Exception) -> UsageError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UsageError(f"{escape(str(path))}: cannot be read as Parquet: {reason}")
