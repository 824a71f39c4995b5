"""Which file a row of a table names.

In: the paths that a table states and the names of the files around it. Out: the name of a file for each row. Found by path,
else by name, else by name without ending, and always by the canonical Unicode form.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar
from urllib.parse import unquote

from topwork.data.folders import Found
from topwork.data.layouts import ANNOTATION_NAMES, folders_of, looks_like_image, parts_in
from topwork.data.tables import ENDINGS
from topwork.errors import ImageError, UsageError
from topwork.text import canonical, count, escape, first_names, natural_key

_SAMPLE = 200
T = TypeVar("T")


@dataclass
class Files:
    """The files that a table may name.

    Attributes:
        exists: whether there is a file of this name; asked before all files are listed, which may take long.
        list_all: all names below the root.
        table: the name of the table.
        folder: folder of the table, relative to the root, with a trailing slash.
        beside: the files in that folder, possibly one of class names; ``read`` returns their bytes, or raises UsageError.
    """

    exists: Callable[[str], bool]
    list_all: Callable[[], Sequence[str]]
    read: Callable[[str], bytes]
    table: str = ""
    folder: str = ""
    beside: Sequence[str] = ()

    @classmethod
    def of(cls, found: Found, table: str = "") -> Files:
        """The files that a table of this name in a folder or an archive may name; all of them for ""."""
        folder = posixpath.dirname(table)

        def read(name: str) -> bytes:
            try:
                return found.read(name)
            except ImageError as error:
                raise UsageError(f"{escape(name)}: cannot be read: {error}.") from None

        beside = [name for name in found.files if posixpath.dirname(name) == folder]
        exists, below = set(found.files).__contains__, f"{folder}/" if folder else ""
        return cls(exists, lambda: found.files, read, table, below, beside)

    @cached_property
    def names(self) -> list[str]:
        """The files that may be images: those with such an ending, or all but tables and texts."""
        every = self.list_all()
        return [name for name in every if looks_like_image(name)] or [
            name for name in every if not name.lower().endswith(ENDINGS)
        ]

    @cached_property
    def _index(self) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
        """Files by name, by name without ending, and by number: spreadsheets and data frames turn 0007 into 7 or 7.0."""
        by_name: dict[str, list[str]] = defaultdict(list)
        by_stem: dict[str, list[str]] = defaultdict(list)
        by_number: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            own = _key(posixpath.basename(name))
            stem = posixpath.splitext(own)[0]
            by_name[own].append(name)
            by_stem[stem].append(name)
            if stem.isdecimal():
                by_number[_number(stem)].append(name)
        return by_name, by_stem, by_number

    @cached_property
    def _in_folders(self) -> dict[str, list[str]]:
        """The files at any depth of each folder, by its path, its name, and its number without leading zeros."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            for folder in folders_of(_key(name)):
                own = posixpath.basename(folder)
                for key in {folder, own, _number(own)}:
                    found[key].append(name)
        return found

    def in_folder(self, path: str) -> list[str]:
        """The files at any depth of the folder that a path or a name means."""
        wanted = _key(path.replace("\\", "/").strip().removeprefix("./").rstrip("/"))
        found = self._in_folders
        return found.get(_key(self.folder) + wanted) or found.get(wanted) or found.get(_number(wanted)) or []

    def are_folders(self, cells: Sequence[str]) -> bool:
        """Whether at least half of some cells name folders rather than files."""
        asked = [cell for cell in some_of(cells) if cell]
        if any(map(looks_like_image, asked)):
            return False
        n_folders = sum(len(self.named(cell)) != 1 and bool(self.in_folder(cell)) for cell in asked)
        return bool(asked) and 2 * n_folders >= len(asked)

    def named(self, path: str) -> list[str]:
        """The files that a path may mean, the most literal reading that finds one; last that of a link: decoded, without its query."""
        return self._named(path) or (self._named(plain) if (plain := unquote(path.partition("?")[0])) != path else [])

    def _named(self, path: str) -> list[str]:
        wanted = _key(path.replace("\\", "/").strip().removeprefix("./"))
        own = posixpath.basename(wanted)
        if not own:
            return []
        by_name, by_stem, by_number = self._index
        stem, ending = posixpath.splitext(own)
        uploaded = re.match(r"[0-9a-f]{8}-(.+)", own)  # what Label Studio puts before the names of uploads
        return (
            [name for name in by_name.get(own, []) if _key(name) == _key(self.folder) + wanted]
            or _nearest(wanted, by_name.get(own, []))
            or _nearest(wanted, by_stem.get(own, []))
            or by_number.get(_number(own), [])
            or (by_name.get(uploaded[1], []) if uploaded else [])
            or (_nearest(wanted, by_stem.get(stem, [])) if looks_like_image(ending) else [])
        )


def _nearest(wanted: str, names: Sequence[str]) -> list[str]:
    """The names that have the most folders in common with a path, from its end: it may start somewhere else."""
    if len(names) < 2 or "/" not in wanted:
        return list(names)
    folders = wanted.split("/")[-2::-1]
    n_common = {name: len(posixpath.commonprefix([folders, _key(name).split("/")[-2::-1]])) for name in names}
    most = max(n_common.values())
    return [name for name in names if n_common[name] == most]


def _number(name: str) -> str:
    """A number without leading zeros and without the ``.0`` of data frames, any other text unchanged."""
    own = name.removesuffix(".0")
    return (own.lstrip("0") or "0") if own.isdecimal() else name


def _key(name: str) -> str:
    return canonical(name).casefold()


def located(paths: Sequence[str], files: Files, encoding: str | None) -> tuple[list[str], str]:
    """The file of each row, unchanged if there is none; and where they were found, for a sentence.

    Args:
        encoding: of the table, in whose bytes file names may be kept.
    """
    written = [_as_written(path) for path in paths]
    found = [files.folder + path if path and not path.startswith("/") else path for path in written]
    if all(files.exists(name) for name in some_of([name for name in found if name])):
        suspects = [n for n, path in enumerate(written) if not path.isascii() or "\\" in path or path != path.strip()]
        suspects = [n for n in suspects if not files.exists(found[n])]
        is_search = False
    else:
        known = set(files.names)
        suspects = [n for n, name in enumerate(found) if name and name not in known and not _is_elsewhere(name, files)]
        is_search = True
    several: dict[int, list[str]] = {}
    endings: set[str] = set()
    for number in suspects:
        names = files.named(written[number]) or _in_bytes(written[number], encoding, files)
        if len(names) > 1:
            several[number] = names
        elif names:
            found[number] = names[0]
            endings.add(_ending_of(names[0], written[number]))
    _choose(found, several, files.table)
    return found, _where(found, endings - {""}, files) if is_search else ""


def _is_elsewhere(name: str, files: Files) -> bool:
    """Whether a path leads out of the folder, to a file or a URL that is there."""
    return (name.startswith("/") or ":/" in name) and files.exists(name)


def _ending_of(name: str, written: str) -> str:
    """How the ending of a file differs from that in a table, for a sentence; "" if it does not."""
    own, asked = (posixpath.splitext(one)[1] for one in (name, written))
    if not asked:
        return f"{own} added" if own else ""
    return f"{own} for {asked}" if looks_like_image(asked) and own.lower() != asked.lower() else ""


def _choose(found: list[str], several: dict[int, list[str]], table: str) -> None:
    """Of several files of a name takes one that is no mask, below the folder of the table, in the part that the table is called after, and in the usual folder."""
    folders = Counter(posixpath.dirname(name) for n, name in enumerate(found) if n not in several)
    part = parts_in(posixpath.splitext(posixpath.basename(table))[0])[:1]
    near = f"{posixpath.dirname(table)}/"

    def fitness(name: str) -> tuple[bool, bool, bool, int]:
        folder = posixpath.dirname(name)
        is_image = ANNOTATION_NAMES.isdisjoint(folder.lower().split("/"))
        is_of_part = bool(part) and parts_in(folder or name)[:1] == part
        return is_image, name.startswith(near), is_of_part, folders[folder]

    for number, names in several.items():
        found[number] = max(names, key=fitness)


def _where(found: Sequence[str], endings: set[str], files: Files) -> str:
    known = set(files.names)
    there = [name for name in found if name in known or _is_elsewhere(name, files)]
    if not there:
        return " (no file of that name here; --root names another folder)"
    folders = sorted({f"{posixpath.dirname(name)}/".lstrip("/") or "./" for name in there}, key=natural_key)
    ending = f" with {' or '.join(sorted(endings))}" if endings else ""
    return f"{ending} (files of {len(there):,} of {count(len(found), 'row')} found in {first_names(folders, 3)})"


def _as_written(path: str) -> str:
    """One spelling of a path, whether or not it starts at the root."""
    absolute = "/" if path.startswith("/") else ""
    return absolute + "/".join(piece for piece in path.split("/") if piece not in ("", ".")) or path


def _in_bytes(path: str, encoding: str | None, files: Files) -> list[str]:
    """File names keep the bytes of the system they were created on."""
    try:
        raw = files.folder + os.fsdecode(path.encode(encoding or "utf-8"))
    except UnicodeError:
        return []
    return [raw] if files.exists(raw) else []


def some_of(cells: Sequence[T]) -> Sequence[T]:
    """A sample of a column from its whole length."""
    return cells[:: max(1, len(cells) // _SAMPLE)][:_SAMPLE]
