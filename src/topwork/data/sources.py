"""Where the bytes of an image come from, and which files make up a data set.

In: a path the user gave. Out: a :class:`Listing`: entries (path, label, part, ...) in natural order, the files
that were set aside with the reason, and a ``read`` function for the bytes. Nothing is decoded here.

The rule for folders, the same everywhere: the first level names the class (or the part: train, valid, test), nested
folders belong to it. Hidden files and folders (leading dot, or left by an operating system) are named and not read.
Links are followed after everything real has been listed, and only to what has not been listed yet, so the walk ends
and counts nothing twice. Only regular files are opened.
"""

from __future__ import annotations

import csv
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from topwork.errors import ImageError, UsageError

PART_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_SYSTEM_NAMES = {"thumbs.db", "desktop.ini", "__macosx", "$recycle.bin", "system volume information"}
_TABLE_ENDINGS = {".csv", ".tsv", ".parquet"}
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Entry:
    """One file that may be an image. ``path`` is relative to the root of the listing, with ``/``."""

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
class Listing:
    """What was found under a path, before any image is opened.

    Attributes:
        root: folder that the paths of the entries are relative to.
        layout: ``folders``, ``parts`` (train/valid/test folders) or ``table``.
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
        return read_regular_file(self.root / entry.path)


def natural_key(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key under which ``image9`` comes before ``image10``; ties are broken by the text itself."""
    pieces = re.split(r"(\d+)", text)
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece.casefold()) for piece in pieces if piece], text


def list_data(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Listing:
    """Finds the images below a folder, or those named by a CSV or Parquet file.

    Args:
        path: folder of class folders; folder with train/valid/test folders; ``.csv``/``.tsv``/``.parquet`` file with
            the columns ``path`` and ``label`` and optionally ``split``, ``group``, ``domain``.
        root: folder that the paths of a table are relative to; by default the table's own.

    Raises:
        UsageError: no such path, no class folders, missing columns, nothing that could be an image.
    """
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise UsageError(f"{shown(str(source))}: {_os_reason(error)}. Give a folder of class folders or a CSV file.") from None
    if stat.S_ISDIR(mode):
        listing = _list_folder(source)
    elif source.suffix.lower() in _TABLE_ENDINGS and stat.S_ISREG(mode):
        listing = _list_table(source, Path(root) if root else source.parent)
    else:
        raise UsageError(
            f"{shown(str(source))}: neither a folder nor a .csv, .tsv or .parquet file. "
            "Give a folder with one folder a class, or a table with the columns path and label."
        )
    if not listing.entries:
        looked = f" ({len(listing.rejects)} files were set aside)" if listing.rejects else ""
        raise UsageError(
            f"{shown(str(source))}: no images in class folders here{looked}. "
            "Expected one folder a class with the images in it, or train/ and valid/ folders of those."
        )
    return listing


def read_regular_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file; never waits on a pipe or device.

    Raises:
        ImageError: missing, unreadable, not a regular file, or larger than ``max_bytes``.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise hang for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise ImageError(_os_reason(error)) from None
    with os.fdopen(descriptor, "rb") as file:
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size > max_bytes:
                raise ImageError(f"larger than {max_bytes >> 20} MiB")
            return file.read()
        except OSError as error:
            raise ImageError(_os_reason(error)) from None


def shown(text: str) -> str:
    """A name as it may appear in a terminal line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _os_reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).lower()


# ---- folders


@dataclass
class _Walk:
    """What one walk has collected; links wait until everything real has been seen."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    seen: set[tuple[int, int]] = field(default_factory=set)
    linked: set[tuple[int, int]] = field(default_factory=set)


def _list_folder(root: Path) -> Listing:
    walk = _walk(root)
    top = sorted({name.split("/", 1)[0] for name in walk.folders}, key=natural_key)
    part_folders = [name for name in top if name.lower() in PART_NAMES]
    parts = {PART_NAMES[name.lower()] for name in part_folders}
    if "train" in parts and (len(parts) > 1 or len(part_folders) == len(top)):
        return _parts_listing(root, walk, top)
    return _classes_listing(root, walk)


def _classes_listing(root: Path, walk: _Walk) -> Listing:
    entries, rejects = [], list(walk.rejects)
    for name in walk.files:
        label, slash, _ = name.partition("/")
        if slash:
            entries.append(Entry(name, label))
        else:
            rejects.append(Reject(name, "not in a class folder"))
    class_names = {name for name in walk.folders if "/" not in name}
    return _listing(root, "folders", entries, class_names, rejects, _nesting_notes(root, entries, class_names))


def _parts_listing(root: Path, walk: _Walk, top: list[str]) -> Listing:
    entries, rejects, notes = [], list(walk.rejects), []
    for name in walk.files:
        pieces = name.split("/")
        part = PART_NAMES.get(pieces[0].lower())
        if part is None:
            reason = "not in a train, valid or test folder" if len(pieces) > 1 else "not in a class folder"
            rejects.append(Reject(name, reason))
        elif len(pieces) < 3:
            rejects.append(Reject(name, "not in a class folder"))
        else:
            entries.append(Entry(name, pieces[1], part))
    class_names = {
        name.split("/")[1] for name in walk.folders if name.count("/") == 1 and name.split("/")[0].lower() in PART_NAMES
    }
    others = [name for name in top if name.lower() not in PART_NAMES]
    if others:
        notes.append(f"Left out, because train/valid/test folders were found beside them: {_some(others)}.")
    return _listing(root, "parts", entries, class_names, rejects, notes)


def _listing(
    root: Path, layout: str, entries: list[Entry], class_names: set[str], rejects: list[Reject], notes: list[str]
) -> Listing:
    return Listing(
        root=root,
        layout=layout,
        entries=tuple(sorted(entries, key=lambda entry: natural_key(entry.path))),
        class_names=tuple(sorted(class_names | {entry.label for entry in entries}, key=natural_key)),
        rejects=tuple(sorted(rejects, key=lambda reject: natural_key(reject.path))),
        notes=tuple(notes),
    )


def _nesting_notes(root: Path, entries: list[Entry], class_names: set[str]) -> list[str]:
    """A folder of domains or of wrapped data sets looks like class folders: say so when no class holds files itself."""
    direct = {entry.label for entry in entries if entry.path.count("/") == 1}
    if entries and class_names and not direct:
        example = sorted(class_names, key=natural_key)[0]
        return [
            f"No class folder holds images itself, only nested folders do. If the folders inside {shown(example)} are the "
            f"classes, give {shown(str(root / example))} instead."
        ]
    return []


def _walk(root: Path) -> _Walk:
    walk = _Walk()
    status = root.stat()
    walk.seen.add((status.st_dev, status.st_ino))
    _walk_folder(root, "", walk)
    # Links last, in natural order, and again for links found behind links: what is real always wins.
    while walk.links:
        pending, walk.links = sorted(walk.links, key=natural_key), []
        for name in pending:
            _follow(root, name, walk)
    return walk


def _walk_folder(root: Path, relative: str, walk: _Walk) -> None:
    pending = [relative]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                found = sorted(scan, key=lambda item: natural_key(item.name))
        except OSError as error:
            walk.rejects.append(Reject(folder + "/", f"folder cannot be read: {_os_reason(error)}"))
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


def _take_file(name: str, status: os.stat_result, walk: _Walk) -> None:
    if not stat.S_ISREG(status.st_mode):
        walk.rejects.append(Reject(name, "not a regular file"))
        return
    walk.linked.add((status.st_dev, status.st_ino))
    walk.files.append(name)


def _follow(root: Path, name: str, walk: _Walk) -> None:
    try:
        status = (root / name).stat()
    except (OSError, RuntimeError) as error:
        walk.rejects.append(Reject(name, f"broken link or link loop: {_os_reason(error)}"))
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
                yield Reject(os.path.relpath(os.path.join(folder, file), root), "in a hidden or system folder")


# ---- tables


def _list_table(path: Path, root: Path) -> Listing:
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    entries: list[Entry] = []
    rejects: list[Reject] = []
    seen: dict[str, str] = {}
    for row in rows:
        name, label = row.get("path") or "", row.get("label") or ""
        if not name or not label:
            rejects.append(Reject(name or "(row without a path)", "no label" if name else "no path"))
        elif name in seen:
            same = seen[name] == label
            rejects.append(Reject(name, "listed twice" if same else f"listed twice, also as {shown(seen[name])}"))
        else:
            seen[name] = label
            entries.append(Entry(name, label, _part(row.get("split"), path), row.get("group"), row.get("domain")))
    return _listing(root, "table", entries, set(), rejects, [])


def _read_csv(path: Path) -> Iterator[dict[str, str | None]]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            _check_columns(columns, path)
            for row in reader:
                yield {key: (value.strip() if isinstance(value, str) and key != "path" else value) or None
                       for key, value in row.items() if isinstance(key, str) and not isinstance(value, list)}
    except (OSError, csv.Error) as error:
        raise UsageError(f"{shown(str(path))}: cannot be read as CSV: {_os_reason(error)}") from None


def _read_parquet(path: Path) -> Iterator[dict[str, str | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{shown(str(path))}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    table = table.rename_columns([name.strip().lower() for name in table.column_names])
    _check_columns(table.column_names, path)
    for row in table.select([n for n in ("path", "label", "split", "group", "domain") if n in table.column_names]).to_pylist():
        yield {key: None if value is None else str(value) for key, value in row.items()}


def _check_columns(columns: list[str], path: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise UsageError(
            f"{shown(str(path))}: no column {' and no column '.join(missing)}; found: {_some(columns) or 'none'}. "
            "The table needs the columns path and label, and may have split, group and domain."
        )


def _part(value: str | None, path: Path) -> str | None:
    if value is None:
        return None
    part = PART_NAMES.get(value.strip().lower())
    if part is None:
        raise UsageError(f"{shown(str(path))}: split is {shown(value)!r}; use train, valid or test (or leave it empty).")
    return part


def _some(names: list[str], n: int = 5) -> str:
    text = ", ".join(shown(name) for name in names[:n])
    return text + (f" and {len(names) - n} more" if len(names) > n else "")
