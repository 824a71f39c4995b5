"""All images of a dataset with labels and facts, all rejected files with reasons, and notes on anything unusual.

In: a path. Out: a :class:`Manifest`. Every file is used or named; the counts add up. Pixels are decoded to the last
row (a visitor may take them along the way, so that checking and embedding are one pass); nothing is ever written
next to the images.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from topwork.data.corrections import read_corrections, with_corrections
from topwork.data.layouts import looks_like_image
from topwork.data.listing import list_data, read_image
from topwork.data.loader import FactsStore, Loaded, Loader, Visitor, load_images
from topwork.data.readings import not_opened
from topwork.data.remote import absolute, is_url, n_threads_for
from topwork.data.samples import LABEL_SEPARATOR, PATIENT_ID, Entry, Listing, Reject, Rules, Sample, one_label_only
from topwork.data.shards import read_parquet
from topwork.data.tables import read_table
from topwork.data.traits import TraitStore, TraitTable
from topwork.errors import ImageError, UsageError, changed_since_scan
from topwork.files import atomic_file, error_reason
from topwork.settings import cache_folder
from topwork.text import Described, canonical, escape, first_names, natural_key

NO_LABEL = "?"  # class name of images whose folders are not classes
FEW_IMAGES = 10  # a class with fewer training images than this is named before training


@dataclass(frozen=True, repr=False)
class Manifest(Described):
    """The images of a dataset.

    Attributes:
        root: folder that the paths are relative to, or the archive or Parquet file that holds the images.
        layout: how the data was laid out (see ``data/samples.py``).
        classes: class names that have images, in natural order; a label is an index into them.
        notes: sentences the user should read before training.
        bands: which bands of many-band TIFF files are read, such as ``3,2,1``; "" for other images.
        multi_label: an image may have several labels; then ``labels`` has no meaning, and ``label_matrix`` has.
    """

    root: Path
    layout: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    rejects: tuple[Reject, ...]
    notes: tuple[str, ...] = ()
    multi_label: bool = False
    bands: str = ""

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        found: dict[str, object] = {"Images": f"{len(self.samples):,}", "Classes": len(self.classes)}
        if not self.multi_label:
            found["Images per class"] = ", ".join(f"{name} {n:,}" for name, n in self.counts.items())
        return found | {"Rejected": len(self.rejects), "Folder": self.root}

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class."""
        found = Counter(name for sample in self.samples for name in self.names_of(sample))
        return {name: found[name] for name in self.classes}

    @property
    def has_parts(self) -> bool:
        """Whether the user divided the images: a train part alone leaves that to the split."""
        return any(sample.part not in (None, "train") for sample in self.samples)

    @property
    def is_train_only(self) -> bool:
        """Whether the data has only a train part."""
        return not self.has_parts and any(sample.part for sample in self.samples)

    @property
    def n_failed(self) -> int:
        """Rejected files that count toward ``--max-reject-fraction``."""
        return sum(not reject.expected for reject in self.rejects)

    def take(self, rows: Iterable[int]) -> Manifest:
        """Only these samples, in this order."""
        return replace(self, samples=tuple(self.samples[row] for row in rows))

    def named_like(self, classes: Iterable[str]) -> Manifest:
        """The same images with the class names of a model, if these differ only in Unicode form."""
        known = {canonical(name): name for name in classes}
        return self.renamed({name: known.get(canonical(name), name) for name in self.classes})

    def renamed(self, names: Mapping[str, str]) -> Manifest:
        """The same images with other names for some classes."""
        names = {name: names.get(name, name) for name in self.classes}
        if all(name == other for name, other in names.items()):
            return self
        samples = []
        for sample in self.samples:
            own = sorted((names[name] for name in self.names_of(sample)), key=natural_key)
            samples.append(replace(sample, label=LABEL_SEPARATOR.join(own)))
        return replace(self, samples=tuple(samples), classes=tuple(sorted(set(names.values()), key=natural_key)))

    def names_of(self, sample: Sample) -> list[str]:
        """The class names of one sample."""
        if not self.multi_label:
            return [sample.label]
        return sample.label.split(LABEL_SEPARATOR) if sample.label else []

    @property
    def labels(self) -> list[int]:
        """Class index of each sample.

        Raises:
            UsageError: an image may have several labels.
        """
        if self.multi_label:
            raise one_label_only(escape(str(self.root)))
        index = {name: number for number, name in enumerate(self.classes)}
        return [index[sample.label] for sample in self.samples]

    @property
    def label_matrix(self) -> NDArray[np.bool_]:
        """(N, C) label indicator matrix, for :func:`topwork.evaluation.multilabel.evaluate_multilabel`."""
        index = {name: number for number, name in enumerate(self.classes)}
        matrix = np.zeros((len(self.samples), len(self.classes)), np.bool_)
        for row, sample in enumerate(self.samples):
            matrix[row, [index[name] for name in self.names_of(sample)]] = True
        return matrix

    @property
    def targets(self) -> NDArray[Any]:
        """The targets: (N,) class indices, or an (N, C) indicator matrix for multi-label data."""
        return self.label_matrix if self.multi_label else np.asarray(self.labels, np.int64)

    @property
    def digest(self) -> str:
        """Digest of images and labels, independent of layout, order and file names."""
        rows = sorted(f"{sample.content_hash} {sample.label}" for sample in self.samples)
        return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogateescape")).hexdigest()

    def check_is_there(self) -> None:
        """Raises UsageError if the images were moved or deleted since the run was made."""
        if not is_url(self.root) and not self.root.exists():
            raise UsageError(
                f"{escape(str(self.root))}: the images of the run are no longer there. Move them back, or fit again with their new "
                "location."
            )

    def read(self, row: int) -> bytes:
        """The bytes of one image; raises ImageError."""
        return self.read_path(self.samples[row].path)

    def read_path(self, path: str) -> bytes:
        """The bytes of one image by its path; raises ImageError."""
        return read_image(self.root, path, self.bands)

    def read_unchanged(self, row: int) -> bytes:
        """The bytes of one image, verified to be unchanged since the scan.

        Raises:
            TopworkError: the image vanished or changed since the scan.
        """
        sample, reason = self.samples[row], "its content differs"
        try:
            data = self.read(row)
            if hashlib.sha256(data).hexdigest() == sample.content_hash:
                return data
        except (ImageError, OSError) as error:
            reason = str(error)
        self.check_is_there()
        raise changed_since_scan(escape(str(self.root / sample.path)), reason)

    def traits(self, rows: Iterable[int] | None = None) -> TraitTable:
        """Cached traits of all or some images; zeros if the cache was emptied since the scan."""
        some = self.samples if rows is None else [self.samples[row] for row in rows]
        return TraitStore(cache_folder()).load([sample.content_hash for sample in some])


def scan(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    visitor: Visitor | None = None,
    n_threads: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    rules: Rules | None = None,
    load: Loader = load_images,
) -> Manifest:
    """Reads all images of a dataset once and returns its manifest.

    Args:
        root: folder that the paths of a table are relative to; same as ``rules.root``.
        visitor: takes the input-sized pixels of images it does not know (see ``features/embed.py``).
        on_progress: called with (images done, images in all).
        rules: what the user says about labels, groups and limits.
        load: what reads and decodes the images (see ``features/cluster.py``).

    Raises:
        UsageError: nothing usable there, or fewer than one class.
    """
    rules = rules or Rules(root=None if root is None else os.fspath(root))
    corrections = read_corrections(rules.corrections) if rules.corrections is not None else None
    listing = list_data(path, rules=rules)
    facts, traits = FactsStore(cache_folder()), TraitStore(cache_folder())
    samples: list[Sample] = []
    rejects = list(listing.rejects)
    failed: list[Loaded] = []
    try:
        images = load(
            listing.entries,
            partial(_read, listing.root, rules.bands),
            facts,
            visitor,
            n_threads_for(listing.root, [entry.path for entry in listing.entries], n_threads),
            traits,
        )
        for n_done, loaded in enumerate(images, start=1):
            _remember(facts, traits, loaded)
            if loaded.facts is None:
                failed.append(loaded)
            else:
                samples.append(_sample(loaded, by_patient=rules.group_by == PATIENT_ID))
                if visitor is not None and loaded.pixels is not None:
                    visitor.take(loaded.content_hash, loaded.pixels)
            if on_progress:
                on_progress(n_done, len(listing.entries))
    finally:
        facts.flush()
        traits.flush()
    # Notes and annotations among the images are no failures, if endings say which files are images.
    has_endings = any(looks_like_image(sample.path) for sample in samples)
    for one in failed:
        is_other = has_endings and one.n_bytes > 0 and not looks_like_image(one.entry.path)
        rejects.append(Reject(one.entry.path, one.reason or "unusable", expected=is_other))
    if rules.group_by == PATIENT_ID and samples and not any(sample.group for sample in samples):
        raise UsageError("--group-by PatientID: none of the images is a DICOM file with a PatientID.")
    said: list[str] = []
    if rules.bands and not any(sample.format == "TIFF" for sample in samples):
        said.append(f"--bands {rules.bands} has no effect: none of the images is a TIFF.")
    if corrections is not None:
        samples, removed, note = with_corrections(samples, corrections, Path(rules.corrections or "").name)
        rejects += removed
        said.append(note)
    manifest = _manifest(listing, samples, rejects, rules.multi_label, tuple(said))
    return replace(manifest, bands=rules.bands or "")


def _read(root: Path, bands: str | None, entry: Entry) -> bytes:
    """The bytes of an image. Workers of a cluster get this with the root alone, not with the listing."""
    return read_image(root, entry.path, bands)


def _remember(facts: FactsStore, traits: TraitStore, loaded: Loaded) -> None:
    if loaded.traits is not None:
        traits.put(loaded.content_hash, loaded.traits)
    value = loaded.facts if loaded.facts is not None else loaded.reason
    if loaded.content_hash and value is not None:
        facts.put(loaded.content_hash, value)


def _sample(loaded: Loaded, *, by_patient: bool) -> Sample:
    entry, facts = loaded.entry, loaded.facts
    assert facts is not None
    group = entry.group or ((facts.patient or None) if by_patient else None)
    names = ("format", "mode", "width", "height", "orientation", "is_gray")
    shared: dict[str, Any] = {name: getattr(facts, name) for name in names}
    return Sample(
        entry.path, entry.label, entry.part, group, entry.domain, loaded.content_hash, loaded.n_bytes, **shared
    )


def _manifest(
    listing: Listing, samples: list[Sample], rejects: list[Reject], multi_label: bool, said: Iterable[str]
) -> Manifest:
    samples.sort(key=lambda sample: natural_key(sample.path))  # a compressed archive is read in another order
    rejects.sort(key=lambda reject: natural_key(reject.path))
    if not samples:
        example = rejects[0] if rejects else None
        why = (not_opened(example.path) or example.reason) if example else ""
        reason = f" For example {escape(example.path)}: {why}." if example else ""
        advice = " If they lie elsewhere: --root FOLDER." if listing.layout == "table" else ""
        raise UsageError(
            f"{escape(str(listing.root))}: none of {len(rejects)} files is a usable image.{reason}{advice}"
        )
    if not any(sample.label for sample in samples):
        raise UsageError(f"{escape(str(listing.root))}: none of {len(samples)} images has a label.")
    classes = _classes((sample.label for sample in samples), multi_label)
    manifest = Manifest(listing.root, listing.layout, tuple(samples), classes, tuple(rejects), multi_label=multi_label)
    notes = (*listing.notes, *said, *_class_notes(listing, manifest), *_conflict_notes(samples))
    return replace(manifest, notes=notes)


def _classes(labels: Iterable[str], multi_label: bool) -> tuple[str, ...]:
    labels = set(labels)
    if multi_label:
        labels = {name for label in labels for name in label.split(LABEL_SEPARATOR) if name}
    return tuple(sorted(labels, key=natural_key))


def _class_notes(listing: Listing, manifest: Manifest) -> list[str]:
    notes = []
    classes, counts = manifest.classes, manifest.counts
    listed = _classes(listing.class_names, manifest.multi_label)
    empty = [name for name in listed if name not in classes]
    if empty:
        notes.append(f"Classes without usable images, ignored: {first_names(empty, 8)}.")
    n_none = sum(not sample.label for sample in manifest.samples)
    if n_none:
        notes.append(f"{n_none} {'image has' if n_none == 1 else 'images have'} none of the labels.")
    few = [f"{escape(name)} ({counts[name]})" for name in classes if counts[name] < FEW_IMAGES]
    if few:
        notes.append(
            f"Classes with fewer than {FEW_IMAGES} images, whose results will be uncertain: {first_names(few, 8)}."
        )
    notes += _part_notes(manifest)
    return notes


def _part_notes(manifest: Manifest) -> list[str]:
    """Classes missing from one of the predefined parts."""
    found: dict[str, set[str]] = defaultdict(set)
    for sample in manifest.samples:
        found[sample.part or "train"].update(manifest.names_of(sample))
    if len(found) < 2:
        return []
    notes = []
    for part, meaning in (("train", "so they cannot be learned"), ("valid", ""), ("test", "so they are not evaluated")):
        missing = [name for name in manifest.classes if name not in found[part]] if part in found else []
        if missing:
            notes.append(f"Without an image in {part}{f', {meaning}' if meaning else ''}: {first_names(missing, 8)}.")
    return notes


def _conflict_notes(samples: list[Sample]) -> list[str]:
    same = exact_duplicates(samples)
    conflicts = [group for group in same if len({samples[row].label for row in group}) > 1]
    notes = []
    if same:
        n = sum(len(group) - 1 for group in same)
        are = "1 image is an exact copy of another" if n == 1 else f"{n} images are exact copies of others"
        notes.append(f"{are}; copies are kept in one part.")
    for group in conflicts[:5]:
        notes.append(
            "The same image has different labels: " + ", ".join(escape(samples[row].path) for row in group) + "."
        )
    if len(conflicts) > 5:
        notes.append(f"{len(conflicts) - 5} more images have different labels.")
    return notes


def exact_duplicates(samples: Sequence[Sample]) -> list[list[int]]:
    """Rows that hold the same bytes, for every content found more than once."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        rows[sample.content_hash].append(row)
    return [same for same in rows.values() if len(same) > 1]


# ---- images without labels


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


# ---- on disk


def save_manifest(manifest: Manifest, path: Path) -> None:
    """Writes samples and rejects as one Parquet table; a row with a ``reject_reason`` was not used."""
    metadata = {"root": absolute(manifest.root), "layout": manifest.layout, "notes": "\n".join(manifest.notes)}
    metadata |= {"multi_label": "yes"} if manifest.multi_label else {}
    metadata |= {"bands": manifest.bands} if manifest.bands else {}
    nothing, rejects = [None] * len(manifest.samples), manifest.rejects
    columns = {
        name: _column([*(getattr(s, name) for s in manifest.samples), *(getattr(r, name, None) for r in rejects)])
        for name in Sample.__slots__
    }
    columns["reject_reason"] = _column([*nothing, *(reject.reason for reject in rejects)])
    table = pa.table(columns)
    table = table.replace_schema_metadata({key: os.fsencode(value) for key, value in metadata.items()})
    with atomic_file(path) as partial:
        pq.write_table(table, partial)


def load_manifest(path: Path) -> Manifest:
    """Reads what :func:`save_manifest` wrote."""
    table = read_parquet(path)
    metadata = {key.decode(): os.fsdecode(value) for key, value in (table.schema.metadata or {}).items()}
    samples, rejects = [], []
    for batch in table.to_batches(10_000):  # a million rows as dicts would be a gigabyte
        for values in batch.to_pylist():
            row = {key: _text(value) for key, value in values.items()}
            reason = row.pop("reject_reason")
            if reason is None:
                samples.append(Sample(**row))
            else:
                rejects.append(Reject(row["path"], reason))
    multi_label = metadata.get("multi_label") == "yes"
    classes = _classes((sample.label for sample in samples), multi_label)
    notes = tuple(line for line in metadata.get("notes", "").split("\n") if line)
    return Manifest(
        Path(metadata["root"]), metadata["layout"], tuple(samples), classes, tuple(rejects), notes, multi_label,
        metadata.get("bands", ""),
    )  # fmt: skip


def _column(values: list[Any]) -> pa.Array:
    """Text as strings, or as file-system bytes if a name is not valid Unicode."""
    try:
        return pa.array(values)
    except (UnicodeEncodeError, pa.ArrowException):
        return pa.array([None if value is None else os.fsencode(value) for value in values], pa.binary())


def _text(value: Any) -> Any:
    return os.fsdecode(value) if isinstance(value, bytes) else value
