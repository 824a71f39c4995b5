"""Where the bytes of an image come from, and which files make up a data set.

In: a path the user gave. Out: a :class:`Listing`: entries (path, label, part, ...) in reading order, the files that were
set aside with the reason, and a ``read`` function for the bytes. Nothing is decoded here. How names become labels and
parts is in ``layouts.py``; tables, archives and saved Hugging Face data sets have files of their own.

The rule for folders, the same everywhere: the first level names the class (or the part: train, valid, test), nested
folders belong to it. Hidden files and folders (leading dot, or left by an operating system) are named and not read.
Links are followed after everything real has been listed, and only to what has not been listed yet, so the walk ends
and counts nothing twice. Only regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from topwork.errors import ImageError, UsageError
from topwork.files import error_reason
from topwork.text import escape, natural_key

_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information"}
_TABLE_ENDINGS = {".csv", ".tsv", ".parquet"}
MAX_FILE_BYTES = 512 << 20  # its bytes count towards the 1 GB that one file may cost


@dataclass(frozen=True)
class Entry:
    """One file that may be an image.

    Attributes:
        path: relative to the root of the listing, with ``/``.
        label: class name; where an image may have several, all of them in natural order, joined by ``|``.
    """

    path: str
    label: str
    part: str | None = None
    group: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Reject:
    """One file that is not used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Rules:
    """What the user says about how a data set is to be read.

    Attributes:
        root: folder that the paths of a table are relative to; by default the table's own.
        label_regex: takes the label from the file name (or from the path, if it contains ``/``).
        group_by: a column of the table, or a regular expression on the path, that names images that belong together.
        domain_by: a regular expression on the path that names the domain of an image.
        limit_per_class: at most so many images of each class (in each given part), drawn by ``seed`` and name.
        multi_label: an image may have several labels, separated by ``|`` or in rows of their own.
        corrections: a file of corrected labels (see ``data/corrections.py``).
    """

    root: str | os.PathLike[str] | None = None
    label_regex: str | None = None
    group_by: str | None = None
    domain_by: str | None = None
    limit_per_class: int | None = None
    multi_label: bool = False
    seed: int = 0
    corrections: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class Listing:
    """What was found under a path, before any image is opened.

    Attributes:
        root: the folder that the paths of the entries are relative to, or the file that holds the images.
        layout: ``folders``, ``parts`` (train/valid/test folders), ``names`` (labels from file names), ``table`` or
            ``hub`` (saved by Hugging Face datasets).
        entries: in the order in which reading is fast: natural order, but for compressed archives that of the archive.
        class_names: natural order; with empty classes, which have no entries.
        notes: sentences the user should read.
    """

    root: Path
    layout: str
    entries: tuple[Entry, ...]
    class_names: tuple[str, ...]
    rejects: tuple[Reject, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def read(self, entry: Entry) -> bytes:
        """The bytes of one entry; raises ImageError with the reason when they cannot be had."""
        return read_image(self.root, entry.path)


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
    from topwork.data import layouts

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
    from topwork.data import archives, hub, layouts, tables

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
    from topwork.data import archives, hub, tables

    if is_folder:
        return hub.read_row if hub.is_saved_dataset(root) else _read_below
    return tables.read_row if root.suffix.lower() == ".parquet" else archives.read_member


def _read_below(root: Path, path: str) -> bytes:
    return read_regular_file(root / path)


def read_regular_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file; never waits on a pipe or device.

    Raises:
        ImageError: missing, unreadable, not a regular file, or larger than ``max_bytes``.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise hang for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise ImageError(error_reason(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # asked before Python wraps it, which fails on a folder
            raise ImageError("not a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"larger than {max_bytes >> 20} MiB")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise ImageError(error_reason(error)) from None
    finally:
        os.close(descriptor)


# ---- folders


@dataclass
class Walk:
    """What one walk has collected; links wait until everything real has been seen."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    linked: set[tuple[int, int]] = field(default_factory=set)


def walk_folder(root: Path) -> Walk:
    """Every file and folder below a folder, real ones before links."""
    walk = Walk()
    status = root.stat()
    walk.seen.add((status.st_dev, status.st_ino))
    _walk_folder(root, "", walk)
    # Links last, in natural order, and again for links found behind links: what is real always wins.
    while walk.links:
        pending, walk.links = sorted(walk.links, key=natural_key), []
        for name in pending:
            _follow(root, name, walk)
    return walk


def _walk_folder(root: Path, relative: str, walk: Walk) -> None:
    pending = [relative]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                found = sorted(scan, key=lambda item: natural_key(item.name))
        except OSError as error:
            walk.rejects.append(Reject(folder + "/", f"folder cannot be read: {error_reason(error)}"))
            continue
        for item in found:
            name = f"{folder}/{item.name}" if folder else item.name
            if is_hidden(item.name):
                walk.rejects.extend(_hidden_rejects(root, name, item))
            elif item.is_symlink():
                walk.links.append(name)
            elif item.is_dir(follow_symlinks=False):
                status = item.stat(follow_symlinks=False)
                if (status.st_dev, status.st_ino) not in walk.seen:  # a bind mount can show a folder twice
                    walk.seen.add((status.st_dev, status.st_ino))
                    walk.folders.append(name)
                    pending.append(name)
            else:
                _take_file(name, item.stat(follow_symlinks=False), walk)


def _take_file(name: str, status: os.stat_result, walk: Walk) -> None:
    if not stat.S_ISREG(status.st_mode):
        walk.rejects.append(Reject(name, "not a regular file"))
        return
    walk.linked.add((status.st_dev, status.st_ino))
    walk.files.append(name)


def _follow(root: Path, name: str, walk: Walk) -> None:
    try:
        status = (root / name).stat()
    except (OSError, RuntimeError) as error:
        walk.rejects.append(Reject(name, f"broken link or link loop: {error_reason(error)}"))
        return
    identity = (status.st_dev, status.st_ino)
    if stat.S_ISDIR(status.st_mode):
        if identity in walk.seen:
            walk.rejects.append(Reject(name, "link to a folder already listed"))
            return
        walk.seen.add(identity)
        walk.folders.append(name)
        _walk_folder(root, name, walk)
    elif identity in walk.linked:
        walk.rejects.append(Reject(name, "link to a file already listed"))
    else:
        _take_file(name, status, walk)


def is_hidden(name: str) -> bool:
    """Whether the listing rule sets a file or folder of this name aside."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _hidden_rejects(root: Path, name: str, item: os.DirEntry[str]) -> Iterator[Reject]:
    if not item.is_dir(follow_symlinks=False):
        yield Reject(name, "hidden or system file")
    elif "/" not in name:  # .git and the like beside the class folders: one line is enough
        yield Reject(name + "/", "hidden or system folder")
    else:
        for folder, _, files in os.walk(root / name):
            for file in files:
                yield Reject(os.path.relpath(Path(folder) / file, root), "in a hidden or system folder")
