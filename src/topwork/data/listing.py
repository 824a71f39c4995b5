"""Lists the files of a dataset, in any supported layout, and reads them.

In: a path. Out: a :class:`Listing`: entries (path, label, part, ...) in reading order and what is not used with the reason.
Nothing is decoded here. Labels from names are in ``layouts.py``, from tables in ``tables.py`` and ``columns.py``.
``readings.py`` chooses if a folder or an archive has both.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

from topwork.data import archives, arrays, embedded, hub, layouts, remote
from topwork.data.bands import select_bands
from topwork.data.columns import listing_of, meaning_of, rows_of
from topwork.data.folders import read_regular_file, walk_folder
from topwork.data.layouts import Found, looks_like_image
from topwork.data.named_files import Files
from topwork.data.part_lists import with_parts_stated
from topwork.data.patterns import limited
from topwork.data.readings import bytes_of, files_of, list_names, not_opened, nothing_there
from topwork.data.samples import LABEL_SEPARATOR, Listing, Rules
from topwork.data.sidecars import list_shards
from topwork.data.tables import ENDINGS, Table, read_table
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.files import error_reason
from topwork.text import escape, first_names

_MAX_TABLE_BYTES = 1 << 30
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
    source = Path(path).expanduser() if not remote.is_url(path) else Path(path)
    listing = _list(source, rules)
    if not listing.entries:
        raise UsageError(nothing_there(source, listing))
    if listing.layout not in ("table", "hub"):
        _check_no_table_needed(listing, rules)
    return limited(_with_alike_named(listing, rules), rules)


def _with_alike_named(listing: Listing, rules: Rules) -> Listing:
    """The listing with a note on classes that may be meant as one."""
    alike: dict[str, set[str]] = {}
    for name in listing.class_names:
        for one in name.split(LABEL_SEPARATOR) if rules.multi_label else [name]:
            alike.setdefault(unicodedata.normalize("NFKC", one).casefold().strip(), set()).add(one)
    notes = [
        f"Class names that differ only in case, spaces or Unicode form: {first_names(sorted(names), 8)}."
        for names in alike.values()
        if len(names) > 1
    ]
    if "nan" in alike and len(alike) > 1:
        name = escape(min(alike["nan"]))
        notes.append(f"{name} is read as a class. If it means that the label is missing, leave these cells empty.")
    return replace(listing, notes=(*listing.notes, *notes))


def _check_no_table_needed(listing: Listing, rules: Rules) -> None:
    for name in ("root", "path_column", "label_column", "split_column", "encoding", "label_separator"):
        if getattr(rules, name) is not None:
            option = f"--{name.replace('_', '-')} {escape(str(getattr(rules, name)))}"
            raise UsageError(
                f"{option} has no effect: the labels of {escape(str(listing.root))} do not come from a table."
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
        return _list_containers(source, found, rules) or list_names(source, found, rules)
    if stat.S_ISREG(mode) and source.suffix.lower() == ".npz":
        return arrays.list_arrays(source, rules)
    if stat.S_ISREG(mode) and source.suffix.lower() in ENDINGS:
        if source.suffix.lower() == ".parquet" and embedded.holds_images(source):
            return embedded.list_embedded(source, rules)
        return _list_table(source, rules)
    if stat.S_ISREG(mode) and not_opened(source.name, itself=True) is None and archives.is_archive(source):
        return _list_archive(source, "", rules)
    raise UsageError(f"{escape(str(source))}: {_why_not(source.name)}")


def _why_not(name: str) -> str:
    """Why a file is not a dataset."""
    closed = not_opened(name, itself=True)
    if closed is not None:
        return f"{closed}."
    if looks_like_image(name):
        return "one image, not a dataset. Give the folder of class folders that it is in; to classify it: topwork predict RUN IMAGE."
    return (
        f"neither a folder, a tar or zip archive, nor a table ({', '.join(ENDINGS)}, .npz). "
        "Give a folder with one folder per class, or a table with the columns path and label."
    )


def _list_containers(root: Path, found: Found, rules: Rules) -> Listing | None:
    """A folder of Parquet or tar shards; None otherwise."""
    return _list_parquets(root, found, rules) or list_shards(root, found, rules)


def _list_parquets(root: Path, found: Found, rules: Rules) -> Listing | None:
    """A folder of Parquet files with images, as on the Hugging Face Hub; None otherwise.

    The name of a file gives its part: ``data/train-00000-of-00004.parquet``.
    """
    names = [name for name in found.files if name.lower().endswith(".parquet")]
    if not names or any(map(looks_like_image, found.files)):
        return None
    places = {name: remote.local_copy(root / name) for name in names}
    names = [name for name in names if embedded.holds_images(places[name])]
    entries, rejects = [], list(found.rejects)
    notes: list[str] = []
    for name in names:
        part = layouts.part_of_name(name)
        listed = embedded.list_embedded(places[name], rules)
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
        return _list_containers(source, found, rules) or list_names(source, found, rules)
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
        files = files_of(found, inner)
        return _listing_of_table(path, read_table(inner, bytes_of(found, inner), rules.encoding), files, rules)
    if inner:
        below = f"{inner}/"
        found = replace(
            found,
            files=[name for name in found.files if name.startswith(below)],
            folders=[name for name in found.folders if name.startswith(below)],
        )
        if not found.files:
            raise UsageError(f"{escape(str(path))}: the archive has no folder or table {escape(inner)}.")
    return list_names(path, found, rules)


# ---- a table


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
    return with_parts_stated(_listing_of_table(root, table, files, rules), files.beside, files)


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
    if (inner := _in_container(path)) is not None:
        root, path = root / inner[0], inner[1]
    if root.suffix.lower() not in _CONTAINER_ENDINGS:
        return remote.read(root / path)
    try:
        copy = _copy_of(root)
    except TopworkError as error:
        raise ImageError(str(error)) from None
    return _reader(copy, False)(copy, path)


@lru_cache(maxsize=1024)
def _copy_of(root: Path) -> Path:
    """Cached per process, because asking for the version of a remote file takes as long as reading an image."""
    return remote.local_copy(root)


def _reader(root: Path, is_folder: bool) -> Callable[[Path, str], bytes]:
    if is_folder:
        return hub.read_row if hub.is_saved_dataset(root) else _read_below
    ending = root.suffix.lower()
    return (
        embedded.read_row if ending == ".parquet" else arrays.read_array if ending == ".npz" else archives.read_member
    )


def _read_below(root: Path, path: str) -> bytes:
    if (inner := _in_container(path)) is not None and (file := root / inner[0]).is_file():
        return _reader(file, False)(file, inner[1])
    return read_regular_file(root / path)


def _in_container(path: str) -> tuple[str, str] | None:
    """(the file, what is in it) for an image in a Parquet or tar file in the folder."""
    match = re.match(r"(.+?\.(?:parquet|tar))/(.+)", path)
    return (match[1], match[2]) if match else None
