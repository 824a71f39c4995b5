"""Analysis of a run beyond its metrics: likely label errors, heatmaps, decisions, learning curve and advice.

In: :class:`AnalysisInputs`. Out: plain values for ``insights.json`` in the run folder; rows are those of the manifest.
Everything is computed from existing features and logits, except for the heatmaps of about a dozen images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import decode
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import TopworkError
from topwork.evaluation.advice import Advice, ClassRecord, Situation, advise
from topwork.evaluation.audit import Outlier, SuspectedLabel, outliers, suspected_labels
from topwork.evaluation.decisions import Decision, count_outcomes
from topwork.evaluation.explain import find_evidence
from topwork.evaluation.intervals import wilson
from topwork.evaluation.learning_curve import LearningCurve, learning_curve
from topwork.evaluation.metrics import HELD_OUT
from topwork.evaluation.predictions import Ints, Predictions, softmax
from topwork.evaluation.similarity import nearest_images
from topwork.features.embed import Features
from topwork.features.feature_maps import OpenNetwork
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.text import as_text

MAX_SUSPECTS, N_OUTLIERS, N_NEIGHBORS = 500, 24, 4
LISTED = 0.07  # share of the images listed as possible label errors
N_WRONG, N_RIGHT = 10, 6  # explained images
_AUDITED_VALUES = 20_000_000  # probabilities per part: 20,000 images of 1,000 classes
_NEIGHBORS_AMONG = 4096  # training images searched for the most similar ones


@dataclass(frozen=True)
class AnalysisInputs:
    """Inputs of the analysis.

    Attributes:
        groups: (N,) group of each manifest row.
        probe_features: features of the probe (of the network before tuning).
        features: features of the classifier's head.
        network: returns the opened network of the classifier, for heatmaps.
        predictions: by part.
        evaluation: the metrics of the parts, as in ``evaluation.json``.
        embedding_rate: images per second of this run; None if nothing was embedded.
        path, out, settings: data, run folder and requested settings, for the commands in the advice.
    """

    manifest: Manifest
    parts: Split
    groups: Sequence[int]
    probe: Probe
    probe_features: Features
    classifier: Classifier
    features: Features
    network: Callable[[], OpenNetwork]
    predictions: Mapping[str, Predictions]
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    is_tuned: bool = False
    embedding_rate: float | None = None
    path: str = "PATH"
    out: str = "RUN"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @cached_property
    def labels(self) -> Ints:
        """(N,) class index of each manifest row."""
        return np.array(self.manifest.labels)

    @property
    def scored(self) -> Ints:
        """Manifest rows of the training images with cross-validated predictions."""
        return self.parts.train[self.probe.rows]

    @property
    def scored_correct(self) -> NDArray[np.bool_]:
        """Whether the cross-validated prediction of each is correct."""
        return np.asarray(self.probe.out_of_fold_logits.argmax(axis=1) == self.labels[self.scored])

    @property
    def main_part(self) -> str | None:
        """The main part."""
        return next((name for name in HELD_OUT if len(self.predictions.get(name, ()))), None)


def analyze(inputs: AnalysisInputs) -> dict[str, Any]:
    """The content of ``insights.json``."""
    suspects, n_audited = _suspects(inputs)
    confident = [suspect.position for suspect in suspects if suspect.is_confident]
    curve, every = _curve(inputs), np.arange(len(inputs.labels))
    odd = outliers(inputs.probe_features.block("last", every), N_OUTLIERS, N_NEIGHBORS, inputs.seed)
    return {
        "suspects": [_suspect_row(suspect, inputs.manifest) for suspect in suspects],
        "n_suspects": len(confident),
        "n_audited": n_audited,
        "outliers": [_outlier_row(outlier) for outlier in odd],
        "duplicates": _duplicates(inputs),
        "decisions": _decisions(inputs),
        "explanations": _explanations(inputs),
        "learning_curve": asdict(curve) if curve else None,
        "advice": [asdict(item) for item in advise(_situation(inputs, curve, confident))],
    }


# ---- labels


def _suspects(inputs: AnalysisInputs) -> tuple[tuple[SuspectedLabel, ...], int]:
    """Likely label errors among all images with out-of-sample predictions; positions are rows."""
    held_out = [_some(inputs.predictions[name]) for name in HELD_OUT if name in inputs.predictions]
    every = np.concatenate([inputs.scored, *(part.sample_indices for part in held_out)])
    probabilities = np.concatenate(
        [softmax(inputs.probe.out_of_fold_logits), *(part.probabilities for part in held_out)]
    )
    labels = inputs.labels[every]
    n_listed = max(len(suspected_labels(probabilities, labels)), math.ceil(LISTED * len(every)))
    last = inputs.probe_features.block("last", every)
    found = suspected_labels(probabilities, labels, last, min(MAX_SUSPECTS, n_listed), N_NEIGHBORS)

    def row_of(suspect: SuspectedLabel) -> SuspectedLabel:
        near = tuple(int(every[row]) for row in suspect.neighbors)
        return replace(suspect, position=int(every[suspect.position]), neighbors=near)

    return tuple(map(row_of, found)), len(every)


def _some(part: Predictions) -> Predictions:
    """A part, or evenly spaced images of it, so that the probabilities of all classes fit in memory."""
    step = math.ceil(part.logits.size / _AUDITED_VALUES)
    return part.take(np.arange(0, len(part), step)) if step > 1 else part


def _suspect_row(suspect: SuspectedLabel, manifest: Manifest) -> dict[str, Any]:
    return asdict(suspect) | {
        "row": suspect.position,
        "path": as_text(manifest.samples[suspect.position].path),
        "label": as_text(manifest.classes[suspect.label]),
        "suggested": as_text(manifest.classes[suspect.suggested]),
    }


def _outlier_row(outlier: Outlier) -> dict[str, Any]:
    return {"row": outlier.position, "distance": outlier.distance, "neighbors": list(outlier.neighbors)}


def _duplicates(inputs: AnalysisInputs) -> dict[str, Any]:
    """Repeated images of a part (duplicates, near duplicates, groups), and the score with one image of each."""
    group = np.asarray(inputs.groups)
    found: dict[str, Any] = {}
    for name in HELD_OUT:
        if name not in inputs.predictions:
            continue
        part = inputs.predictions[name]
        _, first = np.unique(group[part.sample_indices], return_index=True)
        if len(first) == len(part):
            continue
        correct = part.correct
        without = float(correct[first].mean())
        found[name] = {
            "n_repeated": len(part) - len(first),
            "n_without": len(first),
            "accuracy": float(correct.mean()),
            "accuracy_without": {"value": without, **wilson(without, len(first)).as_dict()},
        }
    return found


# ---- decisions


def _decisions(inputs: AnalysisInputs) -> dict[str, Any]:
    """Frequency of each outcome on the held-out parts, and the accuracy of the labels."""
    found: dict[str, Any] = {"thresholds": dict(inputs.classifier.thresholds), "parts": {}}
    for name in HELD_OUT:
        if name not in inputs.predictions:
            continue
        part = inputs.predictions[name].labeled()
        last = inputs.features.block("last", part.sample_indices)
        answers, outcomes = count_outcomes(inputs.classifier, part, last)
        answered = answers == Decision.LABEL.value
        n_right, n = int(part.correct[answered].sum()), int(answered.sum())
        interval = wilson(n_right / n, n) if n else None
        found["parts"][name] = {
            "n": len(part),
            **{f"n_{kind}": count for kind, count in outcomes.items()},
            "accuracy_of_labels": {"value": n_right / n, **interval.as_dict()} if interval else None,
            "accuracy": float(part.correct.mean()) if len(part) else None,
            "wrong_left_open": int((~part.correct[~answered]).sum()),
            "n_wrong": int((~part.correct).sum()),
        }
    return found


# ---- explanations


def _explanations(inputs: AnalysisInputs) -> dict[str, Any]:
    """Heatmaps for the predicted and the true class of errors and some correct predictions, with similar images."""
    manifest, parts, classifier, features = inputs.manifest, inputs.parts, inputs.classifier, inputs.features
    name = inputs.main_part
    empty: dict[str, Any] = {"method": None, "part": name, "images": []}
    if name is None:
        return empty
    part = inputs.predictions[name].labeled()
    positions, images = _readable(manifest, classifier, part, _to_explain(part, N_WRONG, N_RIGHT))
    if not len(positions):
        return empty
    some = part.take(positions)
    wanted = np.stack([some.predicted, some.labels], axis=1)
    evidence = find_evidence(classifier, images, wanted, inputs.network())
    stride = max(1, len(parts.train) // _NEIGHBORS_AMONG)
    reference = parts.train[::stride]
    near, cosine = nearest_images(
        features.block("last", some.sample_indices), features.block("last", reference), N_NEIGHBORS
    )
    rows = []
    for i, row in enumerate(some.sample_indices.tolist()):
        rows.append(
            {
                "row": row,
                "predicted": int(some.predicted[i]),
                "label": int(some.labels[i]),
                "probability": float(some.confidence[i]),
                "maps": [np.round(m.astype(float), 5).tolist() for m in evidence.maps[i]],
                "logits": [round(float(evidence.logits[i, c]), 4) for c in wanted[i]],
                "nearest": [int(reference[n]) for n in near[i]],
                "similarity": [round(float(v), 4) for v in cosine[i]],
            }
        )
    return {"method": evidence.method, "part": name, "images": rows}


def _to_explain(part: Predictions, n_wrong: int, n_right: int) -> Ints:
    """Positions of the most confident errors, then of correct predictions from as many classes as possible."""
    order = np.argsort(-part.confidence, kind="stable")
    wrong, right = order[~part.correct[order]], order[part.correct[order]]
    once = right[np.sort(np.unique(part.labels[right], return_index=True)[1])]
    # Evenly spaced, because the first of many classes are those with the most confident predictions.
    spread = once[np.unique(np.linspace(0, len(once) - 1, min(n_right, len(once))).astype(int))] if len(once) else once
    rest = right[~np.isin(right, spread)][: max(0, n_right - len(spread))]
    return np.concatenate([wrong[:n_wrong], spread, rest]).astype(np.int64)


def _readable(manifest: Manifest, classifier: Classifier, part: Predictions, chosen: Ints) -> tuple[Ints, Pixels]:
    """The positions whose images can still be read, and their input."""
    spec = classifier.backbone.spec
    kept, images = [], []
    for position in chosen.tolist():
        try:
            data = manifest.read_unchanged(int(part.sample_indices[position]))
            images.append(fit_to_input(decode(data, min_side=spec.min_side).pixels, spec))
            kept.append(position)
        except TopworkError:
            continue  # gone or changed since the scan, which the page mentions
    return np.array(kept, dtype=np.int64), np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)


# ---- learning curve and advice


def _curve(inputs: AnalysisInputs) -> LearningCurve | None:
    """The learning curve of the chosen head on all cross-validated training images."""
    probe, rows, labels = inputs.probe, inputs.scored, inputs.labels
    chosen = next(trial for trial in probe.trials if trial.chosen)
    if len(rows) < 30:
        return None
    columns = probe.head.transform.apply(inputs.probe_features.blocks(probe.head.transform.blocks, rows))
    share = 1 - 1 / chosen.n_folds
    groups = np.unique(np.asarray(inputs.groups)[rows], return_inverse=True)[1]
    n_classes, penalty = len(inputs.manifest.classes), chosen.penalty * share
    return learning_curve(columns, labels[rows], groups, n_classes, penalty, inputs.scored_correct, share, inputs.seed)


def _situation(inputs: AnalysisInputs, curve: LearningCurve | None, suspects: Sequence[int]) -> Situation:
    labels, classes = inputs.labels, inputs.manifest.classes
    scored, correct = labels[inputs.scored], inputs.scored_correct
    rows = (labels[inputs.parts.train], scored, scored[correct])
    counts = np.stack([np.bincount(some, minlength=len(classes)) for some in rows], axis=1).tolist()
    name = inputs.main_part
    part = inputs.predictions[name].labeled() if name else None
    accuracy = float(correct.mean()) if len(correct) else 0.0
    if inputs.is_tuned and part is not None and len(part):
        accuracy = float(part.correct.mean())
    leaks = inputs.evaluation.get("leaks", {})
    clean = inputs.evaluation.get(f"{name}_without_leaks") or {}
    return Situation(
        n_images=len(labels),
        n_train=len(inputs.parts.train),
        accuracy=accuracy,
        classes=tuple(ClassRecord(as_text(name), *own) for name, own in zip(classes, counts, strict=True)),
        curve=curve,
        n_suspects=len(suspects),
        n_suspects_held_out=len(set(suspects) & set(part.sample_indices.tolist())) if part is not None else 0,
        n_leaked=sum(found["n_leaked"] for found in leaks.values()),
        clean_accuracy=clean.get("accuracy", {}).get("value"),
        held_out=(name, len(part), float(part.correct.mean())) if name and part is not None and len(part) else None,
        backbone=inputs.classifier.backbone.name,
        is_tuned=inputs.is_tuned,
        embedding_rate=inputs.embedding_rate,
        path=inputs.path,
        out=inputs.out,
        settings=inputs.settings,
    )


def advice_of(stored: dict[str, Any]) -> tuple[Advice, ...]:
    """The advice of an ``insights.json``."""
    return tuple(Advice(**item) for item in stored.get("advice", []))
