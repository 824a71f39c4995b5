"""``topwork evaluate``: a saved model on labeled images, with classes matched by name."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.prepare import scan_and_embed
from topwork.data.manifest import Manifest
from topwork.data.split import part_rows
from topwork.errors import UsageError
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions, labels_for, predict_features
from topwork.export.runtime import model_embedder
from topwork.models.classifier import Classifier, load_classifier
from topwork.progress import Reporter, default_reporter
from topwork.settings import DataSettings
from topwork.text import count, escape, first_names, natural_key


def evaluate(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    settings: DataSettings | None = None,
    *,
    part: str = "auto",
    by: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Judges a saved model on labeled images; class names are matched by name.

    Args:
        part: which part to use when the data has parts: ``train``, ``valid``, ``test``, ``all``; ``auto`` takes test,
            else valid, else all.
        by: also judge the images of each ``domain``, ``group`` or ``part`` by themselves.

    Returns:
        One part of ``evaluation.json``, with ``notes``, and with ``by``: the same figures by domain, group or part.

    Raises:
        UsageError: nothing to judge; ``by`` names what the data does not have.
    """
    settings, reporter = settings or DataSettings(), reporter or default_reporter()
    classifier = load_classifier(model, multi_label=True)
    if classifier.multi_label:  # the model knows what kind of data it is for
        settings = replace(settings, multi_label=True)
    embedder = model_embedder(classifier)
    reporter.step("scan and embed")
    manifest, features = scan_and_embed(path, settings, embedder, reporter)
    manifest = manifest.named_like(classifier.classes)
    rows = part_rows(manifest, part)
    reporter.step("evaluate")
    n_train = classifier.provenance.get("n_train")
    notes = [*manifest.notes, *_vocabulary_notes(classifier, manifest, rows)]
    predictions = predict_features(classifier, features, rows, labels_for(classifier, manifest))
    judged = evaluate_part(predictions, n_train=n_train, seed=settings.seed).as_dict()
    if by is not None:
        judged["by"] = {by: _judged_by(by, predictions, manifest, n_train, settings.seed)}
    for note in notes:
        reporter.note(note)
    return judged | {
        "notes": notes,
        "rejects": [reject.as_dict() for reject in manifest.rejects],
        "n_unused": manifest.n_failed + _n_unknown(classifier, manifest, rows),
    }


def _judged_by(
    by: str, predictions: Predictions, manifest: Manifest, n_train: dict[str, int] | None, seed: int
) -> dict[str, Any]:
    """The figures of each domain, group or part, by its name."""
    values = [getattr(manifest.samples[row], by) for row in predictions.sample_indices.tolist()]
    names = sorted({value for value in values if value is not None})
    if not names:
        raise UsageError(
            f"--by {by}: {escape(str(manifest.root))} names no {by}. A table has a column {by}; else add --{by}-by."
        )
    found = {}
    for name in names:
        own = predictions.take(np.array([value == name for value in values]))
        found[name] = evaluate_part(own, n_train=n_train, seed=seed).as_dict()
    return found


def _n_unknown(classifier: Classifier, manifest: Manifest, rows: NDArray[np.int64]) -> int:
    """Images that cannot be evaluated, because the model knows none of their classes."""
    known = set(classifier.classes)
    names = [manifest.names_of(manifest.samples[row]) for row in rows.tolist()]
    return sum(bool(own) and not known.intersection(own) for own in names)


def _vocabulary_notes(classifier: Classifier, manifest: Manifest, rows: NDArray[np.int64]) -> list[str]:
    known, found = set(classifier.classes), set(manifest.classes)
    notes = []
    if found - known:
        n_left = _n_unknown(classifier, manifest, rows)
        names = first_names(sorted(found - known, key=natural_key), 8)
        notes.append(
            f"Not evaluated: {n_left:,} of {count(len(rows), 'image')}, because the model does not know their class ({names})."
        )
    if known - found:
        names = ", ".join(escape(name) for name in sorted(known - found)[:8])
        notes.append(f"Classes of the model without images here, not measured: {names}.")
    if not known & found:
        raise UsageError(
            f"{escape(str(manifest.root))}: none of its classes is one of the model's. "
            f"The model knows: {', '.join(escape(n) for n in classifier.classes[:8])}."
        )
    return notes
