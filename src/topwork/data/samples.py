"""The values that pass between the files of this folder: what may be an image, what is not used, and what the user asked.

Every other module here may import these types; this one imports none of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from topwork.errors import UsageError
from topwork.settings import DataSettings, check

LABEL_SEPARATOR = "|"


def one_label_only(where: str) -> UsageError:
    """The error for multi-label data or models if exactly one label per image is required."""
    return UsageError(
        f"{where}: has several labels per image (--multi-label), which this command does not support. scan, fit, evaluate, "
        "predict, compare, export and serve do."
    )


PATIENT_ID = "PatientID"  # as ``--group-by``: the images of one patient, by what their DICOM files say


@dataclass(frozen=True)
class Entry:
    """One file that may be an image.

    Attributes:
        path: relative to the root of the listing, with ``/``.
        label: class name; where an image may have several, all of them in natural order, joined by ``|``.
    """

    path: str
    label: str
    part: str | None = None
    group: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class Reject:
    """One file that is not used, and why; or a whole folder, whose name ends in ``/``.

    Attributes:
        expected: nobody would take it for an image of the dataset (a readme, a folder next to the class folders), so it does
            not count toward ``--max-reject-fraction``.
    """

    path: str
    reason: str
    expected: bool = field(default=False, compare=False)

    def as_dict(self) -> dict[str, str]:
        """The form that is written to JSON."""
        return {"path": self.path, "reason": self.reason}


@dataclass(frozen=True)
class Rules:
    """What the user says about how a dataset is to be read.

    Attributes:
        root: folder that the paths of a table are relative to; by default the table's own.
        label_regex: takes the label from the file name (or from the path, if it contains ``/``).
        group_by: a column of the table, or a regular expression on the path, that names images that belong together,
            or ``PatientID`` for DICOM files.
        domain_by: a regular expression on the path that names the domain of an image.
        limit_per_class: at most so many images of each class (in each given part), drawn by ``seed`` and name.
        multi_label: an image may have several labels: in one cell, in separate rows, or in one column per class.
        corrections: a file of corrected labels (see ``data/corrections.py``).
        path_column, label_column, split_column: columns of a table; by default found by name and content.
        label_separator: what stands between several labels in one cell; by default found by content.
        class_names: a text or JSON file with the name of each class number.
        encoding: of a table; by default the first that fits.
        bands: which bands of a many-band TIFF are red, green and blue, such as ``3,2,1``.
    """

    root: str | os.PathLike[str] | None = None
    label_regex: str | None = None
    group_by: str | None = None
    domain_by: str | None = None
    limit_per_class: int | None = None
    multi_label: bool = False
    seed: int = 0
    corrections: str | os.PathLike[str] | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    label_separator: str | None = None
    class_names: str | os.PathLike[str] | None = None
    encoding: str | None = None
    bands: str | None = None


@dataclass(frozen=True)
class Listing:
    """What was found under a path, before any image is opened.

    Attributes:
        root: the folder that the paths of the entries are relative to, or the file that holds the images.
        layout: ``folders``, ``parts`` (train/valid/test folders), ``names`` (labels from file names), ``table``,
            ``arrays`` (a NumPy file) or ``hub`` (saved by Hugging Face datasets).
        entries: in natural order.
        class_names: natural order; with empty classes, which have no entries.
        notes: sentences the user should read.
    """

    root: Path
    layout: str
    entries: tuple[Entry, ...]
    class_names: tuple[str, ...]
    rejects: tuple[Reject, ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Sample:
    """One image. ``path`` is relative to the manifest's root; width and height in pixels, upright.

    Where an image may have several labels, ``label`` holds them all in natural order, joined by ``|``; "" where none.
    """

    path: str
    label: str
    part: str | None
    group: str | None
    domain: str | None
    content_hash: str
    n_bytes: int
    format: str
    mode: str
    width: int
    height: int
    orientation: int
    is_gray: bool = False


def rules_of(settings: DataSettings, bands: str = "") -> Rules:
    """What the settings say about how the data is to be read.

    Args:
        bands: the bands that the model was trained on, if any.

    Raises:
        UsageError: other bands were asked for, or values that cannot be.
    """
    check(DataSettings(**{item.name: getattr(settings, item.name) for item in fields(DataSettings)}))
    if bands and settings.bands not in (None, bands):
        raise UsageError(f"--bands {settings.bands}: the model was trained with --bands {bands}.")
    rules = Rules(**{item.name: getattr(settings, item.name) for item in fields(Rules)})
    return replace(rules, bands=bands or settings.bands)
