"""The values that pass between the files of this folder: what may be an image, what is not used, and what the user asked.

Every other module here may import these types; this one imports none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from topwork.errors import UsageError
from topwork.settings import DataSettings, check

LABEL_SEPARATOR = "|"
PATIENT_ID = "PatientID"  # as ``--group-by``: the images of one patient, by what their DICOM files say
Rules = DataSettings  # what the user says about how a dataset is to be read


def one_label_only(where: str) -> UsageError:
    """The error for multi-label data or models if exactly one label per image is required."""
    return UsageError(
        f"{where}: has several labels per image (--multi-label), which this command does not support. scan, fit, evaluate, "
        "predict, compare, export and serve do."
    )


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
    rules = Rules(**{item.name: getattr(settings, item.name) for item in fields(Rules)})
    check(rules)
    if bands and rules.bands not in (None, bands):
        raise UsageError(f"--bands {rules.bands}: the model was trained with --bands {bands}.")
    return replace(rules, bands=bands or rules.bands)
