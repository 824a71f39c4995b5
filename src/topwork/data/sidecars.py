"""Images with their label in a file of the same name, as in WebDataset shards: ``000.jpg`` next to ``000.cls``.

In: the names in a folder, an archive, or a folder of tar shards. Out: rows as those of a table, or None if there are no such
files. A ``.cls`` or ``.txt`` holds the label; a ``.json`` an object, whose keys are the columns. Of a shard only its names and
these small files are read here; an image is read from its shard by whoever decodes it.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from topwork.data import archives, remote
from topwork.data.columns import Row, listing_of, meaning_of, rows_of
from topwork.data.layouts import Found, looks_like_image, part_of_name
from topwork.data.named_files import Files
from topwork.data.samples import Listing, Rules
from topwork.data.tables import Table, decoded, table_of_rows
from topwork.errors import ImageError, UsageError

_LONGEST = 200  # characters; a longer text is a caption


def rows_beside(files: Files, rules: Rules) -> tuple[list[Row], list[str]] | None:
    """A row for each image, and sentences on what was assumed; None unless nine of ten have such a file.

    Raises:
        UsageError: none of the keys in the JSON files is a label.
    """
    every, images = set(files.list_all()), files.names
    for ending in (".cls", ".json", ".txt"):
        sides = {image: side for image in images if (side := posixpath.splitext(image)[0] + ending) in every}
        if sides and 10 * len(sides) >= 9 * len(images):
            table = _table(ending, images, sides, files)
            return rows_of(table, meaning_of(table, files, rules), files, rules) if table is not None else None
    return None


def _table(ending: str, images: Sequence[str], sides: Mapping[str, str], files: Files) -> Table | None:
    """The labels in these files; None if they hold captions, boxes or anything else."""
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
    is_label = len(labels) <= max(2, len(texts) / 2) and all("\n" not in one and len(one) < _LONGEST for one in labels)
    return table_of_rows(name, [{"path": image, "label": texts.get(image)} for image in images]) if is_label else None


def list_shards(root: Path, found: Found, rules: Rules) -> Listing | None:
    """A folder of tar shards; the part of an image is the one that its shard is called after. None if it is none.

    Raises:
        UsageError: a shard cannot be read, or holds images without such files.
    """
    shards = [name for name in found.files if name.lower().endswith(".tar")]
    if not shards or any(map(looks_like_image, found.files)):
        return None
    places = {name: remote.local_copy(root / name) for name in shards}
    opened = {name: archives.open_archive(place) for name, place in places.items()}
    rejects = [replace(one, path=f"{name}/{one.path}") for name, archive in opened.items() for one in archive.rejects]
    members = {f"{name}/{member}": name for name, archive in opened.items() for member in archive.names}

    def read(path: str) -> bytes:
        if (shard := members.get(path)) is not None:
            return archives.read_member(places[shard], path.removeprefix(f"{shard}/"))
        assert found.read is not None
        return found.read(path)

    files = Files(members.__contains__, lambda: list(members), read, beside=found.files)
    beside = rows_beside(files, rules)
    if beside is None:
        return None
    rows, notes = beside
    parts = {name: part_of_name(name) for name in shards}
    if len(set(parts.values()) - {None}) > 1:
        rows = [replace(row, part=row.part or parts[members[row.path]]) for row in rows]
    listing = listing_of(root, "table", rows, rules, notes)
    return replace(listing, rejects=(*listing.rejects, *found.rejects, *rejects))
