"""Image datasets that Hugging Face ``datasets`` wrote with ``save_to_disk``, read by that library (extra ``hf``).

In: the folder. Out: a :class:`Listing` whose paths are ``PART/ROW`` (or ``ROW``), and the bytes of a row. Nothing outside
the folder is opened: names in its JSON files must be names in it, and an image that is only a path is named and left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from topwork.data.columns import Row, listing_of
from topwork.data.embedded import image_bytes
from topwork.data.layouts import PART_NAMES
from topwork.data.samples import Listing, Reject, Rules
from topwork.data.tables import cells_of
from topwork.errors import UsageError
from topwork.text import escape, first_names

NO_DATASETS = "saved by Hugging Face datasets, which requires: pip install 'topwork[hf]'"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a Dataset or of a DatasetDict wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def list_saved_dataset(folder: Path, rules: Rules) -> Listing:
    """The images of a saved dataset; splits that are not train, valid or test are named and left out.

    Raises:
        UsageError: damaged, without an image or a label column, or ``datasets`` is not installed.
    """
    rows: list[Row] = []
    rejects: list[Reject] = []
    for part, data in _parts(folder, _version(folder)).items():
        if part and part.lower() not in PART_NAMES:
            rejects.append(Reject(f"{part}/", "a split other than train, valid or test"))
            continue
        rows += _rows(folder, part, data, rules)
    listing = listing_of(folder, "hub", rows, rules)
    return replace(listing, rejects=(*listing.rejects, *rejects))


def read_row(root: Path, path: str) -> bytes:
    """The bytes of one image."""
    part, _, number = path.rpartition("/")
    data = _parts(root, _version(root))[part]
    return image_bytes(data.data.table[_image_column(root, data)][int(number)].as_py())


def _rows(folder: Path, part: str, data: Any, rules: Rules) -> list[Row]:
    _image_column(folder, data)
    table = data.data.table
    none: list[Any] = [None] * len(data)
    label = None if rules.label_regex else rules.label_column or _label_column(folder, data)
    if label is not None and label not in table.column_names:
        raise UsageError(f"{escape(str(folder))}: no column {escape(label)}; found: {first_names(table.column_names)}.")
    labels = cells_of(table[label], getattr(data.features[label], "names", None)) if label else none
    has_group = rules.group_by is not None and rules.group_by in table.column_names
    groups: list[Any] = cells_of(table[rules.group_by], None) if has_group else none
    part_name = PART_NAMES[part.lower()] if part else None
    return [
        Row(f"{part}/{n}" if part else str(n), (str(label),) if label is not None else (), part_name, group)
        for n, (label, group) in enumerate(zip(labels, groups, strict=True))
    ]


def _image_column(folder: Path, data: Any) -> str:
    found = [name for name, feature in data.features.items() if type(feature).__name__ == "Image"]
    if not found:
        raise UsageError(f"{escape(str(folder))}: no image column; found: {first_names(list(data.features))}.")
    return str(found[0])


def _label_column(folder: Path, data: Any) -> str:
    """``label``, or the only column of class numbers."""
    numbered = [name for name, feature in data.features.items() if type(feature).__name__ == "ClassLabel"]
    candidates = [name for name in ("label", "labels") if name in data.features] or numbered
    if len(candidates) != 1:
        raise UsageError(f"{escape(str(folder))}: no column label; found: {first_names(list(data.features))}.")
    return candidates[0]


def _version(folder: Path) -> int:
    names = ("dataset_dict.json", "state.json", "dataset_info.json")
    return max((folder / name).stat().st_mtime_ns for name in names if (folder / name).is_file())


@lru_cache(maxsize=4)
def _parts(folder: Path, _version: int) -> dict[str, Any]:
    """The splits by name, or the one dataset under ""."""
    _check_names(folder)
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{escape(str(folder))}: {NO_DATASETS}.") from None
    try:
        loaded = datasets.load_from_disk(str(folder))
        parts = {str(name): part for name, part in loaded.items()} if isinstance(loaded, dict) else {"": loaded}
        for part in parts.values():
            part.data.table.validate(full=True)  # offsets of a damaged file could otherwise point outside it
    except Exception as error:  # noqa: BLE001 - raises any exception of its dependencies
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{escape(str(folder))}: cannot be read as a saved dataset: {escape(reason)}.") from None
    return parts


def _check_names(folder: Path) -> None:
    """Raises UsageError if a name in the JSON files leads out of the folder."""
    is_dict = (folder / "dataset_dict.json").is_file()
    splits = _json(folder / "dataset_dict.json").get("splits") if is_dict else [""]
    if not isinstance(splits, list) or not all(_is_plain(name) or not is_dict for name in splits):
        raise UsageError(f"{escape(str(folder))}: dataset_dict.json names no splits in this folder.")
    for split in splits:
        files = _json(folder / split / "state.json").get("_data_files")
        names = [item.get("filename") for item in files if isinstance(item, dict)] if isinstance(files, list) else []
        if not names or not all(map(_is_plain, names)):
            raise UsageError(f"{escape(str(folder))}: state.json names no data files in this folder.")


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{escape(str(path))}: cannot be read: {str(error).splitlines()[0].lower()}") from None
    return value if isinstance(value, dict) else {}
