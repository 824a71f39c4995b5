"""``topwork evaluate``: a saved model on labelled images, with classes matched by name."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import numpy as np

from topwork.data.manifest import Manifest
from topwork.data.sources import shown
from topwork.errors import UsageError
from topwork.evaluation.metrics import evaluate_part
from topwork.models.classifier import Classifier, load_classifier
from topwork.settings import DataSettings
from topwork.verbs.steps import (
    Silent,
    Watcher,
    model_embedder,
    part_rows,
    predict_features,
    scan_and_embed,
    with_second_look,
)


def evaluate(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    settings: DataSettings | None = None,
    *,
    part: str = "auto",
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Judges a saved model on labelled images; class names are matched by name.

    Args:
        part: which part to use when the data has parts: ``train``, ``valid``, ``test``, ``all``; ``auto`` takes test,
            else valid, else all.

    Returns:
        One part of ``evaluation.json``, with ``notes``.
    """
    settings, watcher = settings or DataSettings(), watcher or Silent()
    classifier = load_classifier(model)
    embedder = model_embedder(classifier)
    watcher.step("scan and embed")
    manifest, features = scan_and_embed(path, settings, embedder, watcher)
    rows = part_rows(manifest, part)
    index = {name: number for number, name in enumerate(classifier.classes)}
    labels = np.array([index.get(sample.label, -1) for sample in manifest.samples])
    watcher.step("evaluate")
    predictions = predict_features(classifier, features, rows, labels)
    predictions = with_second_look(classifier, predictions, manifest, features)
    n_train = classifier.provenance.get("n_train")
    judged = evaluate_part(predictions, n_train=n_train, seed=settings.seed).as_dict()
    notes = [*manifest.notes, *_vocabulary_notes(classifier, manifest)]
    for note in notes:
        watcher.note(note)
    return judged | {
        "notes": notes,
        "rejects": [asdict(reject) for reject in manifest.rejects],
        "n_unused": len(manifest.rejects),
    }


def _vocabulary_notes(classifier: Classifier, manifest: Manifest) -> list[str]:
    known, found = set(classifier.classes), set(manifest.classes)
    notes = []
    if found - known:
        names = ", ".join(shown(name) for name in sorted(found - known)[:8])
        notes.append(f"Classes the model does not know, left out of the figures: {names}.")
    if known - found:
        names = ", ".join(shown(name) for name in sorted(known - found)[:8])
        notes.append(f"Classes of the model without images here, not measured: {names}.")
    if not known & found:
        raise UsageError(
            f"{shown(str(manifest.root))}: none of its classes is one of the model's. "
            f"The model knows: {', '.join(shown(n) for n in classifier.classes[:8])}."
        )
    return notes
