"""Images without labels, in flat or nested folders, and labels given in a CSV file.

In: a path. Out: :class:`Rules` for a scan that uses every image, and labels by row of the manifest.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.data.samples import Rules
from topwork.data.tables import read_table
from topwork.errors import UsageError
from topwork.files import error_reason
from topwork.text import canonical, escape, first_names

NO_LABEL = "?"  # class name of images whose folders are not classes
ANY_LABEL = "(.)"  # a meaningless label for every file
COLUMNS = ("path", "label", "suggested", "probability", "reason")


def is_flat(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that directly contains images and no folders."""
    folder = Path(path)
    try:
        return folder.is_dir() and not any(p.is_dir() and not p.name.startswith(".") for p in folder.iterdir())
    except OSError:
        return False  # the scan names the reason


def rules_without_labels(path: str | os.PathLike[str], rules: Rules, is_unlabeled: bool) -> tuple[Rules, bool]:
    """Rules that use every image, and whether the resulting labels are meaningless."""
    if rules.label_regex is None and (is_unlabeled or is_flat(path)):
        return replace(rules, label_regex=ANY_LABEL), True
    return rules, is_unlabeled


def without_labels(manifest: Manifest) -> Manifest:
    """The same images, all of the class ``NO_LABEL``."""
    samples = tuple(replace(sample, label=NO_LABEL) for sample in manifest.samples)
    return replace(manifest, samples=samples, classes=(NO_LABEL,), notes=())


def read_labels(path: Path, manifest: Manifest, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """(N,) label of each row of the manifest that a table names, -1 elsewhere.

    Paths are those of the manifest (as ``adapt --ask`` writes them), or absolute. Rows without a label are skipped.

    Raises:
        UsageError: unreadable; a column is missing; a row names an unknown image or class.
    """
    try:
        table = read_table(str(path), path.read_bytes())
    except OSError as error:
        raise UsageError(f"{escape(str(path))}: cannot be read: {error_reason(error)}") from None
    if not {"path", "label"} <= set(table.columns):
        raise UsageError(f"{escape(str(path))}: needs the columns path and label.")
    known = np.full(len(manifest.samples), -1, np.int64)
    rows = {canonical(sample.path): row for row, sample in enumerate(manifest.samples)}
    index = {canonical(name): number for number, name in enumerate(classes)}
    for line, (name, own) in enumerate(zip(table.columns["path"], table.columns["label"], strict=True), start=2):
        path_given, label = str(name or ""), str(own or "").strip()
        if not label:
            continue
        relative = os.path.relpath(path_given, manifest.root) if Path(path_given).is_absolute() else path_given
        row = rows.get(canonical(path_given), rows.get(canonical(relative)))
        where = f"{escape(str(path))}, line {line}"
        if row is None:
            raise UsageError(f"{where}: {escape(path_given)} is not a usable image of the target.")
        if canonical(label) not in index:
            known_names = first_names(classes, 8)
            raise UsageError(f"{where}: {escape(label)} is not a class of the model, which has: {known_names}.")
        known[row] = index[canonical(label)]
    if not (known >= 0).any():
        raise UsageError(f"{escape(str(path))}: has no labels yet; fill in the column label.")
    return known
