"""Lists the files of a dataset, in any supported layout, and reads them.

In: a path. Out: a :class:`Listing`: entries (path, label, part, ...) in reading order and what is not used with the reason.
Nothing is decoded here. How names become labels is in ``layouts.py``, how tables do in ``tables.py`` and ``columns.py``.
A folder or an archive with both, class folders and a table, is read by its folders if the two agree.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from topwork.data import archives, arrays, embedded, hub, layouts, remote
from topwork.data.bands import select_bands
from topwork.data.columns import Row, listing_of, meaning_of, named_labels, rows_of
from topwork.data.folders import read_regular_file, walk_folder
from topwork.data.layouts import CONTAINER_NAMES, Found, arrange, look_through, looks_like_image, tree_of
from topwork.data.named_files import Files
from topwork.data.patterns import limited, regex_for_names
from topwork.data.samples import Listing, Reject, Rules
from topwork.data.tables import ENDINGS, LIST_ENDINGS, Table, read_table
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.files import error_reason
from topwork.text import count, escape, first_names, natural_key

_MAX_TABLE_BYTES = 1 << 30
_ANNOTATIONS = {"annotations", "annotation", "masks", "mask", "labels", "trimaps", "segmentations", "xmls", "bboxes"}
_PIECES = {"part", "batch", "chunk", "folder", "shard", "volume", "vol"}
_CONTAINER_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".parquet", ".npz")


def list_data(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, rules: Rules | None = None
) -> Listing:
    """Finds the images below a folder, in an archive, or those named by a table.

    Args:
        path: folder of class folders; folder with train/valid/test folders; folder of images with a table; tar or zip archive
            of any of these, or a folder or table in it; a URL that fsspec knows of any of these; table (CSV, TSV, text list, JSON, JSON Lines, Parquet, CVAT XML);
            Parquet or NumPy file that holds the images; folder that ``datasets.save_to_disk`` wrote.
        root: same as ``rules.root``.

    Raises:
        UsageError: no such path, two ways to read it, missing columns, nothing that could be an image.
    """
    rules = rules or Rules(root)
    source = Path(path)
    listing = _list(source, rules)
    if not listing.entries:
        raise UsageError(_nothing_there(source, listing))
    if listing.layout not in ("table", "hub"):
        _check_no_table_needed(listing, rules)
    return limited(listing, rules)


def _check_no_table_needed(listing: Listing, rules: Rules) -> None:
    for name in ("root", "path_column", "label_column", "split_column", "encoding", "label_separator"):
        if getattr(rules, name) is not None:
            option = f"--{name.replace('_', '-')} {escape(str(getattr(rules, name)))}"
            raise UsageError(
                f"{option} has no effect: the labels of {escape(str(listing.root))} do not come from a table."
            )


_NOT_OPENED = {
    **dict.fromkeys((".zip", ".tar", ".gz"), "an archive inside; unpack it first"),
    **dict.fromkeys((".rar", ".7z"), "an archive of a kind that is not read; unpack it first"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet; save it as CSV"),
}


def _nothing_there(source: Path, listing: Listing, there: str = "") -> str:
    n_aside, is_table = len(listing.rejects), listing.layout == "table"
    noun = ("row" if is_table else "file") + (" is" if n_aside == 1 else "s are")
    first = f"; {escape(listing.rejects[0].path)}: {listing.rejects[0].reason}" if n_aside else ""
    looked = f" ({n_aside} {noun} not used{first})" if n_aside else ""
    if is_table:
        return f"{escape(str(source))}: no row has an image and its label{looked}."
    closed = next((reject for reject in listing.rejects if Path(reject.path).suffix.lower() in _NOT_OPENED), None)
    if closed is not None and not there:
        reason = _NOT_OPENED[Path(closed.path).suffix.lower()]
        return f"{escape(str(source))}: no images in class folders here; {escape(closed.path)}: {reason}."
    there = there or f"no images in class folders here{looked}. "
    return (
        f"{escape(str(source))}: {there}Expected one folder per class with the images in it, train/ and valid/ folders of those, or a table that "
        "names the images; if the labels are in the file names, add --label-regex."
    )


def _list(source: Path, rules: Rules) -> Listing:
    if remote.is_url(source):
        return _list_remote(source, rules)
    try:
        mode = source.stat().st_mode
    except NotADirectoryError as error:
        archive = next((place for place in source.parents if place.is_file()), source)
        if archive == source or not archives.is_archive(archive):
            raise UsageError(f"{escape(str(source))}: {error_reason(error)}.") from None
        return _list_archive(archive, source.relative_to(archive).as_posix(), rules)
    except (OSError, ValueError) as error:
        reason = error_reason(error)
        raise UsageError(f"{escape(str(source))}: {reason}. Give a folder of class folders or a table.") from None
    if stat.S_ISDIR(mode):
        if hub.is_saved_dataset(source):
            return hub.list_saved_dataset(source, rules)
        found = _found_below(source)
        return _list_parquets(source, found, rules) or _list_names(source, found, rules)
    if stat.S_ISREG(mode) and source.suffix.lower() == ".npz":
        return arrays.list_arrays(source, rules)
    if stat.S_ISREG(mode) and source.suffix.lower() in ENDINGS:
        if source.suffix.lower() == ".parquet" and embedded.holds_images(source):
            return embedded.list_embedded(source, rules)
        return _list_table(source, rules)
    closed = _NOT_OPENED.get(source.suffix.lower())
    if closed is not None and "inside" not in closed:
        raise UsageError(f"{escape(str(source))}: {closed}.")
    if stat.S_ISREG(mode) and archives.is_archive(source):
        return _list_archive(source, "", rules)
    raise UsageError(
        f"{escape(str(source))}: neither a folder, a tar or zip archive, nor a table ({', '.join(ENDINGS)}, .npz). "
        "Give a folder with one folder per class, or a table with the columns path and label."
    )


def _list_parquets(root: Path, found: Found, rules: Rules) -> Listing | None:
    """A folder of Parquet files that hold the images, as the Hugging Face hub keeps datasets; None if it is none.

    A file stands for the part that its name says: ``data/train-00000-of-00004.parquet``.
    """
    names = [name for name in found.files if name.lower().endswith(".parquet")]
    if not names or any(map(looks_like_image, found.files)):
        return None
    names = [name for name in names if embedded.holds_images(root / name)]
    entries, rejects = [], list(found.rejects)
    notes: list[str] = []
    for name in names:
        part = layouts.part_of_name(name)
        listed = embedded.list_embedded(root / name, rules)
        entries += [replace(one, path=f"{name}/{one.path}", part=one.part or part) for one in listed.entries]
        rejects += [replace(one, path=f"{name}/{one.path}") for one in listed.rejects]
        notes += listed.notes
    return layouts.make_listing(root, "table", entries, set(), rejects, notes) if names else None


def _list_remote(source: Path, rules: Rules) -> Listing:
    """A folder behind a URL is read file by file; an archive, Parquet or NumPy file is copied into the cache."""
    if remote.is_folder(source):
        walk = remote.walk(source)
        found = Found(
            walk.files, walk.folders, walk.rejects,
            read=lambda name: remote.read(source / name, _MAX_TABLE_BYTES),
        )  # fmt: skip
        return _list_names(source, found, rules)
    copy, ending = remote.local_copy(source), source.suffix.lower()
    if ending in ENDINGS and not (ending == ".parquet" and embedded.holds_images(copy)):
        return _list_table(source, rules)
    try:
        return replace(_list(copy, rules), root=source)
    except UsageError as error:
        raise UsageError(str(error).replace(str(copy), remote.url_of(source))) from None


def _found_below(folder: Path) -> Found:
    walk = walk_folder(folder)
    return Found(
        walk.files, walk.folders, walk.rejects, walk.links,
        read=lambda name: read_regular_file(folder / name, _MAX_TABLE_BYTES),
    )  # fmt: skip


def _list_archive(path: Path, inner: str, rules: Rules) -> Listing:
    archive = archives.open_archive(path)
    found = Found(
        archive.names, archive.folders, archive.rejects,
        read=lambda name: archives.read_member(path, name),
    )  # fmt: skip
    if inner in archive.members:
        files = _files_of(found, inner)
        return _listing_of_table(path, read_table(inner, _bytes(found, inner), rules.encoding), files, rules)
    if inner:
        below = f"{inner}/"
        found = replace(
            found,
            files=[name for name in found.files if name.startswith(below)],
            folders=[name for name in found.folders if name.startswith(below)],
        )
        if not found.files:
            raise UsageError(f"{escape(str(path))}: the archive has no folder or table {escape(inner)}.")
    return _list_names(path, found, rules)


# ---- a folder or an archive: class folders, a table, or both


def _list_names(root: Path, found: Found, rules: Rules) -> Listing:
    listing = _read_names(root, found, rules)
    if listing.layout != "table":
        listing = _with_class_names(listing, found, rules)
    return listing if any(entry.part for entry in listing.entries) else _with_lists_of_parts(listing, found)


def _with_class_names(listing: Listing, found: Found, rules: Rules) -> Listing:
    """Class folders that are called by numbers get the names in a file beside them, as Udacity's flowers, or in ``--class-names``."""
    numbers: list[tuple[str, ...]] = [(str(int(name)) if name.isdecimal() else name,) for name in listing.class_names]
    named, said = named_labels(numbers, rules, _files_of(found, f"{look_through(tree_of(found)).name}x"))
    if not said:
        return listing
    names = {folder: name for folder, (name,) in zip(listing.class_names, named, strict=True)}
    entries = tuple(replace(entry, label=names[entry.label]) for entry in listing.entries)
    class_names = tuple(sorted(names.values(), key=natural_key))
    return replace(listing, entries=entries, class_names=class_names, notes=(*listing.notes, f"Class folders{said}."))


def _with_lists_of_parts(listing: Listing, found: Found) -> Listing:
    """Gives images the parts of lists that name them without labels, as Food-101's ``train.txt`` and ``test.txt``.

    Lists that contradict each other or leave out more than a tenth of the images say nothing.
    """
    lists = {name: part for name in found.files if (part := _part_of_list(name)) is not None}
    if len(set(lists.values())) < 2:
        return listing
    files = _files_of(found, "")
    part_of: dict[str, str] = {}
    for name, part in lists.items():
        try:
            columns = read_table(name, _bytes(found, name)).columns
        except UsageError:
            return listing
        for path in columns["path"] if set(columns) == {"path"} else ():
            named = files.named(str(path))
            if len(named) == 1 and part_of.setdefault(named[0], part) != part:
                return listing
    n_named = sum(entry.path in part_of for entry in listing.entries)
    if len(set(part_of.values())) < 2 or 10 * n_named < 9 * len(listing.entries):
        return listing
    entries = tuple(replace(entry, part=part_of.get(entry.path)) for entry in listing.entries)
    note = f"Train, valid and test parts from {first_names(sorted(lists), 3)}."
    return replace(listing, entries=entries, notes=(*listing.notes, note))


def _part_of_list(name: str) -> str | None:
    """The part that a text list is called after: ``train_val_list.txt`` is for training."""
    own = posixpath.basename(name).lower()
    if not own.endswith(LIST_ENDINGS) or _is_class_file(name):
        return None
    found = {layouts.PART_NAMES[word] for word in re.findall("[a-z]+", own) if word in layouts.PART_NAMES}
    return "train" if found == {"train", "valid"} else found.pop() if len(found) == 1 else None


def _read_names(root: Path, found: Found, rules: Rules) -> Listing:
    if rules.label_regex is not None:
        return arrange(root, found, rules)
    by_table, failures = _table_among(root, found, rules)
    failure = next((error for error in failures if "several" in str(error)), None)
    try:
        by_folder = arrange(root, found, rules)
    except UsageError:
        if by_table is None or not by_table.covers_most:
            raise
        return by_table.listing
    are_parts = layouts.are_parts(by_folder.class_names) or _are_annotated(by_folder.class_names)
    has_classes = bool(by_folder.entries) and not are_parts and not _are_containers(by_folder.class_names)
    if failure is not None and by_table is None and not has_classes:
        raise failure
    if (not by_folder.entries or are_parts) and by_table is None:
        option = next((error for error in failures if str(error).startswith("--")), None)
        if option is not None:
            raise option
        unused = f" Tables here: {failures[0]}" if failures else ""
        raise UsageError(_no_classes(root, found, by_folder) + unused)
    if by_table is None or (by_folder.entries and not are_parts and not by_table.covers_most):
        return by_folder
    if not has_classes:
        return by_table.listing
    if _agree(by_folder, by_table.listing):
        has_more = {entry.part for entry in by_table.listing.entries} > {entry.part for entry in by_folder.entries}
        return by_table.listing if has_more else by_folder
    path = str(root)
    raise UsageError(
        f"{escape(path)}: has two sets of labels that disagree; choose one:\n"
        f"- The labels of the table: topwork fit {shlex.quote(str(root / by_table.name))}\n"
        f"- The class folders {first_names(by_folder.class_names, 4)}: topwork fit {shlex.quote(path)} "
        "--label-regex '([^/]+)/[^/]+$'"
    )


def _no_classes(root: Path, found: Found, listing: Listing) -> str:
    pattern = regex_for_names([name for name in found.files if looks_like_image(name)])
    if pattern is None:
        folders = first_names(listing.class_names, 4)
        there = f"the folders {folders} hold images but no class folders. " if listing.entries else ""
        return _nothing_there(root, listing, there)
    return (
        f"{escape(str(root))}: no class folders and no table of labels here. If the labels are in the file names: "
        f"topwork fit {shlex.quote(str(root))} --label-regex '{pattern}'"
    )


@dataclass(frozen=True)
class _ByTable:
    """What the tables in a folder say. ``covers_most``: they name most of the images."""

    name: str
    listing: Listing
    covers_most: bool


def _table_among(root: Path, found: Found, rules: Rules) -> tuple[_ByTable | None, list[UsageError]]:
    """The table of a folder that labels its images, or the tables of its parts; else why those that are there do not.

    Raises:
        UsageError: several tables could be meant, or columns were named that none has.
    """
    names = [name for name in _names_of_tables(found) if "submission" not in name.lower()]
    asked = any(value is not None for value in (rules.path_column, rules.label_column))
    usable: list[tuple[str, list[Row], list[str]]] = []
    failed: list[UsageError] = []
    for name in names:
        try:
            files = _files_of(found, name)
            table = read_table(name, _bytes(found, name), rules.encoding)
            rows, notes = rows_of(table, meaning_of(table, files, rules), files, rules)
        except UsageError as error:
            failed.append(error)
            continue
        known = set(files.names)
        n_there = sum(row.path in known for row in rows)
        if 2 * n_there >= len(rows) > 0 and any(row.labels for row in rows):
            usable.append((name, rows, notes))
        elif not name.lower().endswith(LIST_ENDINGS):
            lacks = f"{n_there:,} of the {count(len(rows), 'file')} that it names are here"
            failed.append(UsageError(f"{escape(name)}: {lacks if 2 * n_there < len(rows) else 'it labels no image'}."))
    if not usable:
        if failed and asked:
            raise failed[0]
        return None, [error for error in failed if not str(error).split(":")[0].lower().endswith(LIST_ENDINGS)]
    if len(usable) > 1:
        usable = _parts_of_tables(root, usable)
    rows = [row for _, own, _ in usable for row in own]
    notes = [note for _, _, own in usable for note in own]
    listing = listing_of(root, "table", _with_parts_of_folders(found, rows), rules, notes)
    images = set(_files_of(found, "").names)
    listed = {entry.path for entry in listing.entries}
    aside = [Reject(name, reason, expected=True) for name, reason in _not_listed(images, listed)]
    listing = replace(listing, rejects=(*listing.rejects, *found.rejects, *aside))
    return _ByTable(usable[0][0], listing, 10 * len(listed & images) >= 8 * len(images)), []


def _names_of_tables(found: Found) -> list[str]:
    """Files with the ending of a table next to the folders of images or in the folders of the parts."""
    names = [name for name in found.files if name.lower().endswith(ENDINGS) and not _is_class_file(name)]
    if not names:
        return []
    top = look_through(tree_of(found))
    parts = [folder.name for folder in top.full.values() if folder.n_direct]
    folders = {
        "",
        top.name,
        *parts,
        *(f"{folder}/" for folder in found.folders if posixpath.dirname(folder) in ("", top.name.rstrip("/"))),
    }
    return [name for name in names if f"{posixpath.dirname(name)}/".lstrip("/") in folders]


def _is_class_file(name: str) -> bool:
    own = posixpath.basename(name).lower()
    return own.endswith(LIST_ENDINGS) and any(
        word in own for word in ("class", "readme", "license", "licence", "names")
    )


def _parts_of_tables(
    root: Path, usable: list[tuple[str, list[Row], list[str]]]
) -> list[tuple[str, list[Row], list[str]]]:
    """Tables that stand for train, valid and test by their own names or by their folders; else the one with most rows."""
    parts = {name: part for name, _, _ in usable if (part := layouts.part_of_name(name)) is not None}
    n_rows = {name: len(rows) for name, rows, _ in usable}
    largest = max((n for name, n in n_rows.items() if name not in parts), default=0)
    if len(set(parts.values())) > 1 and sum(n_rows[name] for name in parts) >= largest:
        return [
            (name, [replace(row, part=row.part or parts[name]) for row in rows], notes)
            for name, rows, notes in usable
            if name in parts
        ]
    sizes = sorted((len({row.path for row in rows}) for _, rows, _ in usable), reverse=True)
    if sizes[0] < 1.5 * sizes[1]:
        lines = [f"- topwork fit {shlex.quote(str(root / name))}" for name, _, _ in usable]
        raise UsageError(f"{escape(str(root))}: several tables have labels; choose one:\n" + "\n".join(lines))
    return [max(usable, key=lambda item: len({row.path for row in item[1]}))]


def _with_parts_of_folders(found: Found, rows: list[Row]) -> list[Row]:
    """Rows without a part get that of the folder of their image, if the images lie in several parts."""
    if any(row.part for row in rows):
        return rows
    top = look_through(tree_of(found))
    parts = {top.full[name].name: part for name, part in layouts.parts_among(top.full).items() if part != "unlabeled"}
    of_row = [next((part for folder, part in parts.items() if row.path.startswith(folder)), None) for row in rows]
    if len({part for part, row in zip(of_row, rows, strict=True) if part and row.labels}) < 2:
        return rows
    return [replace(row, part=part) for row, part in zip(rows, of_row, strict=True)]


def _not_listed(images: set[str], listed: set[str]) -> list[tuple[str, str]]:
    """Images that no row names, by folder."""
    counts: dict[str, int] = {}
    for name in sorted(images - listed):
        folder = f"{posixpath.dirname(name)}/".lstrip("/") or "./"
        counts[folder] = counts.get(folder, 0) + 1
    return [(folder, f"{n:,} images that the table does not name") for folder, n in counts.items()]


def _agree(by_folder: Listing, by_table: Listing) -> bool:
    """Whether each folder has one label in the table and each label one folder."""
    label_of = {entry.path: entry.label for entry in by_table.entries}
    pairs = {(entry.label, label_of[entry.path]) for entry in by_folder.entries if entry.path in label_of}
    return len({folder for folder, _ in pairs}) == len(pairs) == len({label for _, label in pairs})


def _are_annotated(names: Sequence[str]) -> bool:
    """Whether folders hold images on one side and masks or other annotations of them on the other, as Oxford's pets."""
    found = {name.lower() for name in names}
    return bool(found & CONTAINER_NAMES) and bool(found & _ANNOTATIONS) and found <= CONTAINER_NAMES | _ANNOTATIONS


def _are_containers(names: Sequence[str]) -> bool:
    """Whether folder names only number what they hold: images_part_1 and images_part_2, or 0 and 1, but not n01440764."""
    stems = {name.strip("0123456789").rstrip("_- .").lower() for name in names}
    words = {word for stem in stems for word in re.findall("[a-z]+", stem)}
    return stems <= CONTAINER_NAMES or stems == {""} or (len(stems) == 1 and bool(words & (CONTAINER_NAMES | _PIECES)))


# ---- a table by itself


def _list_table(source: Path, rules: Rules) -> Listing:
    root = Path(rules.root) if rules.root else source.parent
    try:
        data = _read_file(source, _MAX_TABLE_BYTES)
    except ImageError as error:
        raise UsageError(f"{escape(str(source))}: cannot be read: {error}.") from None
    beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
    names = cache(lambda: frozenset(_names_below(root)))
    files = Files(
        exists=lambda name: remote.is_url(name) or _exists(root, name, names),
        list_all=lambda: _names_below(root),
        read=lambda name: _read_file(source.parent / name, _MAX_TABLE_BYTES),
        table=source.name,
        beside=[name for name in beside if name != source.name],
    )
    table = read_table(source.name, data, rules.encoding)
    return _listing_of_table(root, table, files, rules)


def _read_file(path: Path, max_bytes: int) -> bytes:
    return remote.read(path, max_bytes) if remote.is_url(path) else read_regular_file(path, max_bytes)


def _exists(root: Path, name: str, names: Callable[[], frozenset[str]]) -> bool:
    if not remote.is_url(root):
        return os.path.lexists(name if name.startswith("/") else f"{root}/{name}")
    return _is_web(root) or name in names()


def _names_below(root: Path) -> list[str]:
    if not remote.is_url(root):
        return walk_folder(root).files
    return [] if _is_web(root) else remote.walk(root).files


def _is_web(root: Path) -> bool:
    """Whether files cannot be listed there: what a table names is taken to exist until it is read."""
    return remote.url_of(root).lower().startswith(("http://", "https://"))


def _listing_of_table(root: Path, table: Table, files: Files, rules: Rules) -> Listing:
    rows, notes = rows_of(table, meaning_of(table, files, rules), files, rules)
    return listing_of(root, "table", rows, rules, notes)


def _files_of(found: Found, table: str) -> Files:
    """The files that a table of this name may name; all of them for ""."""
    folder = posixpath.dirname(table)
    names = set(found.files)
    beside = [name for name in found.files if posixpath.dirname(name) == folder]
    return Files(
        exists=names.__contains__,
        list_all=lambda: found.files,
        read=lambda name: _bytes(found, name),
        table=table,
        folder=f"{folder}/" if folder else "",
        beside=beside,
    )


def _bytes(found: Found, name: str) -> bytes:
    assert found.read is not None
    try:
        return found.read(name)
    except ImageError as error:
        raise UsageError(f"{escape(name)}: cannot be read: {error}.") from None


# ---- bytes


def read_image(root: Path, path: str, bands: str | None = None) -> bytes:
    """The bytes of one image of a listing, from its root and path alone.

    Args:
        bands: which bands of a many-band TIFF to take, such as ``3,2,1``.

    Raises:
        ImageError: with the reason, when they cannot be had.
    """
    data = _stored(root, path)
    return select_bands(data, bands) if bands else data


def _stored(root: Path, path: str) -> bytes:
    if remote.is_url(path):
        return remote.read(path)
    if remote.is_url(root):
        return _read_remote(root, path)
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise ImageError(error_reason(error)) from None
    return _reader(root, is_folder)(root, path)


def _read_remote(root: Path, path: str) -> bytes:
    if root.suffix.lower() not in _CONTAINER_ENDINGS:
        return remote.read(root / path)
    try:
        copy = _copy_of(root)
    except TopworkError as error:
        raise ImageError(str(error)) from None
    return _reader(copy, False)(copy, path)


@lru_cache(maxsize=8)
def _copy_of(root: Path) -> Path:
    """Asked for once per process: to ask for the version of a remote file takes as long as to read an image."""
    return remote.local_copy(root)


def _reader(root: Path, is_folder: bool) -> Callable[[Path, str], bytes]:
    if is_folder:
        return hub.read_row if hub.is_saved_dataset(root) else _read_below
    ending = root.suffix.lower()
    return (
        embedded.read_row if ending == ".parquet" else arrays.read_array if ending == ".npz" else archives.read_member
    )


def _read_below(root: Path, path: str) -> bytes:
    file, ending, row = path.partition(".parquet/")
    if ending and (parquet := root / f"{file}.parquet").is_file():
        return embedded.read_row(parquet, row)
    return read_regular_file(root / path)
