"""Splits into train, valid and test: given by the data, or drawn so that groups stay together.

In: a Manifest. Out: a :class:`Split` of row numbers. Groups are exact duplicates, near duplicates and the user's
groups; they are never split. The split depends only on the seed and the content of the images, not on file names or
order, so the same images in another layout get the same split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.errors import UsageError
from topwork.text import Described, escape

PARTS = ("train", "valid", "test")
ENOUGH_TO_DIVIDE = 5  # images; a class with fewer cannot be expected in every part


@dataclass(frozen=True, repr=False)
class Split(Described):
    """Row numbers of the manifest for each part, sorted by content hash (so that layouts do not matter).

    Attributes:
        given: whether the data's predefined parts were used.
        leaks: (row, row) pairs of the same group in different parts of a predefined split.
    """

    train: NDArray[np.int64]
    valid: NDArray[np.int64]
    test: NDArray[np.int64]
    given: bool
    seed: int
    leaks: tuple[tuple[int, int], ...] = ()

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            **{name: len(rows) for name, rows in self.parts().items()},
            "Predefined": "yes" if self.given else "no",
            "Leaks": len(self.leaks),
        }

    def parts(self) -> dict[str, NDArray[np.int64]]:
        """The non-empty parts, by name."""
        return {name: rows for name in PARTS if len(rows := getattr(self, name))}


def split(
    manifest: Manifest,
    valid_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
    groups: Sequence[int] | None = None,
) -> Split:
    """Splits the samples into train, valid and test.

    Given parts are kept; rows without one join train. Otherwise, or if only a train part was given, each class gives about
    these fractions, whole groups at a time, and keeps at least one group for training. With a test fraction of 0 a lone train
    part stays whole.

    Args:
        groups: (N,) group number of each row; by default exact duplicates and the manifest's own groups.

    Raises:
        UsageError: fractions out of range.
    """
    if not (0 <= valid_fraction < 1 and 0 <= test_fraction < 1 and valid_fraction + test_fraction < 1):
        raise UsageError(
            f"--valid-fraction {valid_fraction} and --test-fraction {test_fraction}: "
            "both must be at least 0 and leave images for training."
        )
    group_numbers = list(groups) if groups is not None else join_groups(manifest)
    given = manifest.has_parts or (manifest.is_train_only and not test_fraction)
    if given:
        assigned = [sample.part or "train" for sample in manifest.samples]
    else:
        assigned = _draw(manifest, group_numbers, {"test": test_fraction, "valid": valid_fraction}, seed)
    if "train" not in assigned:
        raise UsageError(f"{manifest.root}: no training images. A split needs a train part.")
    return _split_of(manifest, assigned, group_numbers, seed, given=given)


def with_valid(chosen: Split, manifest: Manifest, fraction: float, groups: Sequence[int]) -> Split:
    """The same split with a valid part taken out of train, whole groups at a time, for model selection."""
    own = set(chosen.train.tolist())
    drawn = _draw(manifest, groups, {"valid": fraction}, chosen.seed, own)
    assigned = [part if row in own else "other" for row, part in enumerate(drawn)]
    return replace(chosen, train=_rows(manifest, assigned, "train"), valid=_rows(manifest, assigned, "valid"))


def without_valid(chosen: Split, manifest: Manifest) -> Split:
    """The same split with the valid part in train."""
    assigned = np.full(len(manifest.samples), "", dtype=object)
    assigned[chosen.train] = assigned[chosen.valid] = "train"
    return replace(chosen, train=_rows(manifest, assigned.tolist(), "train"), valid=np.empty(0, np.int64))


def divided_as(manifest: Manifest, record: dict[str, Any]) -> Manifest:
    """The manifest with the parts that another run's ``split.json`` gives its images, known by content; new ones train.

    Raises:
        UsageError: the two share no image.
    """
    part_of = {item["content_hash"]: name for name in PARTS for item in record["parts"].get(name, ())}
    samples = tuple(replace(sample, part=part_of.get(sample.content_hash)) for sample in manifest.samples)
    if not any(sample.part for sample in samples):
        raise UsageError(f"{escape(str(manifest.root))}: --split-of is a run on other images; none of these is in it.")
    return replace(manifest, samples=samples)


def leave_out(manifest: Manifest, domain: str, valid_fraction: float, seed: int, groups: Sequence[int]) -> Split:
    """One domain as the test part, the others divided into train and valid.

    Images of the domain that train has, too (copies, near duplicates), are named as leaks.

    Raises:
        UsageError: no such domain, or no other domain.
    """
    names = sorted({sample.domain for sample in manifest.samples if sample.domain is not None})
    if domain not in names or len(names) < 2:
        found = ", ".join(escape(name) for name in names) or "none"
        raise UsageError(
            f"--leave-out {escape(domain)}: needs this domain and at least one other; found: {found}. Domains come from a "
            "table's column domain, or from --domain-by."
        )
    left = {row for row, sample in enumerate(manifest.samples) if sample.domain == domain}
    own = set(range(len(manifest.samples))) - left
    drawn = _draw(manifest, groups, {"valid": valid_fraction}, seed, own)
    assigned = ["test" if row in left else part for row, part in enumerate(drawn)]
    return _split_of(manifest, assigned, groups, seed, given=True)


def split_record(chosen: Split, manifest: Manifest) -> dict[str, Any]:
    """The content of ``split.json``: hashes and paths by part, and a digest that names the split."""
    record: dict[str, Any] = {"seed": chosen.seed, "given": chosen.given, "parts": {}}
    for name in PARTS:
        rows = getattr(chosen, name)
        record["parts"][name] = [
            {"path": manifest.samples[row].path, "content_hash": manifest.samples[row].content_hash} for row in rows
        ]
    text = "\n".join(f"{name} {item['content_hash']}" for name in PARTS for item in record["parts"][name])
    record["digest"] = hashlib.sha256(text.encode()).hexdigest()
    record["leaks"] = [[manifest.samples[a].path, manifest.samples[b].path] for a, b in chosen.leaks]
    return record


def recorded_split(record: dict[str, Any], manifest: Manifest) -> Split:
    """The split of a ``split.json``, for the manifest that it was written with; leaks are not restored."""
    rows = {(sample.path, sample.content_hash): row for row, sample in enumerate(manifest.samples)}
    parts = {
        name: np.array([rows[item["path"], item["content_hash"]] for item in record["parts"].get(name, ())], np.int64)
        for name in PARTS
    }
    return Split(parts["train"], parts["valid"], parts["test"], bool(record["given"]), int(record["seed"]))


def rarest_labels(matrix: NDArray[np.bool_], enough: int = 0) -> NDArray[np.int64]:
    """(N,) the rarest class of each row of (N, C), C if it has none: one label to stratify multi-label rows by.

    Combinations of labels are mostly too rare for each to give its share (Sechidis et al. 2011 on stratifying several
    labels; ours is one pass by one label, which keeps groups and the independence of the order).

    Args:
        enough: classes with fewer rows than this are used only if a row has no other.
    """
    counts = matrix.sum(0)
    cost = np.where(counts >= enough, counts, counts + len(matrix) + 1)
    rarest = np.where(matrix, cost, np.iinfo(np.int64).max).argmin(1) if matrix.shape[1] else np.zeros(len(matrix), int)
    return np.where(matrix.any(1), rarest, matrix.shape[1]).astype(np.int64)


def _split_of(manifest: Manifest, assigned: list[str], groups: Sequence[int], seed: int, *, given: bool) -> Split:
    rows = {name: _rows(manifest, assigned, name) for name in PARTS}
    return Split(**rows, given=given, seed=seed, leaks=_leaks(groups, assigned) if given else ())


def _rows(manifest: Manifest, assigned: list[str], name: str) -> NDArray[np.int64]:
    rows = [row for row, part in enumerate(assigned) if part == name]
    rows.sort(key=lambda row: (manifest.samples[row].content_hash, manifest.samples[row].label))
    return np.array(rows, dtype=np.int64)


def _draw(
    manifest: Manifest, groups: Sequence[int], fractions: dict[str, float], seed: int, among: set[int] | None = None
) -> list[str]:
    """Fills test, then valid, class by class, with whole groups of ``among``, in an order keyed by seed and content."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        if among is None or row in among:
            members[group].append(row)
    by_label: dict[str, list[list[int]]] = defaultdict(list)
    strata = _strata(manifest)
    for rows in members.values():
        labels = sorted(strata[row] for row in rows)
        by_label[max(labels, key=labels.count)].append(rows)
    assigned = ["train"] * len(manifest.samples)
    for label, found in by_label.items():
        left = sorted(found, key=lambda rows: _lot(manifest, rows, seed))
        n_total = sum(len(rows) for rows in left)
        for part, fraction in fractions.items():
            taken, left = _filled(left, _rounded(fraction * n_total, f"{seed} {part} {label}"))
            for row in taken:
                assigned[row] = part
    return assigned


def _rounded(wanted: float, key: str) -> int:
    """Rounds up with the probability of the fraction, drawn from the key: small classes get their share on average."""
    draw = int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64
    return int(wanted + draw + 1e-9)


def _filled(groups: list[list[int]], n_wanted: int) -> tuple[list[int], list[list[int]]]:
    """Rows of whole groups, from the front, closest to ``n_wanted``, and the other groups; one is left for training."""
    taken: list[int] = []
    left: list[list[int]] = []
    for rows in groups:
        missing = n_wanted - len(taken)
        if missing > 0 and len(rows) <= 2 * missing and (left or rows is not groups[-1]):
            taken += rows
        else:
            left.append(rows)
    return taken, left


def _strata(manifest: Manifest) -> list[str]:
    """The label of each sample; if it has several, the rarest that is common enough to be divided."""
    if not manifest.multi_label:
        return [sample.label for sample in manifest.samples]
    names = (*manifest.classes, "")
    return [names[label] for label in rarest_labels(manifest.label_matrix, ENOUGH_TO_DIVIDE).tolist()]


def _lot(manifest: Manifest, rows: list[int], seed: int) -> bytes:
    """A random-looking key of a group that depends on the seed and the image bytes alone."""
    smallest = min(manifest.samples[row].content_hash for row in rows)
    return hashlib.sha256(f"{seed} {smallest}".encode()).digest()


def _leaks(groups: Sequence[int], assigned: list[str]) -> tuple[tuple[int, int], ...]:
    first: dict[int, dict[str, int]] = defaultdict(dict)
    for row, (group, part) in enumerate(zip(groups, assigned, strict=True)):
        first[group].setdefault(part, row)
    pairs = []
    for row, (group, part) in enumerate(zip(groups, assigned, strict=True)):
        pairs += [(row, other) for name, other in first[group].items() if part != "train" and name == "train"]
    return tuple(pairs)


# ---- images that stay together


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


def _join(parent: list[int], a: int, b: int) -> None:
    root_a, root_b = _find(parent, a), _find(parent, b)
    parent[max(root_a, root_b)] = min(root_a, root_b)


def _find(parent: list[int], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


def n_train_of(manifest: Manifest, parts: Split) -> dict[str, int]:
    """Training images of each class."""
    targets = manifest.targets[parts.train]
    counts = targets.sum(0) if manifest.multi_label else np.bincount(targets, minlength=len(manifest.classes))
    return dict(zip(manifest.classes, counts.tolist(), strict=True))


def part_rows(manifest: Manifest, part: str) -> NDArray[np.int64]:
    """Rows of a part; all rows if the data has no parts."""
    by_part: dict[str, list[int]] = {}
    for row, sample in enumerate(manifest.samples):
        by_part.setdefault(sample.part or "none", []).append(row)
    if part == "auto":
        part = next((name for name in ("test", "valid") if name in by_part), "all")
    if part == "all":
        return np.arange(len(manifest.samples))
    if part not in by_part:
        raise UsageError(
            f"--part {part}: {escape(str(manifest.root))} has no such part; found {', '.join(sorted(by_part))}."
        )
    return np.array(by_part[part])
