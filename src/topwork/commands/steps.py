"""The steps that several verbs share: scan and embed in one pass, predict from stored features, judge, and say so.

In: paths and settings, or values of the layers below. Out: values. Nothing is written here; ``run.py`` does that.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, scan
from topwork.data.samples import Rules
from topwork.data.split import Split
from topwork.errors import UsageError
from topwork.evaluation.metrics import PartEvaluation, evaluate_part
from topwork.evaluation.predictions import Predictions, Task
from topwork.features.duplicates import NearDuplicates
from topwork.features.embed import Embedder, Features, embed
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.progress import Reporter, Stopwatch
from topwork.run import versions
from topwork.settings import DataSettings
from topwork.text import escape


def scan_and_embed(
    path: str | os.PathLike[str], settings: DataSettings, embedder: Embedder, reporter: Reporter
) -> tuple[Manifest, Features]:
    """One pass over the pixels; what was embedded before an interruption is kept."""
    try:
        manifest = scan(
            path,
            visitor=embedder,
            n_threads=settings.workers,
            on_progress=reporter.progress,
            rules=rules_of(settings),
        )
    finally:
        embedder.flush()
    return manifest, embed(embedder.backbone, manifest, embedder=embedder, n_threads=settings.workers)


def rules_of(settings: DataSettings) -> Rules:
    """What the settings say about how the data is to be read."""
    return Rules(**{item.name: getattr(settings, item.name) for item in fields(Rules)})


def near_pairs(near: NearDuplicates | None) -> list[tuple[int, int]]:
    """Rows that show the same picture, for :func:`topwork.data.split.join_groups`."""
    return [(pair.a, pair.b) for pair in near.pairs] if near else []


def model_embedder(classifier: Classifier) -> Embedder:
    """An embedder whose features are exactly those that the model's head reads."""
    from topwork.export.runtime import engine_of

    engine = engine_of(classifier)
    return Embedder(classifier.backbone, engine)


def predict_features(
    classifier: Classifier, features: Features, rows: NDArray[np.int64], labels: NDArray[Any]
) -> Predictions:
    """Logits of some rows from stored features, a bounded number at a time.

    Args:
        labels: of all of the manifest's samples, for the classifier's classes: (N,), or (N, C) for several labels.
    """
    blocks = classifier.head.transform.blocks
    chunks = []
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        chunks.append(classifier.head.logits(features.blocks(blocks, some)))
    logits = np.concatenate(chunks) if chunks else np.zeros((0, len(classifier.classes)))
    return Predictions(classifier.classes, rows, labels[rows], logits, Task.of(classifier))


def evaluate_parts(
    classifier: Classifier, manifest: Manifest, parts: Split, predictions: dict[str, Predictions], seed: int
) -> dict[str, Any]:
    """The figures of valid and test, as ``evaluation.json`` holds them, and the numbers of parameters."""
    n_train = n_train_of(manifest, parts)
    judged: dict[str, Any] = {}
    for name in ("valid", "test"):
        if name in predictions:
            part: PartEvaluation = evaluate_part(predictions[name], n_train=n_train, seed=seed)
            judged[name] = part.as_dict()
    return judged | parameters_of(classifier)


def provenance(manifest: Manifest, parts: Split, evaluation: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    """What a model folder says about where the model comes from."""
    judged = "test" if "test" in evaluation else "valid" if "valid" in evaluation else None
    kept = ("n", "accuracy", "balanced_accuracy", "mean_average_precision", "micro_f1")
    return {
        "data_digest": manifest.digest,
        "n_train": n_train_of(manifest, parts),
        "judged_on": judged,
        "figures": {key: evaluation[judged][key] for key in kept if key in evaluation[judged]} if judged else None,
        "seed": settings.seed,
        "versions": versions(),
    }


def parameters_of(classifier: Classifier) -> dict[str, int]:
    """Numbers of parameters, and of those that a probe trains, as ``evaluation.json`` holds them."""
    n_head = int(classifier.head.weight.size + classifier.head.bias.size)
    return {"n_parameters": classifier.backbone.n_parameters + n_head, "n_trainable": n_head}


def n_train_of(manifest: Manifest, parts: Split) -> dict[str, int]:
    """Training images of each class."""
    targets = manifest.targets[parts.train]
    counts = targets.sum(0) if manifest.multi_label else np.bincount(targets, minlength=len(manifest.classes))
    return dict(zip(manifest.classes, counts.tolist(), strict=True))


def timing(clock: Stopwatch, embedder: Embedder) -> dict[str, Any]:
    """Seconds of each step and images per second, as ``evaluation.json`` holds them."""
    seconds = clock.seconds["scan_and_embed"]
    return {
        "seconds": clock.seconds | {"total": clock.total},
        "n_embedded": embedder.n_embedded,
        "images_per_second": round(embedder.n_embedded / seconds, 1) if embedder.n_embedded and seconds else None,
        "engine_images_per_second": (
            round(embedder.n_embedded / embedder.engine_seconds, 1) if embedder.engine_seconds else None
        ),
    }


def part_rows(manifest: Manifest, part: str) -> NDArray[np.int64]:
    """Rows of the wanted part; all rows where the data has no parts."""
    by_part: dict[str, list[int]] = {}
    for row, sample in enumerate(manifest.samples):
        by_part.setdefault(sample.part or "none", []).append(row)
    if part == "auto":
        part = next((name for name in ("test", "valid") if name in by_part), "all")
    if part == "all":
        return np.arange(len(manifest.samples))
    if part not in by_part:
        raise UsageError(
            f"--part {part}: {escape(str(manifest.root))} has no such part; found {', '.join(sorted(by_part))}."
        )
    return np.array(by_part[part])


def probe_record(classifier: Classifier, probe: Probe, embedder: Embedder) -> dict[str, Any]:
    """What a recipe says of a probe: the network, how it ran, the head that was chosen and by what."""
    chosen = next(trial for trial in probe.trials if trial.chosen)
    return {
        "backbone": classifier.backbone.name,
        "architecture": classifier.backbone.architecture,
        "preprocessing": classifier.backbone.spec.as_dict(),
        "engine": embedder.engine.kind,
        "precision": embedder.engine.precision,
        "head": {
            "kind": classifier.head.kind,
            "candidate": chosen.candidate,
            "penalty": chosen.penalty,
            "n_features": int(classifier.head.weight.shape[1]),
            "reason": probe.reason,
        },
        "cross_validation": {
            "n_folds": chosen.n_folds,
            "n_images": chosen.n_images,
            "accuracy": chosen.accuracy,
            "standard_error": chosen.standard_error,
        },
    }
