"""Analysis of a run beyond its metrics: likely label errors, outliers, heatmaps, decisions, learning curve and advice.

In: :class:`AnalysisInputs`. Out: plain values for ``insights.json`` in the run folder; rows are those of the manifest.
Everything is computed from existing features and logits, except for the heatmaps of about a dozen images. Label errors
are found with predictions of models that were not trained on the image, or they would go unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.images import decode
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import TopworkError
from topwork.evaluation.advice import Advice, ClassRecord, Situation, advise
from topwork.evaluation.calibration import Decision, count_outcomes
from topwork.evaluation.explain import find_evidence
from topwork.evaluation.intervals import wilson
from topwork.evaluation.learning_curve import LearningCurve, learning_curve
from topwork.evaluation.metrics import HELD_OUT
from topwork.evaluation.predictions import Bools, Ints, Predictions, softmax
from topwork.evaluation.similarity import nearest, nearest_images, unit_rows
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
_LARGEST_REFERENCE = 2048  # images searched for the neighbors of possible outliers


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
    def held_out(self) -> dict[str, Predictions]:
        """Predictions by held-out part, the main part first."""
        return {name: self.predictions[name] for name in HELD_OUT if name in self.predictions}

    @property
    def main_part(self) -> str | None:
        """The main part."""
        return next((name for name, part in self.held_out.items() if len(part)), None)


def analyze(inputs: AnalysisInputs) -> dict[str, Any]:
    """The content of ``insights.json``."""
    suspects, n_audited = _suspects(inputs)
    confident = [suspect["row"] for suspect in suspects if suspect["is_confident"]]
    curve, every = _curve(inputs), np.arange(len(inputs.labels))
    odd = outliers(inputs.probe_features.block("last", every), N_OUTLIERS, N_NEIGHBORS, inputs.seed)
    return {
        "suspects": suspects,
        "n_suspects": len(confident),
        "n_audited": n_audited,
        "outliers": [{"row": one.position, "distance": one.distance, "neighbors": list(one.neighbors)} for one in odd],
        "duplicates": _duplicates(inputs),
        "decisions": _decisions(inputs),
        "explanations": _explanations(inputs),
        "learning_curve": asdict(curve) if curve else None,
        "advice": [asdict(item) for item in advise(_situation(inputs, curve, confident))],
    }


# ---- labels


def _suspects(inputs: AnalysisInputs) -> tuple[list[dict[str, Any]], int]:
    """Likely label errors among all images with out-of-sample predictions, and the number of these images."""
    held_out = [_some(part) for part in inputs.held_out.values()]
    every = np.concatenate([inputs.scored, *(part.sample_indices for part in held_out)])
    probabilities = np.concatenate(
        [softmax(inputs.probe.out_of_fold_logits), *(part.probabilities for part in held_out)]
    )
    last, least = inputs.probe_features.block("last", every), math.ceil(LISTED * len(every))
    found = suspected_labels(
        probabilities, inputs.labels[every], last, least=least, most=MAX_SUSPECTS, n_neighbors=N_NEIGHBORS
    )
    return [_suspect_row(suspect, every, inputs.manifest) for suspect in found], len(every)


def _some(part: Predictions) -> Predictions:
    """A part, or evenly spaced images of it, so that the probabilities of all classes fit in memory."""
    step = math.ceil(part.logits.size / _AUDITED_VALUES)
    return part.take(np.arange(0, len(part), step)) if step > 1 else part


def _suspect_row(suspect: SuspectedLabel, every: Ints, manifest: Manifest) -> dict[str, Any]:
    row = int(every[suspect.position])
    return asdict(suspect) | {
        "position": row,
        "neighbors": [int(every[near]) for near in suspect.neighbors],
        "row": row,
        "path": as_text(manifest.samples[row].path),
        "label": as_text(manifest.classes[suspect.label]),
        "suggested": as_text(manifest.classes[suspect.suggested]),
    }


def _duplicates(inputs: AnalysisInputs) -> dict[str, Any]:
    """Repeated images of a part (duplicates, near duplicates, groups), and the score with one image of each."""
    group = np.asarray(inputs.groups)
    found: dict[str, Any] = {}
    for name, part in inputs.held_out.items():
        _, first = np.unique(group[part.sample_indices], return_index=True)
        if len(first) < len(part):
            without = float(part.correct[first].mean())
            found[name] = {
                "n_repeated": len(part) - len(first),
                "n_without": len(first),
                "accuracy": float(part.correct.mean()),
                "accuracy_without": {"value": without, **wilson(without, len(first)).as_dict()},
            }
    return found


# ---- decisions


def _decisions(inputs: AnalysisInputs) -> dict[str, Any]:
    """Frequency of each outcome on the held-out parts, and the accuracy of the labels."""
    found: dict[str, Any] = {"thresholds": dict(inputs.classifier.thresholds), "parts": {}}
    for name, predictions in inputs.held_out.items():
        part = predictions.labeled()
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
    classifier, name = inputs.classifier, inputs.main_part
    empty: dict[str, Any] = {"method": None, "part": name, "images": []}
    if name is None:
        return empty
    part = inputs.predictions[name].labeled()
    positions, images = _readable(inputs.manifest, classifier, part, _to_explain(part, N_WRONG, N_RIGHT))
    if not len(positions):
        return empty
    some, train = part.take(positions), inputs.parts.train
    wanted = np.stack([some.predicted, some.labels], axis=1)
    evidence = find_evidence(classifier, images, wanted, inputs.network())
    reference = train[:: max(1, len(train) // _NEIGHBORS_AMONG)]
    block = inputs.features.block
    near, cosine = nearest_images(block("last", some.sample_indices), block("last", reference), N_NEIGHBORS)
    rows = [
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
        for i, row in enumerate(some.sample_indices.tolist())
    ]
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
    if not len(rows):
        return None
    chosen = next(trial for trial in probe.trials if trial.chosen)
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


# ---- label errors and outliers, from arrays
@dataclass(frozen=True)
class SuspectedLabel:
    """An image whose label may be wrong.

    Attributes:
        position: Row in the given arrays.
        score: -2 to 2, higher is more suspicious; used for ranking.
        is_confident: Whether confident learning flags it as a label error.
        neighbors: Rows of the most similar images, nearest first.
        neighbor_agreement: Share of neighbors with the same label; None without neighbors.
    """

    position: int
    label: int
    suggested: int
    score: float
    label_probability: float
    suggested_probability: float
    is_confident: bool
    neighbors: tuple[int, ...]
    neighbor_agreement: float | None


@dataclass(frozen=True)
class Outlier:
    """An outlier: its row, and its mean cosine distance to the most similar images."""

    position: int
    distance: float
    neighbors: tuple[int, ...]


def suspected_labels(
    probabilities: ArrayLike,
    labels: ArrayLike,
    features: ArrayLike,
    *,
    least: int = 0,
    most: int = MAX_SUSPECTS,
    n_neighbors: int = 5,
) -> tuple[SuspectedLabel, ...]:
    """The images that confident learning flags as label errors, most suspicious first.

    Confident learning (Northcutt, Jiang & Chuang 2021, 1911.00068): a class is a candidate for an image if its
    probability reaches t_j, the mean probability of class j over the images labeled j (eq. 2); if the most likely
    candidate is not the label, the image is flagged (eq. 1). Images are ranked by ``max_{j != label}(p_j - t_j) -
    (p_label - t_label)``, the margin relative to the class means. With 5% flipped labels, the first 7% of the ranking
    contain 100% of them on 20 Caltech classes, 90% on PACS paintings (plain margin: 86%), 89% on ants/bees and 50% on
    solar cells (head accuracy 85%). Neighbors are shown as evidence but not part of the score: including them made no
    significant difference.

    Args:
        probabilities: (N, C) out-of-fold probabilities.
        labels: (N,) given labels.
        features: (N, D) to find neighbors with.
        least: Number of images; if fewer are flagged, the next of the ranking are added.
        most: Maximum number.
    """
    stated, given = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if len(given) == 0 or stated.shape[1] < 2:
        return ()
    scores, suggested, confident = _label_doubt(stated, given)
    chosen = np.argsort(-scores, kind="stable")[: min(most, max(least, int(confident.sum())))]
    unit = unit_rows(features)
    near, _ = nearest(unit, chosen, np.flatnonzero(np.isfinite(unit).all(axis=1)), n_neighbors)
    return tuple(
        SuspectedLabel(
            position=row,
            label=int(given[row]),
            suggested=int(suggested[row]),
            score=float(scores[row]),
            label_probability=float(stated[row, given[row]]),
            suggested_probability=float(stated[row, suggested[row]]),
            is_confident=bool(confident[row]),
            neighbors=tuple(near_rows.tolist()),
            neighbor_agreement=float((given[near_rows] == given[row]).mean()) if len(near_rows) else None,
        )
        for row, near_rows in zip(chosen.tolist(), near, strict=True)
    )


def outliers(features: ArrayLike, n: int, n_neighbors: int = 5, seed: int = 0) -> tuple[Outlier, ...]:
    """Outliers, most isolated first, each with its most similar images.

    The distance is the mean cosine distance to the nearest images; above 2,048 images, among that many random ones, so
    that the time is linear.
    """
    rows = unit_rows(features)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1))
    reference = usable
    if len(usable) > _LARGEST_REFERENCE:
        reference = np.sort(np.random.default_rng(seed).choice(usable, _LARGEST_REFERENCE, replace=False))
    near, similarity = nearest(rows, usable, reference, n_neighbors)
    if near.shape[1] == 0:
        return ()
    distance = 1 - similarity.mean(axis=1)
    order = np.argsort(-distance, kind="stable")[:n]
    return tuple(Outlier(int(usable[i]), float(distance[i]), tuple(near[i].tolist())) for i in order)


def _label_doubt(stated: NDArray[np.float64], labels: Ints) -> tuple[NDArray[np.float64], Ints, Bools]:
    """(N,) score, suggested label, and whether confident learning flags the image."""
    n, n_classes = stated.shape
    rows, counts = np.arange(n), np.bincount(labels, minlength=n_classes)
    usual = np.bincount(labels, weights=stated[rows, labels], minlength=n_classes) / np.maximum(counts, 1)
    # A class without labeled images is never suggested.
    usual = np.where(counts > 0, usual, np.inf)
    margins = stated - usual
    own = margins[rows, labels]
    margins[rows, labels] = -np.inf
    suggested = margins.argmax(axis=1)
    best = margins[rows, suggested]
    scores = np.where(np.isfinite(best), best - own, -2.0)  # with one labeled class there is nothing to suggest
    candidates = np.where(stated >= usual, stated, -1.0)
    likeliest = candidates.argmax(axis=1)
    confident = (candidates[rows, likeliest] >= 0) & (likeliest != labels)
    return scores, np.where(confident, likeliest, suggested), confident
