"""Which files make up a data set, in whatever form the user has it, and the bytes of each.

In: a path. Out: a :class:`Listing`: entries (path, label, part, ...) in reading order and what is not used with the reason.
Nothing is decoded here. How names become labels and parts is in ``layouts.py``; folders, tables, archives and saved Hugging
Face data sets have files of their own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from topwork.data import archives, hub, layouts, tables
from topwork.data.folders import read_regular_file, walk_folder
from topwork.data.samples import Listing, Rules
from topwork.errors import ImageError, UsageError
from topwork.files import error_reason
from topwork.text import escape

_TABLE_ENDINGS = {".csv", ".tsv", ".parquet"}


def list_data(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, rules: Rules | None = None
) -> Listing:
    """Finds the images below a folder, in an archive, or those named by a CSV or Parquet file.

    Args:
        path: folder of class folders; folder with train/valid/test folders; tar or zip archive of either; folder that
            ``datasets.save_to_disk`` wrote; ``.csv``/``.tsv``/``.parquet`` file with the columns ``path`` (or, in
            Parquet, ``image`` with the bytes) and ``label`` and optionally ``split``, ``group``, ``domain``.
        root: same as ``rules.root``.

    Raises:
        UsageError: no such path, no class folders, missing columns, nothing that could be an image.
    """
    rules = rules or Rules(root)
    source = Path(path)
    listing = layouts.limited(_list(source, rules), rules)
    if not listing.entries:
        n_aside, is_table = len(listing.rejects), listing.layout == "table"
        noun = ("row was" if is_table else "file was") if n_aside == 1 else "rows were" if is_table else "files were"
        first = f"; {escape(listing.rejects[0].path)}: {listing.rejects[0].reason}" if n_aside else ""
        looked = f" ({n_aside} {noun} set aside{first})" if n_aside else ""
        if is_table:
            raise UsageError(f"{escape(str(source))}: no row names an image and its label{looked}.")
        raise UsageError(
            f"{escape(str(source))}: no images in class folders here{looked}. "
            "Expected one folder a class with the images in it, or train/ and valid/ folders of those; "
            "where file names hold the labels, add --label-regex."
        )
    return listing


def _list(source: Path, rules: Rules) -> Listing:
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:
        reason = error_reason(error)
        raise UsageError(f"{escape(str(source))}: {reason}. Give a folder of class folders or a CSV file.") from None
    if stat.S_ISDIR(mode):
        if hub.is_saved_dataset(source):
            return hub.list_saved_dataset(source, rules)
        walk = walk_folder(source)
        return layouts.arrange(source, layouts.Found(walk.files, walk.folders, walk.rejects), rules)
    if stat.S_ISREG(mode) and source.suffix.lower() in _TABLE_ENDINGS:
        return tables.list_table(source, rules)
    if stat.S_ISREG(mode) and archives.is_archive(source):
        archive = archives.open_archive(source)
        found = layouts.Found(archive.names, archive.folders, archive.rejects, wrapped=True)
        return layouts.arrange(source, found, rules, in_given_order=archive.is_sequential)
    raise UsageError(
        f"{escape(str(source))}: neither a folder, a tar or zip archive, nor a .csv, .tsv or .parquet file. "
        "Give a folder with one folder a class, or a table with the columns path and label."
    )


def read_image(root: Path, path: str) -> bytes:
    """The bytes of one image of a listing, from its root and path alone.

    Raises:
        ImageError: with the reason, when they cannot be had.
    """
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise ImageError(error_reason(error)) from None
    return _reader(root, is_folder)(root, path)


def _reader(root: Path, is_folder: bool) -> Callable[[Path, str], bytes]:
    if is_folder and not (root / "dataset_info.json").exists() and not (root / "dataset_dict.json").exists():
        return _read_below
    if is_folder:
        return hub.read_row if hub.is_saved_dataset(root) else _read_below
    return tables.read_row if root.suffix.lower() == ".parquet" else archives.read_member


def _read_below(root: Path, path: str) -> bytes:
    return read_regular_file(root / path)
