"""Labels, groups and domains that a regular expression takes from file names; and fewer images, drawn by name.

In: names or a :class:`Listing`, and what the user asked. Out: a function from name to label, or another listing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from topwork.data.samples import PATIENT_ID, Entry, Listing, Rules
from topwork.errors import UsageError
from topwork.text import escape


def regex_for_names(names: Sequence[str]) -> str | None:
    r"""A pattern for ``--label-regex`` if file names look like ``cat.12.jpg``, ``great_dane_3.jpg`` or ``3_cat.png``; else None."""
    return next((pattern for pattern in _NAME_PATTERNS if _finds_labels(pattern, names)), None)


_NAME_PATTERNS = (r"^(.*?[^\W\d_])[ ._-]*\(?\d+\)?\.\w+$", r"^\d+[ ._-]+([^\W\d_].*)\.\w+$")


def _finds_labels(pattern: str, names: Sequence[str]) -> bool:
    labels = Counter(match[1] for name in names if (match := re.match(pattern, name.rsplit("/", 1)[-1])))
    n_matched = sum(labels.values())
    return 2 <= len(labels) <= max(2, n_matched / 3) and 2 * n_matched > len(names)


def label_taker(pattern: str) -> Callable[[str], str | None]:
    """The function from a path to its label, or None if the pattern does not match.

    The label is the named group ``label``; else, if other groups have names, the name of the one that matched (so
    that ``(?P<cat>^[A-Z])|(?P<dog>^[a-z])`` goes by the case of the first letter); else the first group.

    Raises:
        UsageError: not a regular expression, or one without a group.
    """
    compiled = _compiled(pattern, "--label-regex")
    if not compiled.groups:
        raise UsageError(f"--label-regex {pattern}: put the label in parentheses, such as '(.+)_\\d+'.")
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
    if pattern == PATIENT_ID:
        return listing  # known when the images are read
    if re.fullmatch(r"\w+", pattern):
        raise UsageError(
            f"--group-by {pattern}: no such column (only tables have columns). "
            "Use a regular expression on the path instead, such as 'patient(\\d+)'."
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
    """The match of a pattern in each path, None if there is none, and a note if some paths do not match.

    Raises:
        UsageError: it matches nothing, or is not a regular expression.
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
        raise UsageError(f"{option} {pattern}: not a valid regular expression: {error}.") from None


# ---- subsets


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
