"""How the names of files become labels, parts and groups.

In: the names that a folder or an archive holds, and the user's :class:`Rules`. Out: a :class:`Listing`. Whether the names
come from a disk or from an archive makes no difference, so the same images give the same data set either way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from topwork.data.samples import LABEL_SEPARATOR, Entry, Listing, Reject, Rules
from topwork.errors import UsageError
from topwork.text import escape, first_names, natural_key

PART_NAMES = {
    "train": "train",
    "training": "train",
    "training_set": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "test_set": "test",
    "validation_set": "valid",
}


@dataclass(frozen=True)
class Found:
    """Names below a root, with ``/``.

    Attributes:
        wrapped: a single folder around everything is usual (archives), and is looked through.
    """

    files: Sequence[str]
    folders: Sequence[str]
    rejects: Sequence[Reject]
    wrapped: bool = False


def arrange(root: Path, found: Found, rules: Rules, *, in_given_order: bool = False) -> Listing:
    """Gives each file its label, part and group by its place and name.

    Args:
        in_given_order: keep the order of ``found.files``, in which they can be read quickly.
    """
    prefix = _wrapper(found)
    top = sorted({name.split("/", 1)[0] for name in _below(prefix, found.folders)}, key=natural_key)
    has_parts = _are_parts(top, _below(prefix, found.files))
    if rules.label_regex is not None:
        listing = _by_name(root, found, prefix, has_parts, label_taker(rules.label_regex))
    elif has_parts:
        listing = _by_part(root, found, prefix, top)
    else:
        listing = _by_class(root, found, prefix)
    if rules.group_by is not None:
        listing = with_groups(listing, rules.group_by)
    if rules.domain_by is not None:
        listing = with_domains(listing, rules.domain_by)
    return listing if in_given_order else replace(listing, entries=_sorted(listing.entries))


def make_listing(
    root: Path,
    layout: str,
    entries: Iterable[Entry],
    class_names: set[str],
    rejects: Iterable[Reject],
    notes: Iterable[str],
) -> Listing:
    """A listing with its class names and rejects in natural order."""
    kept = tuple(entries)
    return Listing(
        root=root,
        layout=layout,
        entries=kept,
        class_names=tuple(sorted(class_names | {entry.label for entry in kept}, key=natural_key)),
        rejects=tuple(sorted(rejects, key=lambda reject: natural_key(reject.path))),
        notes=tuple(notes),
    )


def part_named(value: str | None, where: str) -> str | None:
    """``train``, ``valid`` or ``test`` for any of their usual names; raises UsageError for others."""
    if value is None or not value.strip():
        return None
    part = PART_NAMES.get(value.strip().lower())
    if part is None:
        raise UsageError(f"{escape(where)}: split is {escape(value)!r}; use train, valid or test (or leave it empty).")
    return part


def join_labels(labels: Iterable[str]) -> str:
    """Several labels as one text, whatever their order."""
    return LABEL_SEPARATOR.join(sorted({label.strip() for label in labels if label.strip()}, key=natural_key))


# ---- folders


def _by_class(root: Path, found: Found, prefix: str) -> Listing:
    entries, rejects = [], list(found.rejects)
    for name in found.files:
        label, slash, _ = name.removeprefix(prefix).partition("/")
        if slash and name.startswith(prefix):
            entries.append(Entry(name, label))
        else:
            rejects.append(Reject(name, "not in a class folder"))
    class_names = {name for name in _below(prefix, found.folders) if "/" not in name}
    notes = _nesting_notes(root, prefix, entries, class_names)
    return make_listing(root, "folders", entries, class_names, rejects, notes)


def _by_part(root: Path, found: Found, prefix: str, top: list[str]) -> Listing:
    entries, rejects = [], list(found.rejects)
    for name in found.files:
        pieces = name.removeprefix(prefix).split("/")
        part = PART_NAMES.get(pieces[0].lower()) if name.startswith(prefix) else None
        if part is None:
            reason = "not in a train, valid or test folder" if len(pieces) > 1 else "not in a class folder"
            rejects.append(Reject(name, reason))
        elif len(pieces) < 3:
            rejects.append(Reject(name, "not in a class folder"))
        else:
            entries.append(Entry(name, pieces[1], part))
    pairs = [name.split("/") for name in _below(prefix, found.folders) if name.count("/") == 1]
    class_names = {pieces[1] for pieces in pairs if pieces[0].lower() in PART_NAMES}
    others = [name for name in top if name.lower() not in PART_NAMES]
    notes = (
        [f"Left out, because train/valid/test folders were found beside them: {first_names(others)}."] if others else []
    )
    return make_listing(root, "parts", entries, class_names, rejects, notes)


def _are_parts(top: list[str], files: Sequence[str]) -> bool:
    """Whether the top folders are train, valid and test rather than classes that are called so."""
    named = [name for name in top if name.lower() in PART_NAMES]
    parts = {PART_NAMES[name.lower()] for name in named}
    if "train" in parts:
        return len(parts) > 1 or len(named) == len(top)
    # Only valid and test: then they hold class folders and no images themselves.
    return bool(named) and len(named) == len(top) and not any(name.count("/") == 1 for name in files)


def _wrapper(found: Found) -> str:
    """The single folder around everything, with its slash; "" where there is none.

    In an archive it is looked through whenever it holds only folders. On a disk only when those are train, valid and
    test: a folder with one class in it is a data set, too (for ``evaluate``).
    """
    prefix = ""
    while True:
        files, folders = _below(prefix, found.files), _below(prefix, found.folders)
        top = {name.split("/", 1)[0] for name in folders}
        if len(top) != 1 or any("/" not in name for name in files):
            return prefix
        inner = f"{next(iter(top))}/"
        inside = sorted({name.removeprefix(inner).split("/", 1)[0] for name in folders if name.startswith(inner)})
        holds_files = any("/" not in name.removeprefix(inner) for name in files)
        has_parts = _are_parts(inside, _below(inner, files)) and not _are_parts(list(top), files)
        if not inside or not (has_parts or (found.wrapped and not holds_files and not _are_parts(list(top), files))):
            return prefix
        prefix += inner


def _below(prefix: str, names: Sequence[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix) and name != prefix]


def _nesting_notes(root: Path, prefix: str, entries: list[Entry], class_names: set[str]) -> list[str]:
    """A folder of domains or of wrapped data sets looks like class folders: say so when no class holds files itself."""
    direct = {entry.label for entry in entries if entry.path.removeprefix(prefix).count("/") == 1}
    if entries and class_names and not direct:
        example = min(class_names, key=natural_key)
        return [
            f"No class folder holds images itself, only nested folders do. If the folders inside {escape(example)} are the "
            f"classes, give {escape(str(root / prefix / example))} instead."
        ]
    return []


def _sorted(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: natural_key(entry.path)))


# ---- labels from names


def _by_name(root: Path, found: Found, prefix: str, has_parts: bool, take: Callable[[str], str | None]) -> Listing:
    entries, rejects = [], list(found.rejects)
    for name in found.files:
        label = take(name)
        first = name.removeprefix(prefix).split("/", 1)[0]
        if label:
            entries.append(Entry(name, label, PART_NAMES.get(first.lower()) if has_parts else None))
        else:
            rejects.append(Reject(name, "the name does not match --label-regex"))
    return make_listing(root, "names", entries, set(), rejects, [])


def label_taker(pattern: str) -> Callable[[str], str | None]:
    """The function from a path to its label, or None where the pattern does not match.

    The label is the named group ``label``; else, where other groups have names, the name of the one that matched (so
    that ``(?P<cat>^[A-Z])|(?P<dog>^[a-z])`` tells by the case of the first letter); else the first group.

    Raises:
        UsageError: no regular expression, or one without a group.
    """
    compiled = _compiled(pattern, "--label-regex")
    if not compiled.groups:
        raise UsageError(f"--label-regex {pattern}: put the part that is the label in brackets, such as '(.+)_\\d+'.")
    by_path = "/" in pattern

    def take(path: str) -> str | None:
        match = compiled.search(path if by_path else path.rsplit("/", 1)[-1])
        if match is None:
            return None
        if "label" in compiled.groupindex:
            return match["label"]
        if compiled.groupindex:
            return next((name for name, text in match.groupdict().items() if text is not None), None)
        return match[1]

    return take


def with_groups(listing: Listing, pattern: str) -> Listing:
    """Groups taken from the paths: the named group ``group``, else the first group, else all that matched."""
    if re.fullmatch(r"\w+", pattern):
        raise UsageError(
            f"--group-by {pattern}: there is no such column here (only tables have columns). "
            "Give a regular expression on the path instead, such as 'patient(\\d+)'."
        )
    values, notes = _taken(listing, pattern, "group")
    entries = [replace(entry, group=value) for entry, value in zip(listing.entries, values, strict=True)]
    return replace(listing, entries=tuple(entries), notes=(*listing.notes, *notes))


def with_domains(listing: Listing, pattern: str) -> Listing:
    """Domains taken from the paths: the named group ``domain``, else the first group, else all that matched."""
    values, notes = _taken(listing, pattern, "domain")
    entries = [replace(entry, domain=value) for entry, value in zip(listing.entries, values, strict=True)]
    return replace(listing, entries=tuple(entries), notes=(*listing.notes, *notes))


def _taken(listing: Listing, pattern: str, what: str) -> tuple[list[str | None], list[str]]:
    """What a pattern takes from each path, None where it does not match, and a note where it does not match all.

    Raises:
        UsageError: it matches nothing, or is no regular expression.
    """
    option = f"--{what}-by"
    compiled = _compiled(pattern, option)
    chosen: int | str = what if what in compiled.groupindex else min(1, compiled.groups)
    values = [match[chosen] if (match := compiled.search(entry.path)) else None for entry in listing.entries]
    n_without = sum(value is None for value in values)
    if n_without == len(values):
        example = f", for example {escape(listing.entries[0].path)}" if values else ""
        raise UsageError(f"{option} {pattern}: matches none of the {len(values)} paths{example}.")
    notes = [f"{option} matches {len(values) - n_without} of {len(values)} paths."] if n_without else []
    return values, notes


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern}: no valid regular expression: {error}.") from None


# ---- fewer images


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
