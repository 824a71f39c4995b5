"""Finds the labels of a folder or an archive: from class folders, a table, or both.

In: the names that it holds and the user's :class:`Rules`. Out: a :class:`Listing`. Folders are read in ``layouts.py`` and tables in
``tables.py`` and ``columns.py``; this module chooses between them.
"""

from __future__ import annotations

import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.data import layouts
from topwork.data.columns import Row, listing_of, meaning_of, named_labels, rows_of
from topwork.data.layouts import CONTAINER_NAMES, Found, arrange, look_through, looks_like_image, tree_of
from topwork.data.named_files import Files
from topwork.data.part_lists import divides, is_class_file, with_parts_stated
from topwork.data.patterns import regex_for_names
from topwork.data.samples import Listing, Reject, Rules
from topwork.data.sidecars import rows_beside
from topwork.data.tables import ENDINGS, LIST_ENDINGS, read_table
from topwork.errors import ImageError, UsageError
from topwork.text import count, escape, first_names, natural_key

_ANNOTATIONS = {"annotations", "annotation", "masks", "mask", "labels", "trimaps", "segmentations", "xmls", "bboxes"}
_PIECES = {"part", "batch", "chunk", "folder", "shard", "volume", "vol"}
_NOTE_ENDINGS = (".json", ".xml", *LIST_ENDINGS)  # called like an image they are about that one alone
_MANY_TABLES = 50  # in one folder: so many texts are notes on the images
_INSIDE = "an archive inside; unpack it first"
_NOT_OPENED = {
    ("-ubyte", "-ubyte.gz"): "MNIST's own format; save the arrays as .npz (x_train, y_train)",
    (".nii", ".nii.gz"): "a volume; save its slices as images",
    (".zip", ".tar", ".gz"): _INSIDE,
    (".rar", ".7z"): "an archive of a kind that is not read; unpack it first",
    (".xlsx", ".xls", ".ods"): "a spreadsheet; save it as CSV",
    (
        ".mat",
    ): "a MATLAB file, which is not read; save what it says as CSV with the columns path and label, or arrays as .npz",
    (".tfrecord", ".tfrec"): "TFRecords, which are not read; save the images as files, or in Parquet",
    (".h5", ".hdf5", ".npy"): "arrays of a kind that is not read; save them as .npz (X, y)",
    (".pkl", ".pickle"): "a pickle, which is not opened because it can run code; save what is in it as .npz or CSV",
    (
        "test_batch",
        "batches.meta",
        *(f"data_batch_{n}" for n in range(1, 6)),
    ): "pickled CIFAR batches, which are not opened; save the arrays as .npz (X, y)",
}


def not_opened(name: str, *, itself: bool = False) -> str | None:
    """Why a file of this name is not opened, and the way out; ``itself``: it was given, so it may be an archive."""
    found = next((why for endings, why in _NOT_OPENED.items() if name.lower().endswith(endings)), None)
    return None if found == _INSIDE and itself else found


def nothing_there(source: Path, listing: Listing, there: str = "") -> str:
    """Why no image has a label there, and what to try."""
    n_aside, is_table = len(listing.rejects), listing.layout == "table"
    noun = ("row" if is_table else "file") + (" is" if n_aside == 1 else "s are")
    first = f"; {escape(listing.rejects[0].path)}: {listing.rejects[0].reason}" if n_aside else ""
    looked = f" ({n_aside:,} {noun} not used{first})" if n_aside else ""
    if is_table:
        return f"{escape(str(source))}: no row has an image and its label{looked}."
    closed = next(((reject.path, why) for reject in listing.rejects if (why := not_opened(reject.path))), None)
    if closed is not None and not there:
        return f"{escape(str(source))}: no images in class folders here; {escape(closed[0])}: {closed[1]}."
    there = there or f"no images in class folders here{looked}. "
    return (
        f"{escape(str(source))}: {there}Expected one folder per class with the images in it, train/ and valid/ folders of those, or a table that "
        "names the images; if the labels are in the file names, add --label-regex."
    )


def list_names(root: Path, found: Found, rules: Rules) -> Listing:
    """The images by class folders or by a table, with the parts of both and of lists next to them.

    Raises:
        UsageError: neither labels them, or they can be read in two ways.
    """
    listing = _read_names(root, found, rules)
    if listing.layout != "table":
        listing = _with_class_names(listing, found, rules)
    return with_parts_stated(listing, found.files, files_of(found, ""))


def _with_class_names(listing: Listing, found: Found, rules: Rules) -> Listing:
    """Numbered class folders get names from a file next to them, as in Udacity's flowers, or from ``--class-names``."""
    numbers: list[tuple[str, ...]] = [(str(int(name)) if name.isdecimal() else name,) for name in listing.class_names]
    named, said = named_labels(numbers, rules, files_of(found, f"{look_through(tree_of(found)).name}x"))
    if not said:
        return listing
    names = {folder: name for folder, (name,) in zip(listing.class_names, named, strict=True)}
    entries = tuple(replace(entry, label=names[entry.label]) for entry in listing.entries)
    class_names = tuple(sorted(names.values(), key=natural_key))
    return replace(listing, entries=entries, class_names=class_names, notes=(*listing.notes, f"Class folders{said}."))


def _read_names(root: Path, found: Found, rules: Rules) -> Listing:
    if rules.label_regex is not None:
        return arrange(root, found, rules)
    by_table, failures = _table_among(root, found, rules)
    failure = next((text for text in failures if "several" in text), None)
    try:
        by_folder = arrange(root, found, rules)
    except UsageError:
        if by_table is None or not by_table.covers_most:
            raise
        return by_table.listing
    are_parts = layouts.are_parts(by_folder.class_names) or _are_annotated(by_folder.class_names)
    has_classes = len(by_folder.class_names) > 1 and not are_parts and not _are_containers(by_folder.class_names)
    has_labels = by_table is not None or failure is not None or has_classes
    if not has_labels and (listing := _by_sidecars(root, found, rules, failures)) is not None:
        return listing
    if failure is not None and by_table is None and not has_classes:
        raise UsageError(failure)
    if (not by_folder.entries or are_parts) and by_table is None:
        option = next((text for text in failures if text.startswith("--")), None)
        if option is not None:
            raise UsageError(option)
        unused = f" Tables here: {failures[0]}" if failures else ""
        raise UsageError(_no_classes(root, found, by_folder) + unused)
    if by_table is None:
        said = [f"Tables here: {failures[0]}"] if failures and not has_classes else []
        return replace(by_folder, notes=(*by_folder.notes, *said))
    if not has_classes:
        return by_table.listing
    if not by_table.covers_most:
        return _with_labels_outside(by_folder, by_table.listing)
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


def _with_labels_outside(by_folder: Listing, by_table: Listing) -> Listing:
    """Adds a part labeled by a table next to class folders, such as Tiny ImageNet's ``val_annotations.txt``."""
    known = {entry.path for entry in by_folder.entries}
    more = [
        replace(entry, part=entry.part or layouts.part_of_name(posixpath.dirname(entry.path)))
        for entry in by_table.entries
    ]
    is_same = all(one.label in by_folder.class_names and one.part and one.path not in known for one in more)
    if not is_same or not all(entry.part for entry in by_folder.entries):
        return by_folder
    folders = {f"{posixpath.dirname(entry.path)}/" for entry in more}
    notes = [note for note in by_folder.notes if not any(note.startswith(escape(folder)) for folder in folders)]
    return replace(
        by_folder,
        entries=tuple(sorted((*by_folder.entries, *more), key=lambda entry: natural_key(entry.path))),
        rejects=tuple(reject for reject in by_folder.rejects if reject.path not in folders),
        notes=(*notes, *by_table.notes),
    )


def _by_sidecars(root: Path, found: Found, rules: Rules, failures: list[str]) -> Listing | None:
    """Labels in a file next to each image; the reason goes to ``failures`` if there are none."""
    try:
        beside = rows_beside(files_of(found, ""), rules)
    except UsageError as error:
        failures.insert(0, str(error))
        return None
    if beside is None:
        return None
    listing = listing_of(root, "table", _with_parts_of_folders(found, beside[0]), rules, beside[1])
    return replace(listing, rejects=(*listing.rejects, *found.rejects))


def _no_classes(root: Path, found: Found, listing: Listing) -> str:
    pattern = regex_for_names([name for name in found.files if looks_like_image(name)])
    if pattern is None:
        folders = first_names(listing.class_names, 4)
        there = f"the folders {folders} hold images but no class folders. " if listing.entries else ""
        return nothing_there(root, listing, there)
    return (
        f"{escape(str(root))}: no class folders and no table of labels here. If the labels are in the file names: "
        f"topwork fit {shlex.quote(str(root))} --label-regex '{pattern}'"
    )


@dataclass(frozen=True)
class _ByTable:
    """Labels from the tables in a folder. ``covers_most``: they name most of the images."""

    name: str
    listing: Listing
    covers_most: bool


def _table_among(root: Path, found: Found, rules: Rules) -> tuple[_ByTable | None, list[str]]:
    """The table that labels the images of a folder, or the tables of its parts; else why there is none.

    Raises:
        UsageError: several tables qualify, or none has the requested columns.
    """
    names = [name for name in _names_of_tables(found) if "submission" not in name.lower()]
    asked = any(value is not None for value in (rules.path_column, rules.label_column))
    usable: list[tuple[str, list[Row], list[str]]] = []
    failed: list[str] = []  # not the errors, whose frames would keep an archive open
    for name in names:
        try:
            files = files_of(found, name)
            table = read_table(name, bytes_of(found, name), rules.encoding)
            rows, notes = rows_of(table, meaning_of(table, files, rules), files, rules)
        except UsageError as error:
            failed.append(str(error))
            continue
        known = set(files.names)
        n_there = sum(row.path in known for row in rows)
        if 2 * n_there >= len(rows) > 0 and any(row.labels for row in rows):
            usable.append((name, rows, notes))
        elif not name.lower().endswith(LIST_ENDINGS):
            lacks = f"{n_there:,} of the {count(len(rows), 'file')} that it names are here"
            failed.append(f"{escape(name)}: {lacks if 2 * n_there < len(rows) else 'it labels no image'}.")
    if not usable:
        if failed and asked:
            raise UsageError(failed[0])
        # A text file need not be a table; an error about a missing option means that it is one.
        return None, [
            text for text in failed if "--multi-label" in text or not text.split(":")[0].lower().endswith(LIST_ENDINGS)
        ]
    if len(usable) > 1:
        usable = _parts_of_tables(root, usable)
    rows = [row for _, own, _ in usable for row in own]
    notes = [note for _, _, own in usable for note in own]
    listing = listing_of(root, "table", _with_parts_of_folders(found, rows), rules, notes)
    images = set(files_of(found, "").names)
    listed = {entry.path for entry in listing.entries}
    aside = [Reject(name, reason, expected=True) for name, reason in _not_listed(images, listed)]
    listing = replace(listing, rejects=(*listing.rejects, *found.rejects, *aside))
    return _ByTable(usable[0][0], listing, 10 * len(listed & images) >= 8 * len(images)), []


def _names_of_tables(found: Found) -> list[str]:
    """Files with the ending of a table next to the folders of images or in the folders of the parts."""
    names = [name for name in found.files if name.lower().endswith(ENDINGS) and not is_class_file(name)]
    stems = {_stem(name) for name in found.files if looks_like_image(name)}
    names = [name for name in names if not (name.lower().endswith(LIST_ENDINGS) and divides(name))]
    names = [name for name in names if not (name.lower().endswith(_NOTE_ENDINGS) and _stem(name) in stems)]
    n_in = Counter(map(posixpath.dirname, names))
    names = [name for name in names if n_in[posixpath.dirname(name)] <= _MANY_TABLES]
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


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _parts_of_tables(
    root: Path, usable: list[tuple[str, list[Row], list[str]]]
) -> list[tuple[str, list[Row], list[str]]]:
    """Tables named train, valid and test, or in folders with these names; else the one with most rows."""
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
        lines = [f"- topwork fit {shlex.quote(str(root / name))}" for name, _, _ in usable[:8]]
        lines += [f"- and {len(usable) - 8:,} more"] * (len(usable) > 8)
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
    """Whether some folders hold images and others their masks or annotations, as in Oxford's pets."""
    found = {name.lower() for name in names}
    return bool(found & CONTAINER_NAMES) and bool(found & _ANNOTATIONS) and found <= CONTAINER_NAMES | _ANNOTATIONS


def _are_containers(names: Sequence[str]) -> bool:
    """Whether folder names only number what they hold: images_part_1 and images_part_2, or 0 and 1, but not n01440764."""
    stems = {name.strip("0123456789").rstrip("_- .").lower() for name in names}
    words = {word for stem in stems for word in re.findall("[a-z]+", stem)}
    return stems <= CONTAINER_NAMES or stems == {""} or (len(stems) == 1 and bool(words & (CONTAINER_NAMES | _PIECES)))


def files_of(found: Found, table: str) -> Files:
    """The files that a table of this name may name; all of them for ""."""
    folder = posixpath.dirname(table)
    names = set(found.files)
    beside = [name for name in found.files if posixpath.dirname(name) == folder]
    return Files(
        exists=names.__contains__,
        list_all=lambda: found.files,
        read=lambda name: bytes_of(found, name),
        table=table,
        folder=f"{folder}/" if folder else "",
        beside=beside,
    )


def bytes_of(found: Found, name: str) -> bytes:
    """The bytes of a file; raises UsageError."""
    assert found.read is not None
    try:
        return found.read(name)
    except ImageError as error:
        raise UsageError(f"{escape(name)}: cannot be read: {error}.") from None
