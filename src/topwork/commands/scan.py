"""``topwork scan``: a look at the data without training."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from topwork.commands.prepare import scan_and_embed
from topwork.data.manifest import Manifest, scan
from topwork.data.samples import rules_of
from topwork.data.split import join_groups, split
from topwork.data.transforms import InputSpec
from topwork.evaluation.dataset_summary import Overview, findings, overview
from topwork.evaluation.shortcut import check_shortcuts
from topwork.features.duplicates import near_duplicates, near_pairs
from topwork.features.embed import Embedder
from topwork.models.backbone import load_backbone
from topwork.progress import Reporter
from topwork.settings import ScanSettings


@dataclass(frozen=True)
class Surveyed:
    """What ``topwork scan`` found.

    Attributes:
        findings: sentences, the weightiest first.
        spec: the input of the network that looked, or of the usual one.
    """

    manifest: Manifest
    overview: Overview
    findings: tuple[str, ...]
    spec: InputSpec = field(default_factory=InputSpec)

    def as_dict(self) -> dict[str, Any]:
        """What ``scan --json`` prints, but for the path."""
        manifest = self.manifest
        return {
            "layout": manifest.layout,
            "classes": manifest.counts,
            "n_used": len(manifest.samples),
            "n_rejected": len(manifest.rejects),
            "rejects": [reject.as_dict() for reject in manifest.rejects],
            "parts": dict(Counter(sample.part for sample in manifest.samples if sample.part)),
            "digest": manifest.digest,
            "notes": list(manifest.notes),
            "findings": list(self.findings),
            **self.overview.as_dict(manifest),
        }


def survey(
    path: str | os.PathLike[str], settings: ScanSettings | None = None, *, reporter: Reporter | None = None
) -> Surveyed:
    """Looks at the data without training: files, duplicates, leaks, shortcuts, sizes, outliers.

    Raises:
        UsageError: nothing usable there.
    """
    settings, reporter = settings or ScanSettings(), reporter or Reporter()
    near, spec = None, InputSpec()
    if settings.quick:
        reporter.step("scan")
        manifest = scan(path, n_threads=settings.workers, on_progress=reporter.progress, rules=rules_of(settings))
    else:
        reporter.step("backbone")
        backbone = load_backbone(settings.backbone)
        spec = backbone.spec
        embedder = Embedder(backbone)
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
