"""Images that must stay on one side of a split: exact duplicates and the user's own groups.

In: a Manifest (and, for near duplicates, pairs found from features). Out: one group number for each row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from topwork.data.manifest import Manifest


def join_groups(manifest: Manifest, pairs: Iterable[tuple[int, int]] = ()) -> list[int]:
    """Group number of each row: rows that share content, a group name or a pair share a number.

    Groups are numbered in the order of their smallest content hash, so that the layout does not matter.

    Args:
        pairs: further rows that belong together, such as near duplicates.
    """
    parent = list(range(len(manifest.samples)))
    first: dict[tuple[str, str], int] = {}
    for row, sample in enumerate(manifest.samples):
        _join(parent, row, first.setdefault(("content", sample.content_hash), row))
        if sample.group is not None:
            _join(parent, row, first.setdefault(("group", sample.group), row))
    for a, b in pairs:
        _join(parent, a, b)
    roots = [_find(parent, row) for row in range(len(parent))]
    number: dict[int, int] = {}
    for row in sorted(range(len(roots)), key=lambda row: manifest.samples[row].content_hash):
        number.setdefault(roots[row], len(number))
    return [number[root] for root in roots]


def exact_duplicates(manifest: Manifest) -> list[list[int]]:
    """Rows that hold the same bytes, for every content found more than once."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(manifest.samples):
        rows[sample.content_hash].append(row)
    return [same for same in rows.values() if len(same) > 1]


def _find(parent: list[int], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


def _join(parent: list[int], a: int, b: int) -> None:
    root_a, root_b = _find(parent, a), _find(parent, b)
    parent[max(root_a, root_b)] = min(root_a, root_b)
