"""Lists and tables that divide images into train, valid and test without labeling them, as official splits are published.

In: a :class:`Listing` without parts and the names of the files around it. Out: the same with parts. Three forms are known: a
text list per part (Food-101), a table of paths and parts (CelebA), and such a table by number with a list that numbers the
images (CUB).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace

from topwork.data import layouts
from topwork.data.columns import NUMBERED_PARTS
from topwork.data.named_files import Files
from topwork.data.samples import Listing
from topwork.data.tables import LIST_ENDINGS, decoded, read_table
from topwork.errors import UsageError
from topwork.text import first_names

_TABLE_ENDINGS = (".csv", ".tsv", *LIST_ENDINGS)


def is_class_file(name: str) -> bool:
    """Whether the name of a text file suggests class names or documentation."""
    own = posixpath.basename(name).lower()
    return own.endswith(LIST_ENDINGS) and any(
        word in own for word in ("class", "readme", "license", "licence", "names")
    )


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
        sources = [name for name in names if divides(name)][:1]
        stated = _pairs_in(sources[0], names, files) if sources else []
    part_of: dict[str, str] = {}
    for path, part in stated:
        named = files.named(path)
        if len(named) == 1 and part_of.setdefault(named[0], part) != part:
            return listing
    n_named = sum(entry.path in part_of for entry in listing.entries)
    if len(set(part_of.values())) < 2 or 10 * n_named < 9 * len(listing.entries):
        return listing
    entries = tuple(replace(entry, part=part_of.get(entry.path)) for entry in listing.entries)
    note = f"Train, valid and test parts from {first_names(sources, 3)}."
    return replace(listing, entries=entries, notes=(*listing.notes, note))


def _part_of_list(name: str) -> str | None:
    """The part in the name of a text list: ``train_val_list.txt`` is for training."""
    own = posixpath.basename(name).lower()
    if not own.endswith(LIST_ENDINGS) or is_class_file(name):
        return None
    found = {layouts.PART_NAMES[word] for word in re.findall("[a-z]+", own) if word in layouts.PART_NAMES}
    return "train" if found == {"train", "valid"} else found.pop() if len(found) == 1 else None


def _paths_in(name: str, files: Files) -> list[str]:
    """The lines of a list; none if they hold more than a path."""
    try:
        columns = read_table(name, files.read(name)).columns
    except UsageError:
        return []
    return [str(path) for path in columns["path"]] if set(columns) == {"path"} else []


def divides(name: str) -> bool:
    """Whether the name of a file suggests that it gives the part of each image; ``train_split.txt`` holds one part."""
    own = posixpath.basename(name).lower()
    return own.endswith(_TABLE_ENDINGS) and ("partition" in own or ("split" in own and _part_of_list(name) is None))


def _pairs_in(name: str, names: Sequence[str], files: Files) -> list[tuple[str, str]]:
    """(path, part) rows of a table of these two columns; numbers refer to paths in ``images.txt`` next to it."""
    parts = {"0": "test", "1": "train"} if "train_test" in name.lower() else NUMBERED_PARTS
    pairs = [
        (key, part)
        for key, value in _two_columns(name, files)
        if (part := parts.get(value) or layouts.PART_NAMES.get(value.lower())) is not None
    ]
    numbering = posixpath.join(posixpath.dirname(name), "images.txt")
    if numbering not in names:
        return pairs
    path_of = dict(_two_columns(numbering, files))
    return [(path_of[key], part) for key, part in pairs if key in path_of]


def _two_columns(name: str, files: Files) -> list[tuple[str, str]]:
    """The lines of a text of two columns; none if any line has more or fewer."""
    try:
        text, _ = decoded(name, files.read(name))
    except UsageError:
        return []
    lines = [re.fullmatch(r"(\S.*?)\s*[\s,;]\s*(\S+)", line.strip()) for line in text.splitlines() if line.strip()]
    return [(match[1], match[2]) for match in lines if match] if all(lines) else []
