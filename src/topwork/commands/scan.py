"""``topwork scan``: checks a dataset before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.commands.prepare import scan_and_embed
from topwork.data.layouts import without_notes
from topwork.data.listing import list_data
from topwork.data.manifest import Manifest, scan
from topwork.data.samples import LABEL_SEPARATOR, Entry, Reject, Sample, rules_of
from topwork.data.split import join_groups, split
from topwork.data.transforms import InputSpec
from topwork.evaluation.dataset_summary import Overview, check_shortcuts, findings, overview
from topwork.features.cluster import embedder_on, loader_on
from topwork.features.duplicates import near_duplicates, near_pairs
from topwork.models.backbone import load_backbone
from topwork.progress import Reporter
from topwork.settings import DataSettings, ScanSettings, check
from topwork.text import as_text, natural_key

LABELS_FROM = {
    "folders": "the class folders",
    "parts": "the class folders in the train, valid and test folders",
    "names": "the file names, by --label-regex",
    "table": "a table",
    "arrays": "an array of labels",
    "hub": "a saved dataset",
}
N_EXAMPLES = 3


@dataclass(frozen=True)
class Understood:
    """How the names in a dataset were interpreted, before any image is decoded.

    Attributes:
        classes: number of files of each class.
        parts: number of files of each predefined part.
        examples: the first paths with their labels.
    """

    layout: str
    classes: dict[str, int]
    parts: dict[str, int]
    examples: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()
    rejects: tuple[Reject, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What ``fit --dry-run --json`` prints, without the path."""
        return {
            "layout": self.layout,
            "labels_from": LABELS_FROM[self.layout],
            "classes": self.classes,
            "parts": self.parts,
            "examples": [{"path": as_text(path), "label": as_text(label)} for path, label in self.examples],
            "n_files": sum(self.parts.values()) if self.parts else sum(self.classes.values()),
            "notes": list(self.notes),
            "rejects": [reject.as_dict() for reject in self.rejects],
        }


def understood(path: str | os.PathLike[str], settings: DataSettings | None = None) -> Understood:
    """How the data is interpreted: layout, source of labels, parts, classes, first paths. No image is opened.

    Raises:
        UsageError: nothing usable, an ambiguous layout, or settings without effect.
    """
    check(settings or DataSettings())
    rules = rules_of(settings or DataSettings())
    listing = list_data(path, rules=rules)
    counts: Counter[str] = Counter()
    images = set(without_notes([entry.path for entry in listing.entries]))
    entries = [entry for entry in listing.entries if entry.path in images]
    for entry in entries:
        counts.update(entry.label.split(LABEL_SEPARATOR) if rules.multi_label else [entry.label])
    return Understood(
        listing.layout,
        {name: counts[name] for name in sorted(counts, key=natural_key) if name},
        _parts_of(entries),
        tuple((entry.path, entry.label) for entry in entries[:N_EXAMPLES]),
        listing.notes,
        listing.rejects,
    )


def _parts_of(items: Sequence[Entry | Sample]) -> dict[str, int]:
    found = Counter(item.part for item in items)
    return {part: found[part] for part in ("train", "valid", "test") if found[part]}


@dataclass(frozen=True)
class Surveyed:
    """What ``topwork scan`` found.

    Attributes:
        findings: sentences, the most important first.
        spec: the input of the network used, or of the default one.
    """

    manifest: Manifest
    overview: Overview
    findings: tuple[str, ...]
    spec: InputSpec = field(default_factory=InputSpec)

    @property
    def understood(self) -> Understood:
        """How the names were interpreted."""
        samples = self.manifest.samples
        examples = tuple((sample.path, sample.label) for sample in samples[:N_EXAMPLES])
        return Understood(self.manifest.layout, self.manifest.counts, _parts_of(samples), examples)

    def as_dict(self) -> dict[str, Any]:
        """What ``scan --json`` prints, without the path."""
        manifest = self.manifest
        return {
            **{
                name: self.understood.as_dict()[name]
                for name in ("layout", "labels_from", "classes", "parts", "examples")
            },
            "n_used": len(manifest.samples),
            "n_rejected": len(manifest.rejects),
            "rejects": [reject.as_dict() for reject in manifest.rejects],
            "digest": manifest.digest,
            "notes": list(manifest.notes),
            "findings": list(self.findings),
            **self.overview.as_dict(manifest),
        }


def survey(
    path: str | os.PathLike[str], settings: ScanSettings | None = None, *, reporter: Reporter | None = None
) -> Surveyed:
    """Checks a dataset before training: files, duplicates, leaks, shortcuts, sizes and outliers.

    Raises:
        UsageError: nothing usable at the path.
    """
    settings, reporter = settings or ScanSettings(), reporter or Reporter()
    near, spec = None, InputSpec()
    if settings.quick:
        reporter.step("scan")
        manifest = scan(
            path, n_threads=settings.workers, on_progress=reporter.progress, rules=rules_of(settings),
            load=loader_on(settings),
        )  # fmt: skip
    else:
        reporter.step("backbone")
        backbone = load_backbone(settings.backbone)
        spec = backbone.spec
        embedder = embedder_on(settings, backbone)
        if embedder.engine.note:
            reporter.note(embedder.engine.note)
        reporter.step("scan and embed")
        manifest, features = scan_and_embed(path, settings, embedder, reporter)
        reporter.step("look")
        near = near_duplicates(manifest, features, embedder)
    groups = join_groups(manifest, near_pairs(near))
    parts = split(manifest, groups=groups) if manifest.has_parts else None
    traits = manifest.traits()
    shortcuts = check_shortcuts(manifest, traits, groups, settings.seed)
    found = overview(manifest, traits, near, parts, shortcuts, min(spec.height, spec.width))
    return Surveyed(manifest, found, tuple(findings(manifest, found)), spec)
