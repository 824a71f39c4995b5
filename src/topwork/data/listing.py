"""Lists the files of a dataset, in any supported layout, and reads them.

In: a path. Out: a :class:`Listing`: entries (path, label, part, ...) in natural order and what is not used with the reason.
Nothing is decoded here. Labels from names are in ``layouts.py``, from tables in ``tables.py`` and ``columns.py``.
``readings.py`` chooses if a folder or an archive has both.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import shlex
import stat
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

from topwork.data import archives, embedded, remote
from topwork.data.columns import listing_of, rows_of
from topwork.data.folders import MAX_TABLE_BYTES, Found, is_run, read_regular_file, walk_folder
from topwork.data.images import select_bands
from topwork.data.layouts import looks_like_image, make_listing, part_of_name
from topwork.data.named_files import Files
from topwork.data.readings import list_names, not_opened, nothing_there, rows_beside, with_parts_stated
from topwork.data.samples import LABEL_SEPARATOR, Entry, Listing, Reject, Rules
from topwork.data.tables import ENDINGS, read_table
from topwork.errors import ImageError, NoLabelColumnError, TopworkError, UsageError
from topwork.files import error_reason
from topwork.text import escape, first_names

_MISSING = ("nan", "n/a", "#n/a", "na", "null", "none", "?")  # what programs write for a missing label
ANY_LABEL = "(.)"  # as ``--label-regex``: a meaningless label for every file
_ARCHIVE_ENDINGS = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
_CONTAINER_ENDINGS = (*_ARCHIVE_ENDINGS, ".parquet", ".npz")


def list_data(path: str | os.PathLike[str], rules: Rules | None = None) -> Listing:
    """Finds the images below a folder, in an archive, or those named by a table.

    Args:
        path: folder of class folders; folder with train/valid/test folders; folder of images with a table; tar or zip archive
            of any of these, or a folder or table in it; a URL that fsspec knows of any of these; table (CSV, TSV, text list, JSON, JSON Lines, Parquet, CVAT XML);
            Parquet or NumPy file that holds the images; folder that ``datasets.save_to_disk`` wrote.

    Raises:
        UsageError: no such path, two ways to read it, missing columns, nothing that could be an image.
    """
    rules = rules or Rules()
    source = Path(path).expanduser() if not remote.is_url(path) else Path(path)
    listing = _list(source, rules)
    if not listing.entries or (listing.layout in ("folders", "parts") and _is_closed(listing.entries)):
        raise UsageError(nothing_there(source, listing))
    if listing.layout not in ("table", "hub"):
        _check_no_table_needed(listing, rules)
    return limited(_with_alike_named(listing if rules.multi_label else _merged_parts(listing), rules), rules)


def _is_closed(entries: Sequence[Entry]) -> bool:
    """Whether all files are of kinds that are not opened, or texts beside them."""
    others = [one.path for one in entries if not not_opened(one.path)]
    return len(others) < len(entries) and all(name.lower().endswith(ENDINGS) for name in others)


def _plain(name: str) -> str:
    """A class name without case, outer spaces and Unicode form."""
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _merged_parts(listing: Listing) -> Listing:
    """Classes whose names differ only in case or spaces become one if no part has two of them, such as ``train/Cat`` and ``test/cat``."""
    names: dict[str, set[str]] = {}
    for name in listing.class_names:
        names.setdefault(_plain(name), set()).add(name)
    alike = {name: plain for plain, found in names.items() if len(found) > 1 for name in found}
    if not alike or not any(entry.part for entry in listing.entries):
        return listing
    in_part: dict[tuple[str, str | None], set[str]] = {}
    for entry in listing.entries:
        if entry.label in alike:
            in_part.setdefault((alike[entry.label], entry.part), set()).add(entry.label)
    several = {plain for (plain, part), found in in_part.items() if len(found) > 1 or part is None}
    chosen: dict[str, str] = {}
    for plain in {*alike.values()} - several:
        of_parts = [found for part in ("train", "valid", "test") for found in in_part.get((plain, part), ())]
        chosen |= {name: of_parts[0] for name in names[plain] if of_parts}
    if not chosen:
        return listing
    entries = tuple(replace(entry, label=chosen.get(entry.label, entry.label)) for entry in listing.entries)
    class_names = tuple(dict.fromkeys(chosen.get(name, name) for name in listing.class_names))
    note = f"Class names written differently in different parts, merged: {first_names(sorted(chosen), 8)}."
    return replace(listing, entries=entries, class_names=class_names, notes=(*listing.notes, note))


def _with_alike_named(listing: Listing, rules: Rules) -> Listing:
    """The listing with notes on classes that may be meant as one, or as none."""
    alike: dict[str, set[str]] = {}
    for name in listing.class_names:
        for one in name.split(LABEL_SEPARATOR) if rules.multi_label else [name]:
            alike.setdefault(_plain(one), set()).add(one)
    notes = [
        f"Class names that differ only in case, spaces or Unicode form: {first_names(sorted(names), 8)}."
        for names in alike.values()
        if len(names) > 1
    ]
    missing = [escape(min(alike[word])) for word in _MISSING if word in alike and len(alike) > 1]
    if "-1" in alike and len(alike) > 2 and all(name.isdecimal() for name in alike if name != "-1"):
        missing.append("-1")
    if missing and listing.layout in ("table", "hub"):
        verb = "is read as a class" if len(missing) == 1 else "are read as classes"
        notes.append(f"{', '.join(missing)} {verb}. If it means that the label is missing, leave these cells empty.")
    return replace(listing, notes=(*listing.notes, *notes))


def _check_no_table_needed(listing: Listing, rules: Rules) -> None:
    for name in ("root", "path_column", "label_column", "split_column", "encoding", "label_separator"):
        if getattr(rules, name) is not None:
            option = f"--{name.replace('_', '-')} {escape(str(getattr(rules, name)))}"
            raise UsageError(
                f"{option} has no effect: the labels of {escape(str(listing.root))} do not come from a table."
            )


def limited(listing: Listing, rules: Rules) -> Listing:
    """At most ``limit_per_class`` images of each class in each part.

    The draw depends on the seed and the file's own name, not on its folder: the same files in another layout are drawn
    alike, and no file has to be read for it.
    """
    n = rules.limit_per_class
    if n is None:
        return listing
    if n < 1:
        raise UsageError(f"--limit-per-class {n}: must be at least 1.")

    def lot(entry: Entry) -> tuple[bytes, str]:
        text = f"{rules.seed} {entry.label} {entry.path.rsplit('/', 1)[-1]}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), entry.path

    taken: dict[tuple[str, str | None], int] = {}
    kept = set()
    for entry in sorted(listing.entries, key=lot):
        key = entry.label, entry.part
        if taken.setdefault(key, 0) < n:
            taken[key] += 1
            kept.add(entry.path)
    n_left = len(listing.entries) - len(kept)
    notes = [f"{n_left} images left out by --limit-per-class {n}."] if n_left else []
    entries = tuple(entry for entry in listing.entries if entry.path in kept)
    return replace(listing, entries=entries, notes=(*listing.notes, *notes))


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
    if stat.S_ISDIR(mode) and embedded.is_saved_dataset(source):
        return embedded.list_saved_dataset(source, rules)
    if stat.S_ISDIR(mode):
        return _list_folder(source, walk_folder(source), rules)
    if stat.S_ISREG(mode):
        ending = source.suffix.lower()
        if ending == ".npz":
            return embedded.list_arrays(source, rules)
        if ending == ".parquet" and embedded.holds_images(source):
            return embedded.list_parquet(source, rules)
        if ending in ENDINGS:
            return _list_table(source, rules)
        if not_opened(source.name, itself=True) is None and archives.is_archive(source):
            return _list_archive(source, "", rules)
    raise UsageError(f"{escape(str(source))}: {_why_not(source.name)}")


def _why_not(name: str) -> str:
    """Why a file is not a dataset."""
    closed = not_opened(name, itself=True)
    if closed is not None:
        return f"{closed}."
    if looks_like_image(name):
        return "one image, not a dataset. Give the folder of class folders that it is in; to classify it: topwork predict RUN IMAGE."
    if name.lower().endswith(_ARCHIVE_ENDINGS):
        return "not the archive that its name says. If the download was cut short or failed, download it again."
    return (
        f"neither a folder, a tar or zip archive, nor a table ({', '.join(ENDINGS)}, .npz). "
        "Give a folder with one folder per class, or a table with the columns path and label."
    )


def _list_folder(root: Path, found: Found, rules: Rules) -> Listing:
    """A folder of class folders or with a table, or one of files that hold the images."""
    if is_run(found.files):
        raise UsageError(f"{escape(str(root))}: a run or model, not images. Give a folder of class folders or a table.")
    if not any(map(looks_like_image, found.files)):
        for list_files, ending in ((_list_parquets, ".parquet"), (_list_shards, ".tar")):
            places = {name: root / name for name in found.files if name.lower().endswith(ending)}
            copies = {name: remote.local_copy(place) for name, place in places.items()}
            if copies and (listing := list_files(root, found, copies, rules)) is not None:
                return listing
    return list_names(root, found, rules)


def _list_parquets(root: Path, found: Found, copies: dict[str, Path], rules: Rules) -> Listing | None:
    """Parquet files with images, as on the Hugging Face Hub: ``data/train-00000-of-00004.parquet``."""
    entries, rejects = [], list(found.rejects)
    notes: list[str] = []
    names = [name for name, copy in copies.items() if embedded.holds_images(copy)]
    _check_one_configuration(root, names)
    for name in names:
        part = part_of_name(name)
        try:
            listed = embedded.list_parquet(copies[name], rules)
        except NoLabelColumnError:
            if len(names) < 2 or part not in ("valid", "test"):
                raise
            rejects.append(Reject(name, "no column of labels", expected=True))
            continue
        entries += [replace(one, path=f"{name}/{one.path}", part=one.part or part) for one in listed.entries]
        rejects += [replace(one, path=f"{name}/{one.path}") for one in listed.rejects]
        notes += listed.notes
    return make_listing(root, "table", entries, rejects, notes) if names else None


def _check_one_configuration(root: Path, names: Sequence[str]) -> None:
    """Raises UsageError if several folders, none of them called after a part, hold files of the same names: other sizes or tasks."""
    places: dict[str, list[str]] = {}
    for folder, own in map(posixpath.split, names):
        places.setdefault(own, []).append("/".join(one for one in folder.split("/") if part_of_name(one) is None))
    several = sorted(set(next((found for found in places.values() if len(set(found)) > 1), ())))
    if several:
        lines = [f"- topwork fit {shlex.quote(str(root / place))}" for place in several[:8]]
        raise UsageError(f"{escape(str(root))}: several configurations of a dataset; choose one:\n" + "\n".join(lines))


def _list_shards(root: Path, found: Found, copies: dict[str, Path], rules: Rules) -> Listing | None:
    """Tar shards with a label beside each image, as WebDataset writes them; the name of a shard gives the part."""
    opened = {name: archives.open_archive(copy) for name, copy in copies.items()}
    rejects = [replace(one, path=f"{name}/{one.path}") for name, archive in opened.items() for one in archive.rejects]
    members = {f"{name}/{member}": name for name, archive in opened.items() for member in archive.names}

    def read(path: str) -> bytes:
        if (shard := members.get(path)) is not None:
            return archives.read_member(copies[shard], path.removeprefix(f"{shard}/"))
        return found.read(path)

    beside = rows_beside(Files(members.__contains__, lambda: list(members), read, beside=found.files), rules)
    if beside is None:
        return None
    rows, notes = beside
    parts = {name: part_of_name(name) for name in copies}
    if len(set(parts.values()) - {None}) > 1:
        rows = [replace(row, part=row.part or parts[members[row.path]]) for row in rows]
    listing = listing_of(root, "table", rows, rules, notes)
    return replace(listing, rejects=(*listing.rejects, *found.rejects, *rejects))


def _list_remote(source: Path, rules: Rules) -> Listing:
    """A folder behind a URL is read file by file; an archive, Parquet or NumPy file is copied into the cache."""
    if remote.is_folder(source):
        return _list_folder(source, remote.walk(source), rules)
    copy, ending = remote.local_copy(source), source.suffix.lower()
    if ending in ENDINGS and not (ending == ".parquet" and embedded.holds_images(copy)):
        return _list_table(source, rules)
    try:
        return replace(_list(copy, rules), root=source)
    except UsageError as error:
        raise UsageError(str(error).replace(str(copy), remote.url_of(source))) from None


def _list_archive(path: Path, inner: str, rules: Rules) -> Listing:
    """An archive of class folders, or a folder or table in one."""
    archive = archives.open_archive(path)

    def read(name: str) -> bytes:
        return archives.read_member(path, name)

    found = Found(archive.names, archive.folders, archive.rejects, read=read)
    if inner in archive.members:
        files = Files.of(found, inner)
        rows, notes = rows_of(read_table(inner, files.read(inner), rules.encoding), files, rules)
        return listing_of(path, "table", rows, rules, notes)
    if inner:
        below = f"{inner}/"
        found.files, found.folders = (
            [name for name in names if name.startswith(below)] for names in (found.files, found.folders)
        )
        if not found.files:
            raise UsageError(f"{escape(str(path))}: the archive has no folder or table {escape(inner)}.")
    return list_names(path, found, rules)


# ---- a table


def _list_table(source: Path, rules: Rules) -> Listing:
    root = Path(rules.root) if rules.root else source.parent
    # The files of a web server cannot be listed: what a table names is taken to exist until it is read.
    is_web = remote.is_url(root) and remote.url_of(root).lower().startswith(("http://", "https://"))

    def list_all() -> list[str]:
        if not remote.is_url(root):
            return walk_folder(root).files
        return [] if is_web else remote.walk(root).files

    known = cache(lambda: frozenset(list_all()))

    def exists(name: str) -> bool:
        if is_web or remote.is_url(name):
            return True
        path = name if name.startswith("/") else f"{root}/{name}"
        return name in known() if remote.is_url(root) else os.path.lexists(path)

    def read(name: str) -> bytes:
        path = source.parent / name
        return (remote.read if remote.is_url(path) else read_regular_file)(path, MAX_TABLE_BYTES)

    try:
        data = read(source.name)
    except ImageError as error:
        raise UsageError(f"{escape(str(source))}: cannot be read: {error}.") from None
    beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
    files = Files(exists, list_all, read, source.name, beside=[name for name in beside if name != source.name])
    rows, notes = rows_of(read_table(source.name, data, rules.encoding), files, rules)
    return with_parts_stated(listing_of(root, "table", rows, rules, notes), files.beside, files)


def is_flat(path: Path) -> bool:
    """Whether a path is a folder that directly contains images and no folders, so that its images have no labels."""
    if remote.is_url(path):
        return remote.is_folder(path) and not remote.walk(path).folders
    try:
        return path.is_dir() and not any(one.is_dir() and not one.name.startswith(".") for one in path.iterdir())
    except OSError:
        return False  # the scan names the reason


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
    """A file below a folder or a URL, or what a file has inside: the root, or a Parquet or tar file below it."""
    if remote.is_url(path):
        return remote.read(path)
    inner = re.match(r"(.+?\.(?:parquet|tar))/(.+)", path)
    if inner is not None and (remote.is_url(root) or (root / inner[1]).is_file()):
        root, path = root / inner[1], inner[2]
    if remote.is_url(root):
        if root.suffix.lower() not in _CONTAINER_ENDINGS:
            return remote.read(root / path)
        root = _copy_of(root)
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise ImageError(error_reason(error)) from None
    if not is_folder:
        readers = {".parquet": embedded.read_parquet_row, ".npz": embedded.read_array}
        return readers.get(root.suffix.lower(), archives.read_member)(root, path)
    return embedded.read_saved_row(root, path) if embedded.is_saved_dataset(root) else read_regular_file(root / path)


@lru_cache(maxsize=1024)
def _copy_of(root: Path) -> Path:
    """Cached per process, because asking for the version of a remote file takes as long as reading an image."""
    try:
        return remote.local_copy(root)
    except TopworkError as error:
        raise ImageError(str(error)) from None
