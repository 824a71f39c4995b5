"""Image data sets that Hugging Face ``datasets`` wrote with ``save_to_disk``, read without that library.

In: the folder. Out: a :class:`Listing` whose paths are ``PART/ROW`` (or ``ROW``), and the bytes of a row. Nothing outside
the folder is opened: names in its JSON files are names of files in it, and an image that is only a path is named and
left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from topwork.data.columns import Row, listing_of
from topwork.data.embedded import image_bytes, image_column
from topwork.data.layouts import PART_NAMES
from topwork.data.samples import Listing, Reject, Rules
from topwork.data.tables import cells_of
from topwork.errors import UsageError
from topwork.text import escape, first_names

_IMAGE, _LABEL = "image", "label"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a Dataset or of a DatasetDict wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def list_saved_dataset(folder: Path, rules: Rules) -> Listing:
    """The images of a saved data set; splits that are not train, valid or test are named and left out.

    Raises:
        UsageError: damaged, or without an image or a label column.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    for part in _parts(folder):
        if part and PART_NAMES.get(part.lower()) is None:
            rejects.append(Reject(f"{part}/", "a split that is neither train, valid nor test"))
            continue
        rows += _part_rows(folder, part, rules)
    listing = listing_of(folder, "hub", rows, rules)
    return replace(listing, rejects=(*listing.rejects, *rejects))


def read_row(root: Path, path: str) -> bytes:
    """The bytes of one image."""
    part, _, number = path.rpartition("/")
    table = _table(root / part, (root / part / "state.json").stat().st_mtime_ns)
    return image_bytes(table[_IMAGE][int(number)].as_py())


def _part_rows(folder: Path, part: str, rules: Rules) -> list[Row]:
    inner = folder / part
    table = _table(inner, (inner / "state.json").stat().st_mtime_ns)
    none: list[Any] = [None] * table.num_rows
    labels = cells_of(table[_LABEL], _class_names(inner)) if not rules.label_regex else none
    has_group = rules.group_by is not None and rules.group_by in table.column_names
    groups = cells_of(table[rules.group_by], None) if has_group else none
    part_name = PART_NAMES[part.lower()] if part else None
    return [
        Row(f"{part}/{n}" if part else str(n), (str(label),) if label is not None else (), part_name, group)
        for n, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def _parts(folder: Path) -> list[str]:
    """Names of the splits; [""] for a data set without splits."""
    if not (folder / "dataset_dict.json").is_file():
        return [""]
    splits = _json(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not all(_is_plain(name) for name in splits):
        raise UsageError(f"{escape(str(folder))}: dataset_dict.json names no splits in this folder.")
    return [str(name) for name in splits]


def _class_names(folder: Path) -> list[str] | None:
    feature = _features(folder).get(_label_column(folder)) or {}
    names = feature.get("names")
    return [str(name) for name in names] if isinstance(names, list) else None


def _features(folder: Path) -> dict[str, Any]:
    features = _json(folder / "dataset_info.json").get("features")
    return features if isinstance(features, dict) else {}


def _label_column(folder: Path) -> str:
    """``label``, or the only column of class numbers.

    Raises:
        UsageError: there is none, or there are several.
    """
    features = _features(folder)
    numbered = [name for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"]
    candidates = [name for name in ("label", "labels") if name in features] or numbered
    if len(candidates) != 1:
        raise UsageError(f"{escape(str(folder))}: no column label; found: {first_names(list(features)) or 'none'}.")
    return candidates[0]


@lru_cache(maxsize=8)
def _table(folder: Path, _version: int) -> Any:
    """The columns ``image`` and ``label`` (and others under their own names), memory-mapped and checked.

    Raises:
        UsageError: not what ``save_to_disk`` writes.
    """
    import pyarrow as pa

    parts = []
    for name in _data_files(folder):
        try:
            source = pa.memory_map(str(folder / name))
            try:
                parts.append(pa.ipc.open_stream(source).read_all())
            except pa.ArrowInvalid:
                parts.append(pa.ipc.open_file(source).read_all())
            parts[-1].validate(full=True)  # offsets of a damaged file could otherwise point outside it
        except (OSError, pa.ArrowException) as error:
            raise UsageError(
                f"{escape(str(folder / name))}: cannot be read as Arrow: {str(error).splitlines()[0]}"
            ) from None
    table = pa.concat_tables(parts)
    image = next(
        (n for n, kind in _features(folder).items() if isinstance(kind, dict) and kind.get("_type") == "Image"), None
    )
    image = image if image in table.column_names else image_column(table.schema)
    if image is None:
        raise UsageError(f"{escape(str(folder))}: no image column; found: {first_names(table.column_names)}.")
    label = _label_column(folder)
    return table.rename_columns([{image: _IMAGE, label: _LABEL}.get(name, name) for name in table.column_names])


def _data_files(folder: Path) -> list[str]:
    files = _json(folder / "state.json").get("_data_files")
    names = [item.get("filename") for item in files if isinstance(item, dict)] if isinstance(files, list) else []
    if not names or not all(_is_plain(name) for name in names):
        raise UsageError(f"{escape(str(folder))}: state.json names no data files in this folder.")
    return [str(name) for name in names]


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read: {str(error).splitlines()[0].lower()}") from None
    return value if isinstance(value, dict) else {}
