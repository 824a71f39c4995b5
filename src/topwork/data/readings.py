"""Finds the labels and parts of a folder or an archive: from class folders, a table, files beside the images, or both.

In: the names that it holds and the user's :class:`Rules`. Out: a :class:`Listing`. Folders are read in ``layouts.py`` and tables in
``tables.py`` and ``columns.py``; this module chooses between them, and divides images as lists beside them say.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.data.columns import GUESSED, NUMBERED_PARTS, listing_of, named_labels, rows_of
from topwork.data.folders import Found
from topwork.data.layouts import (
    ANNOTATION_NAMES,
    CONTAINER_NAMES,
    PART_NAMES,
    Folder,
    are_parts,
    arrange,
    folders_of,
    label_taker,
    look_through,
    looks_like_image,
    make_listing,
    part_of_name,
    parts_among,
    parts_in,
    regex_for_names,
    tree_of,
)
from topwork.data.named_files import Files
from topwork.data.samples import Entry, Listing, Reject, Rules
from topwork.data.tables import ENDINGS, LIST_ENDINGS, Table, decoded, read_table, table_of_rows
from topwork.errors import AmbiguousError, ImageError, UsageError
from topwork.text import count, escape, first_names, natural_key

_PIECES = {"part", "batch", "chunk", "folder", "shard", "volume", "vol"}
_GROUPS = {"patient", "case", "slide", "scene", "session", "sequence"}  # folders so called hold what a table labels
_NOTE_ENDINGS = (".json", ".xml", *LIST_ENDINGS)  # called like an image they are about that one alone
_TABLE_ENDINGS = (".csv", ".tsv", ".json", *LIST_ENDINGS)  # of files that may divide the images
_MANY_TABLES = 50  # in one folder: so many texts are notes on the images
_IMAGES = re.compile(
    r"(?<![^/])(?:images|img)/(?!.*/(?:images|img)/)"
)  # the folder that labels/ or Supervisely's ann/ lies beside
_BOXES = re.compile(r"\d+( -?\d*\.?\d+){4,}\s*$", re.MULTILINE)  # a line of YOLO: a class, then the box or outline
_DEPTH_OF_REPEATS, _MANY_FOLDERS = 3, 100  # folders further down or among more are classes or patients
_LONGEST_LABEL = 200  # characters; a longer text beside an image is a caption
_INSIDE = "an archive inside; unpack it first"
_OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "state.json")  # what save_to_disk writes beside its data
_CIFAR_FILES = ("test_batch", "batches.meta", *(f"data_batch_{n}" for n in range(1, 6)))
_NOT_OPENED = {
    "MNIST's own format; save the arrays as .npz (x_train, y_train)": ("-ubyte", "-ubyte.gz"),
    "a volume; save its slices as images": (".nii", ".nii.gz"),
    "a compressed table; unpack it first (gunzip)": (".csv.gz", ".tsv.gz", ".json.gz", ".jsonl.gz", ".txt.gz"),
    _INSIDE: (".zip", ".tar", ".gz", ".tgz"),
    "an archive of a kind that is not read; unpack it first": (".rar", ".7z", ".zst", ".lz4", ".z01"),
    "a piece of an archive; join the pieces (cat) and unpack it first": (".001", ".partaa", ".part1", ".aa"),
    "a spreadsheet; save it as CSV": (".xlsx", ".xls", ".xlsm", ".ods"),
    "a MATLAB file, which is not read; save what it says as CSV (columns path, label), or arrays as .npz": (".mat",),
    "TFRecords, which are not read; save the images as files, or in Parquet": (".tfrecord", ".tfrecords", ".tfrec"),
    "records of a kind that is not read; save the images as files, or in Parquet": (".rec", ".mdb", ".lmdb", ".beton"),
    "a database; save the table as CSV": (".db", ".sqlite", ".sqlite3"),
    "a table that is not read; give the folder of save_to_disk, or save it as Parquet or CSV": (
        ".arrow",
        ".feather",
        ".rds",
    ),
    "arrays; give the path of this file": (".npz",),
    "written by save_to_disk; give the path of its folder": ("dataset_dict.json",),
    "arrays of a kind that is not read; save them as .npz (X, y)": (".h5", ".hdf5", ".npy", ".bin"),
    "a pickle, which can run code; save what is in it as .npz or CSV": (".pkl", ".pickle", ".pt", ".pth", ".joblib"),
    "pickled CIFAR batches, which are not opened; save the arrays as .npz (X, y)": _CIFAR_FILES,
}

_Read = tuple[str, list[Entry], list[str]]  # a table's name, its rows, and sentences on what was assumed


def not_opened(name: str, *, itself: bool = False) -> str | None:
    """Why a file of this name is not opened, and the way out; ``itself``: it was given, so it may be an archive."""
    name = re.sub(r"-\d+-of-\d+$", "", name.lower())  # a numbered piece, such as x.tfrecord-00000-of-00002
    found = next((why for why, endings in _NOT_OPENED.items() if name.endswith(endings)), None)
    return None if found == _INSIDE and itself else found


def nothing_there(source: Path, listing: Listing, there: str = "") -> str:
    """Why no image has a label there, and what to try."""
    n_aside, is_table = len(listing.rejects), listing.layout == "table"
    noun = ("row" if is_table else "file") + (" is" if n_aside == 1 else "s are")
    first = f"; {escape(listing.rejects[0].path)}: {listing.rejects[0].reason}" if n_aside else ""
    looked = f" ({n_aside:,} {noun} not used{first})" if n_aside else ""
    if is_table:
        return f"{escape(str(source))}: no row has an image and its label{looked}."
    paths = [*(one.path for one in listing.rejects), *(one.path for one in listing.entries)]
    closed = next(((path, why) for path in paths if (why := not_opened(path))), None)
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
    if rules.label_regex is not None:
        listing = arrange(root, found, rules)
    else:
        found, notes = _without_repeats(found)
        listing = _chosen(root, found, rules)
        listing = replace(listing, notes=(*listing.notes, *notes))
    if listing.layout != "table":
        listing = _with_class_names(listing, found, rules)
    return with_parts_stated(_named_by_files(listing, rules), found.files, Files.of(found))


def _without_repeats(found: Found) -> tuple[Found, list[str]]:
    """The names without folders that repeat others, and a sentence on these: many archives of Kaggle hold their content twice."""
    repeats: dict[str, str] = {}
    tops = [tree_of(replace(found, files=[]))]
    for _ in range(_DEPTH_OF_REPEATS):
        for top in tops:
            alike: dict[str, Folder] = {}
            for own, folder in sorted(top.children.items()):
                others = (top, alike.setdefault(own.lower(), folder))
                same = next((one for one in others if _repeats(folder, one, found)), None)
                if same is not None:
                    repeats[folder.name] = same.name
        tops = [one for top in tops for one in top.children.values() if len(one.children) <= _MANY_FOLDERS]
    if not repeats:
        return found, []
    left_out = tuple(repeats)
    rejects = [Reject(name, f"the same files as in {other or './'}", expected=True) for name, other in repeats.items()]
    kept, folders = (
        [name for name in names if not f"{name}/".startswith(left_out)] for names in (found.files, found.folders)
    )
    note = f"Ignored, because the same files are next to them: {first_names(list(repeats))}."
    return replace(found, files=kept, folders=folders, rejects=[*found.rejects, *rejects]), [note]


def _repeats(folder: Folder, other: Folder, found: Found) -> bool:
    """Whether a folder of folders holds the same files as another one: all names are there, and the first and last file are equal."""
    inner = {name for name, child in other.children.items() if child is not folder}
    if other is folder or not folder.children or not inner.issuperset(folder.children):
        return False
    own = [name for name in found.files if name.startswith(folder.name)]
    same = [other.name + name.removeprefix(folder.name) for name in own]
    try:
        return (
            bool(own)
            and set(found.files).issuperset(same)
            and all(found.read(own[n]) == found.read(same[n]) for n in (0, -1))
        )
    except ImageError:
        return False


def _with_class_names(listing: Listing, found: Found, rules: Rules) -> Listing:
    """Numbered class folders get names from a file next to them, as in Udacity's flowers, or from ``--class-names``."""
    numbers: list[tuple[str, ...]] = [
        ((name.lstrip("0") or "0") if name.isdecimal() else name,) for name in listing.class_names
    ]
    place = look_through(tree_of(found)).name.rstrip("/")
    place = posixpath.dirname(place) if posixpath.basename(place).lower() in CONTAINER_NAMES else place
    named, said = named_labels(numbers, rules, Files.of(found, posixpath.join(place, "x")))
    if not said:
        return listing
    names = {folder: name for folder, (name,) in zip(listing.class_names, named, strict=True)}
    entries = tuple(replace(entry, label=names[entry.label]) for entry in listing.entries)
    class_names = tuple(sorted(names.values(), key=natural_key))
    return replace(listing, entries=entries, class_names=class_names, notes=(*listing.notes, f"Class folders{said}."))


def _named_by_files(listing: Listing, rules: Rules) -> Listing:
    """Class numbers of a table in the folder become names if each goes with one folder, as in DomainNet, or one word in the file names, as in Oxford's pets.

    A table that is given itself keeps its numbers, so that they are the same in other tables.
    """
    is_asked = rules.class_names is not None or rules.multi_label or listing.layout != "table"
    if is_asked or not all(map(str.isdecimal, listing.class_names)):
        return listing
    paths = [entry.path for entry in listing.entries]
    pattern = regex_for_names(paths)
    by_folder = [posixpath.basename(posixpath.dirname(path)) for path in paths]
    by_file = list(map(label_taker(pattern), paths)) if pattern is not None else []
    for words in (by_folder, by_file):
        pairs = set(zip((entry.label for entry in listing.entries), words, strict=False))
        names = {number: name for number, name in pairs if name and not name.isdecimal()}
        if len(pairs) == len(names) == len(set(names.values())) > 1 and not _are_pieces([*names.values()]):
            entries = [replace(entry, label=names[entry.label]) for entry in listing.entries]
            note = f"Class numbers named after the {'folders' if words is by_folder else 'files'} of their images."
            return make_listing(listing.root, listing.layout, entries, listing.rejects, [*listing.notes, note])
    return listing


def _chosen(root: Path, found: Found, rules: Rules) -> Listing:
    by_table, failures = _table_among(root, found, rules)
    try:
        by_folder = arrange(root, found, rules)
    except UsageError as error:
        if by_table is not None and by_table.covers_most and not by_table.is_guess:
            return by_table.listing
        more = _said(failures)
        if by_table is not None and by_table.is_clear and isinstance(error, AmbiguousError):
            more = [f"- The labels of the table: topwork fit {shlex.quote(str(root / by_table.name))}"]
        raise UsageError("\n".join([str(error), *more])) from None
    if by_table is None:
        return _without_table(root, found, rules, by_folder, failures)
    if (of_both := _with_labels_outside(by_folder, by_table.listing)) is not None:
        return of_both
    if not _are_classes(by_folder.class_names) or _are_groups(by_folder, by_table.listing):
        return by_table.listing
    if not by_table.covers_most and not _covers(by_table.listing, by_folder):
        return by_folder
    if (folder_of := _folder_of_label(by_folder, by_table.listing)) is not None:
        of_table, of_folder = ({one.part for one in found.entries} - {None} for found in (by_table.listing, by_folder))
        hints = [note for note in by_table.listing.notes if "--group-by" in note]
        with_hints = replace(by_folder, notes=(*by_folder.notes, *hints))
        if not of_table > of_folder:
            return with_hints
        names = {} if all(map(str.isdecimal, by_folder.class_names)) else folder_of
        entries = [replace(one, label=names.get(one.label, one.label)) for one in by_table.listing.entries]
        return make_listing(root, "table", entries, by_table.listing.rejects, by_table.listing.notes)
    path = str(root)
    raise UsageError(
        f"{escape(path)}: has two sets of labels that disagree; choose one:\n"
        f"- The labels of the table: topwork fit {shlex.quote(str(root / by_table.name))}\n"
        f"- The class folders {first_names(by_folder.class_names, 4)}: topwork fit {shlex.quote(path)} "
        "--label-regex '([^/]+)/[^/]+$'"
    )


def _without_table(root: Path, found: Found, rules: Rules, by_folder: Listing, failures: list[str]) -> Listing:
    """The labels of the folders or beside the images; ``failures`` says why no table has any."""
    has_classes = _are_classes(by_folder.class_names)
    several = next((text for text in failures if "several" in text), None)
    if not has_classes and several is None:
        try:
            if (listing := _by_sidecars(root, found, rules)) is not None:
                return listing
        except UsageError as error:
            failures = [str(error), *failures]
    if not has_classes and several is not None:
        raise UsageError(several)
    if not has_classes and _are_pieces(by_folder.class_names):
        asked = (
            f"{escape(str(root))}: the folders {first_names(by_folder.class_names, 4)} seem to be pieces or groups, not classes, and no table labels "
            f"their images. If they are the classes: topwork fit {shlex.quote(str(root))} --label-regex '([^/]+)/[^/]+$'"
        )
        raise UsageError("\n".join([asked, *_said(failures)]))
    if by_folder.entries and not _are_parts(by_folder.class_names):
        said = [] if has_classes else _said(failures)
        if len(by_folder.class_names) == 1 and (pattern := _pattern_of_names(found)) is not None:
            said.append(f"If the labels are in the file names: --label-regex {shlex.quote(pattern)}")
        return replace(by_folder, notes=(*by_folder.notes, *said))
    if (option := next((text for text in failures if text.startswith("--")), None)) is not None:
        raise UsageError(option)
    raise UsageError(_no_classes(root, found, by_folder, failures))


def _are_classes(names: Sequence[str]) -> bool:
    """Whether folders of these names, which hold images, are surely classes: none is called ``images`` or only numbered."""
    is_other = any(name.lower() in CONTAINER_NAMES for name in names) or _are_numbers(names) or _are_pieces(names)
    return len(names) > 1 and not _are_parts(names) and not is_other


def _are_parts(names: Sequence[str]) -> bool:
    """Whether some are train and others test folders, or some hold images and others their masks, as in Oxford's pets."""
    found = {name.lower() for name in names}
    has_both = bool(found & CONTAINER_NAMES) and bool(found & ANNOTATION_NAMES)
    return are_parts(names) or (has_both and found <= CONTAINER_NAMES | ANNOTATION_NAMES)


def _are_numbers(names: Sequence[str]) -> bool:
    return {re.sub("[0-9]+", "", name).strip("_- .") for name in names} == {""}


def _are_pieces(names: Sequence[str]) -> bool:
    """Whether most folder names number what they hold: images_part_1 and images_part_2, patient_7_node_1, but not n01440764."""
    stems = Counter(re.sub("[0-9]+", "", name).strip("_- .").lower() for name in names)
    ((stem, n),) = stems.most_common(1) or [("", 0)]
    words = set(re.findall("[a-z]+", stem))
    return n > 1 and 2 * n > len(names) and bool(words & (CONTAINER_NAMES | _PIECES | _GROUPS))


def _with_labels_outside(by_folder: Listing, by_table: Listing) -> Listing | None:
    """Adds a part labeled by a table next to class folders, such as Tiny ImageNet's ``val_annotations.txt``; None if it labels no such part.

    Numbers may have leading zeros in the names of the folders, as in GTSRB.
    """
    known = {entry.path for entry in by_folder.entries}
    names = {(name.lstrip("0") or "0") if name.isdecimal() else name: name for name in by_folder.class_names}
    more = [
        replace(one, label=names.get(one.label, ""), part=one.part or part_of_name(posixpath.dirname(one.path)))
        for one in by_table.entries
    ]
    is_same = all(one.label and one.part and one.path not in known for one in more)
    if not is_same or not all(entry.part for entry in by_folder.entries):
        return None
    folders = {f"{posixpath.dirname(entry.path)}/" for entry in more}
    notes = [note for note in by_folder.notes if not any(note.startswith(escape(folder)) for folder in folders)]
    rejects = [reject for reject in by_folder.rejects if reject.path not in folders]
    entries, notes = (*by_folder.entries, *more), [*notes, *by_table.notes]
    return make_listing(by_folder.root, by_folder.layout, entries, rejects, notes, by_folder.class_names)


def _said(failures: Sequence[str]) -> list[str]:
    return [f"Tables here: {failures[0]}"] if failures else []


def _pattern_of_names(found: Found) -> str | None:
    return regex_for_names([name for name in found.files if looks_like_image(name)])


def _no_classes(root: Path, found: Found, listing: Listing, failures: Sequence[str]) -> str:
    said = "".join(f" {one}" for one in _said(failures))
    pattern = _pattern_of_names(found)
    if pattern is None:
        folders = first_names(listing.class_names, 4)
        has_images = any(looks_like_image(entry.path) for entry in listing.entries)
        there = f"the folders {folders} hold images but no class folders. " if has_images else ""
        is_reason = failures and not there and not any(not_opened(reject.path) for reject in listing.rejects)
        return (
            f"{escape(str(root))}: no class folders here.{said}"
            if is_reason
            else nothing_there(root, listing, there) + said
        )
    return (
        f"{escape(str(root))}: no class folders and no table of labels here. If the labels are in the file names: "
        f"topwork fit {shlex.quote(str(root))} --label-regex '{pattern}'{said}"
    )


# ---- tables among the files


@dataclass(frozen=True)
class _ByTable:
    """Labels from the tables in a folder. ``covers_most``: they name most of the images; ``is_guess``: only their content speaks for the column."""

    name: str
    listing: Listing
    covers_most: bool
    is_guess: bool

    @property
    def is_clear(self) -> bool:
        """Whether at most a third of its rows cannot be used."""
        return 2 * sum(not one.expected for one in self.listing.rejects) <= len(self.listing.entries)


def _table_among(root: Path, found: Found, rules: Rules) -> tuple[_ByTable | None, list[str]]:
    """The table that labels the images of a folder, or the tables of its parts; else why there is none.

    Raises:
        UsageError: several tables qualify, or none has the requested columns.
    """
    usable: list[_Read] = []
    failed: list[str] = []
    for name in _names_of_tables(found):
        read = _read_among(name, found, rules)
        if isinstance(read, tuple):
            usable.append(read)
        elif read:
            failed.append(read)
    if not usable:
        if failed and (rules.path_column is not None or rules.label_column is not None):
            raise UsageError(failed[0])
        # A text file need not be a table; an error about a missing option means that it is one.
        is_list = [text.split(":")[0].lower().endswith(LIST_ENDINGS) for text in failed]
        return None, [
            text for text, is_text in zip(failed, is_list, strict=True) if not is_text or "--multi-label" in text
        ]
    if len(usable) > 1:
        usable = _parts_of_tables(root, usable)
    is_guess = any(GUESSED in note for _, _, notes in usable for note in notes)
    if is_guess and any("several columns" in text for text in failed):  # such as those of train, but not of test
        return None, failed
    rows = [row for _, own, _ in usable for row in own]
    notes = [note for _, _, own in usable for note in own]
    notes += [f"Not used: {text}" for text in failed if "--multi-label" in text][:1]
    listing = listing_of(root, "table", _with_parts_of_folders(found, rows), rules, notes)
    images = set(Files.of(found).names)
    listed = {entry.path for entry in listing.entries}
    not_named = Counter(f"{posixpath.dirname(name)}/".lstrip("/") or "./" for name in sorted(images - listed))
    aside = [
        Reject(folder, f"{n:,} images that the table does not name", expected=True) for folder, n in not_named.items()
    ]
    listing = replace(listing, rejects=(*listing.rejects, *found.rejects, *aside))
    return _ByTable(usable[0][0], listing, 10 * len(listed & images) >= 8 * len(images), is_guess), []


def _read_among(name: str, found: Found, rules: Rules) -> _Read | str:
    """The rows of a table that labels images here; else why it is none, or "" if it is another text."""
    files = Files.of(found, name)
    try:
        rows, notes = rows_of(read_table(name, files.read(name), rules.encoding), files, rules)
    except UsageError as error:
        return str(error)  # not the error, whose frames would keep an archive open
    known = set(files.names)
    n_there = sum(row.path in known for row in rows)
    if 2 * n_there >= len(rows) > 0 and any(row.label for row in rows):
        return name, rows, notes
    if name.lower().endswith(LIST_ENDINGS):
        return ""
    lacks = f"{n_there:,} of the {count(len(rows), 'file')} that it names are here"
    return f"{escape(name)}: {lacks if 2 * n_there < len(rows) else 'it labels no image'}."


def _names_of_tables(found: Found) -> list[str]:
    """Files with the ending of a table next to the folders of images or in the folders of the parts."""
    stems = {own for name in found.files if looks_like_image(name) for own in (_stem(name), posixpath.basename(name))}
    names = [name for name in found.files if _may_hold_labels(name, stems)]
    n_in = Counter(map(posixpath.dirname, names))
    names = [name for name in names if n_in[posixpath.dirname(name)] <= _MANY_TABLES]
    if not names:
        return []
    top = look_through(tree_of(found))
    parts = [one.name for folder in top.full.values() for one in _around_images(folder)]
    above = {"", *folders_of(top.name)}
    beside = [f"{folder}/" for folder in found.folders if folder in above or posixpath.dirname(folder) in above]
    folders = {"", *parts, *beside}
    return [name for name in names if f"{posixpath.dirname(name)}/".lstrip("/") in folders]


def _around_images(folder: Folder) -> Iterator[Folder]:
    """The folders around the one with the images or the class folders in it, such as both of ``Test_Set/Test_Set/Test``."""
    yield folder
    while not folder.n_direct and len(folder.full) == 1:
        (folder,) = folder.full.values()
        yield folder


def _may_hold_labels(name: str, stems: set[str]) -> bool:
    """Whether a name is that of a table; ``stems`` are those of the images, of which notes may be called after one."""
    own = name.lower()
    is_list = own.endswith(LIST_ENDINGS)
    is_note = own.endswith(_NOTE_ENDINGS) and _stem(name) in stems
    is_other = "submission" in own or own.endswith(_OF_DATASETS) or _is_class_file(name) or (is_list and _divides(name))
    return own.endswith(ENDINGS) and not is_note and not is_other


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]


def _parts_of_tables(root: Path, usable: list[_Read]) -> list[_Read]:
    """Tables named train, valid and test, or in folders with these names; else the one with most rows."""
    parts = {name: part for name, _, _ in usable if (part := part_of_name(name)) is not None}
    whole = _with_others(usable, parts)
    usable = [one for one in usable if one[0] not in whole]
    parts = {name: part for name, part in parts.items() if name not in whole}
    n_rows = {name: len(rows) for name, rows, _ in usable}
    largest = max((n for name, n in n_rows.items() if name not in parts), default=0)
    if len(set(parts.values())) > 1 and sum(n_rows[name] for name in parts) >= largest:
        found = [
            (name, [replace(row, part=row.part or parts[name]) for row in rows], notes)
            for name, rows, notes in usable
            if name in parts
        ]
        if not _contradict([rows for _, rows, _ in found]):
            return found
    sizes = sorted((len({row.path for row in rows}) for _, rows, _ in usable), reverse=True)
    if sizes[0] < 1.5 * sizes[1]:
        lines = [f"- topwork fit {shlex.quote(str(root / name))}" for name, _, _ in usable[:8]]
        lines += [f"- and {len(usable) - 8:,} more"] * (len(usable) > 8)
        raise UsageError(f"{escape(str(root))}: several tables have labels; choose one:\n" + "\n".join(lines))
    return [max(usable, key=lambda item: len({row.path for row in item[1]}))]


def _with_others(usable: list[_Read], parts: Mapping[str, str]) -> set[str]:
    """Tables of a part that hold those of another, such as ``trainval.txt`` beside ``train.txt`` and ``val.txt``."""
    images = {name: {row.path for row in rows} for name, rows, _ in usable if name in parts}
    return {
        name
        for name, own in images.items()
        if any(parts[one] != parts[name] and images[one] <= own for one in images)
        and any(parts[one] == parts[name] and images[one] < own for one in images)
    }


def _contradict(tables: Sequence[Sequence[Entry]]) -> bool:
    """Whether half of the images in several tables have two labels, as in tables of the genus and of the species."""
    labels: dict[str, list[str]] = {}
    for rows in tables:
        for path, label in {row.path: row.label for row in reversed(rows)}.items():
            labels.setdefault(path, []).append(label)
    several = [set(own) for own in labels.values() if len(own) > 1]
    return 2 * sum(len(own) > 1 for own in several) > len(several)


def _with_parts_of_folders(found: Found, rows: list[Entry]) -> list[Entry]:
    """Rows without a part get that of the folder of their image, if the images lie in several parts."""
    if any(row.part for row in rows):
        return rows
    top = look_through(tree_of(found))
    parts = {top.full[name].name: part for name, part in parts_among(top.full).items() if part != "unlabeled"}
    of_row = [next((part for folder, part in parts.items() if row.path.startswith(folder)), None) for row in rows]
    if len({part for part, row in zip(of_row, rows, strict=True) if part and row.label}) < 2:
        return rows
    return [replace(row, part=part) for row, part in zip(rows, of_row, strict=True)]


def _covers(by_table: Listing, by_folder: Listing) -> bool:
    """Whether a table names most of the images that class folders label, if not those of an unlabeled test folder."""
    listed = {entry.path for entry in by_table.entries}
    return 10 * sum(entry.path in listed for entry in by_folder.entries) >= 8 * len(by_folder.entries)


def _are_groups(by_folder: Listing, by_table: Listing) -> bool:
    """Whether the folders are the groups of a table that names folders, such as patients, and so no classes."""
    group_of = {entry.path: entry.group for entry in by_table.entries}
    groups = [group_of.get(entry.path) for entry in by_folder.entries if entry.path in group_of]
    own = {entry.path: entry.label for entry in by_folder.entries if entry.path in group_of}
    return bool(own) and list(own.values()) == groups


def _folder_of_label(by_folder: Listing, by_table: Listing) -> dict[str, str] | None:
    """The folder of each label in the table; None unless each folder has one label and each label one folder."""
    label_of = {entry.path: entry.label for entry in by_table.entries}
    pairs = {(label_of[entry.path], entry.label) for entry in by_folder.entries if entry.path in label_of}
    folder_of = dict(pairs)
    return folder_of if len(folder_of) == len(pairs) == len(set(folder_of.values())) else None


# ---- labels in a file beside each image


def _by_sidecars(root: Path, found: Found, rules: Rules) -> Listing | None:
    beside = rows_beside(Files.of(found), rules)
    if beside is None:
        return None
    listing = listing_of(root, "table", _with_parts_of_folders(found, beside[0]), rules, beside[1])
    return replace(listing, rejects=(*listing.rejects, *found.rejects))


def rows_beside(files: Files, rules: Rules) -> tuple[list[Entry], list[str]] | None:
    """A row for each image, and sentences on what was assumed; None unless nine of ten have such a file.

    The file lies next to the image or, as in YOLO's datasets, in ``labels/`` next to ``images/``.

    Raises:
        UsageError: none of the keys in the JSON files is a label, or the files hold boxes.
    """
    every, images = set(files.list_all()), files.names
    for ending in (".cls", ".json", ".txt", ".xml"):
        sides = {image: side for image in images if (side := _side_of(image, ending, every)) is not None}
        if sides and ending == ".xml":
            raise UsageError(_boxes_in(ending))
        if sides and 10 * len(sides) >= 9 * len(images):
            table = _table_beside(ending, images, sides, files)
            return rows_of(table, files, rules) if table is not None else None
    return None


def _side_of(image: str, ending: str, every: set[str]) -> str | None:
    names = (posixpath.splitext(image)[0], image)
    places = [name for one in names for name in (one, _IMAGES.sub("labels/", one), _IMAGES.sub("ann/", one))]
    return next((side for one in places if (side := one + ending) in every), None)


def _boxes_in(ending: str) -> str:
    return (
        f"the {ending} files beside the images hold boxes or outlines of objects, which are not labels of whole images. Write a table with the "
        "columns path and label."
    )


def _table_beside(ending: str, images: Sequence[str], sides: Mapping[str, str], files: Files) -> Table | None:
    """The labels in these files; None if they hold captions or anything else.

    Raises:
        UsageError: they hold boxes.
    """
    name = f"the {ending} files beside the images"
    try:
        texts = {image: decoded(side, files.read(side))[0].strip() for image, side in sides.items()}
        if ending == ".json":
            objects = {image: json.loads(text) for image, text in texts.items()}
            own = {image: {key: value for key, value in one.items() if key != "path"} for image, one in objects.items()}
            return table_of_rows(name, [{"path": image, **own.get(image, {})} for image in images])
    except (ImageError, UsageError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    labels = set(texts.values())
    if any(map(_BOXES.match, labels)):
        raise UsageError(_boxes_in(ending))
    is_label = len(labels) <= max(2, len(texts) / 2) and all(
        "\n" not in one and len(one) < _LONGEST_LABEL for one in labels
    )
    return table_of_rows(name, [{"path": image, "label": texts.get(image)} for image in images]) if is_label else None


# ---- parts stated by lists and tables without labels, as official splits are published


def _is_class_file(name: str) -> bool:
    """Whether the name of a text file suggests class names or documentation."""
    own = posixpath.basename(name).lower()
    words = ("class", "readme", "license", "licence", "names")
    return own.endswith(LIST_ENDINGS) and any(word in own for word in words)


def with_parts_stated(listing: Listing, names: Sequence[str], files: Files) -> Listing:
    """Gives images the parts that lists among the files ``names`` state.

    Lists that contradict each other or leave out more than a tenth of the images are ignored.
    """
    if any(entry.part for entry in listing.entries):
        return listing
    lists = {name: part for name in names if (part := _part_of_list(name)) is not None}
    sources = sorted(lists) if len(set(lists.values())) > 1 else []
    stated = [(path, lists[name]) for name in sources for path in _paths_in(name, files)]
    if not stated:
        sources = [name for name in names if _divides(name)][:1]
        stated = _pairs_in(sources[0], names, files) if sources else []
    part_of: dict[str, str] = {}
    for path, part in stated:
        named = files.named(path)
        if len(named) == 1 and part_of.setdefault(named[0], part) != part:
            return listing
    known = [part_of[entry.path] for entry in listing.entries if entry.path in part_of]
    if len(set(known)) < 2 or 10 * len(known) < 9 * len(listing.entries):
        return listing
    entries = tuple(replace(entry, part=part_of.get(entry.path)) for entry in listing.entries)
    note = f"Train, valid and test parts from {first_names(sources, 3)}."
    return replace(listing, entries=entries, notes=(*listing.notes, note))


def _part_of_list(name: str) -> str | None:
    """The part in the name of a text list: ``train_val_list.txt`` is for training."""
    own = posixpath.basename(name).lower()
    if not own.endswith(LIST_ENDINGS) or _is_class_file(name):
        return None
    found = set(parts_in(own))
    return "train" if found == {"train", "valid"} else found.pop() if len(found) == 1 else None


def _paths_in(name: str, files: Files) -> list[str]:
    """The lines of a list; none if they hold more than a path."""
    try:
        columns = read_table(name, files.read(name)).columns
    except UsageError:
        return []
    return [str(path) for path in columns["path"]] if set(columns) == {"path"} else []


def _divides(name: str) -> bool:
    """Whether the name of a file suggests that it gives the part of each image; ``train_split.txt`` holds one part."""
    own = posixpath.basename(name).lower()
    return own.endswith(_TABLE_ENDINGS) and ("partition" in own or ("split" in own and _part_of_list(name) is None))


def _pairs_in(name: str, names: Sequence[str], files: Files) -> list[tuple[str, str]]:
    """(path, part) rows of a table of these two columns; numbers refer to paths in ``images.txt`` next to it."""
    parts = {"0": "test", "1": "train"} if "train_test" in name.lower() else NUMBERED_PARTS
    pairs = [
        (key, part)
        for key, value in _two_columns(name, files)
        if (part := parts.get(value) or PART_NAMES.get(value.lower())) is not None
    ]
    numbering = posixpath.join(posixpath.dirname(name), "images.txt")
    if numbering not in names:
        return pairs
    path_of = dict(_two_columns(numbering, files))
    return [(path_of[key], part) for key, part in pairs if key in path_of]


def _two_columns(name: str, files: Files) -> list[tuple[str, str]]:
    """The lines of a text of two columns, or the names by part in a JSON file; none if any line has more or fewer."""
    try:
        if name.lower().endswith(".json"):
            columns = read_table(name, files.read(name)).columns
            cells = (map(str, column) for column in columns.values())
            return list(zip(*cells, strict=True)) if list(columns) == ["path", "split"] else []
        text, _ = decoded(name, files.read(name))
    except UsageError:
        return []
    lines = [re.fullmatch(r"(\S.*?)\s*[\s,;]\s*(\S+)", line.strip()) for line in text.splitlines() if line.strip()]
    return [(match[1], match[2]) for match in lines if match] if all(lines) else []
