"""``topwork examine``: reads a model and labeled images; ``evaluation/examine.py`` does the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest, scan
from topwork.data.samples import rules_of
from topwork.data.split import join_groups, part_rows
from topwork.data.transforms import InputSpec, Pixels, fit_to_input
from topwork.errors import UsageError
from topwork.evaluation.dataset_summary import check_shortcuts
from topwork.evaluation.examine import Examination, examine
from topwork.evaluation.predictions import labels_for
from topwork.export.runtime import engine_of
from topwork.models.classifier import Classifier, load_classifier
from topwork.progress import Reporter, default_reporter
from topwork.run import images_of_run
from topwork.settings import DataSettings
from topwork.text import escape

N_IMAGES = 200  # enough to detect a difference of five points; takes a minute


@dataclass(frozen=True, eq=False)
class Examined:
    """An examination with its inputs.

    Attributes:
        rows: manifest rows of the images examined, in order.
    """

    model: Path
    path: str
    manifest: Manifest
    classifier: Classifier
    rows: NDArray[np.int64]
    examination: Examination


def examine_model(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    settings: DataSettings | None = None,
    *,
    part: str = "auto",
    n_images: int = N_IMAGES,
    reporter: Reporter | None = None,
) -> Examined:
    """Examines a saved model on labeled images; classes are matched by name.

    Args:
        path: the images; None for those of the model's run.
        part: which part to use if the data has parts, as for ``evaluate``.
        n_images: use at most this many images, drawn by the seed.

    Raises:
        UsageError: none of the images belongs to a class of the model.
    """
    settings, reporter = settings or DataSettings(), reporter or default_reporter()
    if n_images < 10:
        raise UsageError(f"--n-images {n_images}: must be at least 10; fewer give no reliable results.")
    classifier = load_classifier(model)
    reporter.step("scan")
    if path is None:
        manifest = images_of_run(model, settings)
    else:
        rules = rules_of(settings, classifier.backbone.spec.bands)
        manifest = scan(path, n_threads=settings.workers, on_progress=reporter.progress, rules=rules)
    labels, rows = labels_for(classifier, manifest), part_rows(manifest, part)
    rows = rows[labels[rows] >= 0]
    if not len(rows):
        raise UsageError(f"{escape(str(manifest.root))}: none of its images is of a class of the model.")
    rows = _drawn(manifest, rows, n_images, settings.seed)
    shortcuts = check_shortcuts(manifest, manifest.traits(), join_groups(manifest), settings.seed)
    reporter.step("examine")
    examination = examine(
        classifier,
        engine_of(classifier),
        _reader(manifest, rows, settings.workers),
        labels[rows],
        shortcuts=shortcuts,
        seed=settings.seed,
        on_progress=reporter.progress,
    )
    for finding in examination.findings:
        if finding.kind == "warning":
            reporter.note(finding.text)
    return Examined(Path(model), str(path or manifest.root), manifest, classifier, rows, examination)


def _drawn(manifest: Manifest, rows: NDArray[np.int64], n: int, seed: int) -> NDArray[np.int64]:
    """At most n rows, in an order that depends only on the content of the images and the seed."""
    by_content = sorted(rows.tolist(), key=lambda row: (manifest.samples[row].content_hash, manifest.samples[row].path))
    order = np.random.default_rng([seed, 5]).permutation(len(by_content))
    return np.array(by_content, dtype=np.int64)[order][:n]


def _reader(manifest: Manifest, rows: NDArray[np.int64], n_threads: int | None) -> Callable[[InputSpec], Pixels]:
    """A function that reads the images of some rows for an input spec."""

    def load(spec: InputSpec) -> Pixels:
        def one(row: int) -> Pixels:
            return fit_to_input(decode(manifest.read_unchanged(row), min_side=spec.min_side).pixels, spec)

        return np.stack(list(in_order(one, rows.tolist(), n_threads)))

    return load
