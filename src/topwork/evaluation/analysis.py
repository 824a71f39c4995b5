"""What a run knows beyond its figures: labels to check, maps of evidence, decisions, learning curve, advice.

In: what ``run.fit`` has in its hands when the model is judged. Out: :class:`Insights`, stored as ``insights.json`` in the
run folder and shown by the report; paths and class names in it are the run's own, rows are those of its manifest. All of
it comes from features and logits already there, but for about a dozen images that go through the network once more for
their maps, so a fit pays well below a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.images import decode
from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import ImageError
from topwork.evaluation.advice import Advice, ClassRecord, Situation, advise
from topwork.evaluation.audit import Outlier, SuspectedLabel, outliers, suspected_labels
from topwork.evaluation.decisions import Decision, Thresholds, decide, unknown_detector
from topwork.evaluation.explain import find_evidence, nearest_images
from topwork.evaluation.intervals import wilson
from topwork.evaluation.learning_curve import LearningCurve, learning_curve
from topwork.evaluation.predictions import Ints, Predictions, softmax
from topwork.features.embed import Features
from topwork.features.feature_maps import open_network
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.text import as_text

MAX_SUSPECTS, N_OUTLIERS, N_NEIGHBORS = 500, 24, 4
LISTED = 0.07  # share of the images ranked as suspects, whether or not confident learning counts them as wrong
N_WRONG, N_RIGHT = 10, 6  # explained images where maps are exact
N_COVERED = 4  # where maps come from covering: 49 passes for each image
JUDGED = ("test", "valid")  # what counts most comes first
_NEIGHBORS_AMONG = 4096  # training images that the most similar ones are looked for among


@dataclass(frozen=True)
class Insights:
    """See the module; every field is plain JSON values."""

    suspects: list[dict[str, Any]]
    n_suspects: int
    n_audited: int
    outliers: list[dict[str, Any]]
    duplicates: dict[str, Any]
    decisions: dict[str, Any]
    explanations: dict[str, Any]
    learning_curve: dict[str, Any] | None
    advice: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Values for ``insights.json``."""
        return asdict(self)


def find_insights(
    manifest: Manifest,
    parts: Split,
    groups: Sequence[int],
    probe: Probe,
    probe_features: Features,
    classifier: Classifier,
    features: Features,
    predictions: dict[str, Predictions],
    *,
    leaks: Mapping[str, Any] | None = None,
    is_tuned: bool = False,
    embedding_rate: float | None = None,
    path: str = "PATH",
    out: str = "RUN",
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Insights:
    """Everything beyond the figures.

    Args:
        groups: (N,) group of each manifest row.
        probe_features: what the probe was fitted on (of the untuned backbone).
        features: what the classifier's head reads.
        leaks: by part, images that train has, too, as ``evaluation.json`` holds them.
        path, out, settings: what was fitted, the run folder, and what was asked, for the commands in the advice.
    """
    labels = np.array(manifest.labels)
    suspects, n_audited = _suspects(labels, parts, probe, probe_features, predictions)
    n_confident = sum(s.is_confident for s in suspects)
    curve = _curve(labels, parts, np.asarray(groups), probe, probe_features, len(manifest.classes), seed)
    every = np.arange(len(labels))
    odd = outliers(probe_features.block("last", every), N_OUTLIERS, N_NEIGHBORS, seed)
    situation = _situation(
        manifest,
        parts,
        probe,
        labels,
        curve,
        predictions,
        classifier,
        [suspect.position for suspect in suspects if suspect.is_confident],
        leaks or {},
        is_tuned,
    )
    situation = replace(situation, embedding_rate=embedding_rate, path=path, out=out, settings=settings or {})
    return Insights(
        suspects=[_suspect_row(s, manifest) for s in suspects],
        n_suspects=n_confident,
        n_audited=n_audited,
        outliers=[_outlier_row(o) for o in odd],
        duplicates=_duplicates(groups, predictions),
        decisions=_decisions(classifier, features, predictions),
        explanations=_explanations(manifest, parts, classifier, features, predictions),
        learning_curve=asdict(curve) if curve else None,
        advice=[asdict(item) for item in advise(situation)],
    )


# ---- labels


def _suspects(
    labels: Ints, parts: Split, probe: Probe, features: Features, predictions: dict[str, Predictions]
) -> tuple[tuple[SuspectedLabel, ...], int]:
    """Suspected labels among all images that were answered by a head that did not see them; positions are rows."""
    rows = [parts.train[probe.rows]]
    stated = [softmax(probe.out_of_fold_logits)]
    for name in JUDGED:
        if name in predictions:
            rows.append(predictions[name].sample_indices)
            stated.append(predictions[name].probabilities)
    every, probabilities = np.concatenate(rows), np.concatenate(stated)
    n_counted = len(suspected_labels(probabilities, labels[every]))
    n_listed = min(MAX_SUSPECTS, max(n_counted, math.ceil(LISTED * len(every))))
    found = suspected_labels(probabilities, labels[every], features.block("last", every), n_listed, N_NEIGHBORS)
    moved = [
        SuspectedLabel(
            **(
                vars(s)
                | {"position": int(every[s.position]), "neighbors": tuple(int(every[row]) for row in s.neighbors)}
            )
        )
        for s in found
    ]
    return tuple(moved), len(every)


def _suspect_row(suspect: SuspectedLabel, manifest: Manifest) -> dict[str, Any]:
    return asdict(suspect) | {
        "row": suspect.position,
        "path": as_text(manifest.samples[suspect.position].path),
        "label": as_text(manifest.classes[suspect.label]),
        "suggested": as_text(manifest.classes[suspect.suggested]),
    }


def _outlier_row(outlier: Outlier) -> dict[str, Any]:
    return {"row": outlier.position, "distance": outlier.distance, "neighbors": list(outlier.neighbors)}


def _duplicates(groups: Sequence[int], predictions: dict[str, Predictions]) -> dict[str, Any]:
    """Images of a part that show the same as another of it (copies, near copies, one group), and the score with one each."""
    group = np.asarray(groups)
    found: dict[str, Any] = {}
    for name in JUDGED:
        if name not in predictions:
            continue
        part = predictions[name]
        _, first = np.unique(group[part.sample_indices], return_index=True)
        if len(first) == len(part):
            continue
        once = part.take(np.sort(first))
        interval = wilson(float(once.correct.mean()), len(once))
        found[name] = {
            "n_repeated": len(part) - len(once),
            "n_without": len(once),
            "accuracy": float(part.correct.mean()),
            "accuracy_without": {"value": float(once.correct.mean()), **interval.as_dict()},
        }
    return found


# ---- decisions


def _decisions(classifier: Classifier, features: Features, predictions: dict[str, Predictions]) -> dict[str, Any]:
    """How often each outcome comes on the judged parts, and how right the answers are that stay."""
    stored = classifier.thresholds
    thresholds, detector = Thresholds.of(classifier), unknown_detector(classifier)
    found: dict[str, Any] = {"thresholds": dict(stored), "parts": {}}
    for name in JUDGED:
        if name not in predictions:
            continue
        part = predictions[name].labeled()
        scores = detector.score(features.block("last", part.sample_indices)) if detector else None
        outcomes = decide(part.probabilities, scores, thresholds)
        answered = outcomes == Decision.LABEL.value
        n_right, n = int(part.correct[answered].sum()), int(answered.sum())
        interval = wilson(n_right / n, n) if n else None
        found["parts"][name] = {
            "n": len(part),
            **{f"n_{decision.value}": int((outcomes == decision.value).sum()) for decision in Decision},
            "accuracy_of_labels": {"value": n_right / n, **interval.as_dict()} if interval else None,
            "accuracy": float(part.correct.mean()) if len(part) else None,
            "wrong_left_open": int((~part.correct[~answered]).sum()),
            "n_wrong": int((~part.correct).sum()),
        }
    return found


# ---- explanations


def _explanations(
    manifest: Manifest, parts: Split, classifier: Classifier, features: Features, predictions: dict[str, Predictions]
) -> dict[str, Any]:
    """Maps for the answer and the true class of mistakes and of some right answers, with the most similar images."""
    name = next((name for name in JUDGED if name in predictions), None)
    empty: dict[str, Any] = {"method": None, "part": name, "images": []}
    if name is None:
        return empty
    part = predictions[name].labeled()
    network = open_network(classifier.backbone)
    chosen = _to_explain(part, N_WRONG, N_RIGHT)
    if classifier.head.kind != "plain":
        chosen = _to_explain(part, N_COVERED // 2, N_COVERED // 2)
    positions, images = _readable(manifest, classifier, part, chosen)
    if not len(positions):
        return empty
    some = part.take(positions)
    wanted = np.stack([some.predicted, some.labels], axis=1)
    evidence = find_evidence(classifier, images, wanted, network)
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
    """Positions: the surest mistakes, then right answers, one a class as far as they go, the surest first."""
    order = np.argsort(-part.confidence, kind="stable")
    wrong, right = order[~part.correct[order]], order[part.correct[order]]
    seen: set[int] = set()
    once = [p for p in right.tolist() if not (part.labels[p] in seen or seen.add(int(part.labels[p])))]  # type: ignore[func-returns-value]
    # Of many classes, those that give the least sure examples would be a selection: take them evenly.
    spread = (
        [once[i] for i in np.unique(np.linspace(0, len(once) - 1, min(n_right, len(once))).astype(int))] if once else []
    )
    rest = [p for p in right.tolist() if p not in spread][: max(0, n_right - len(spread))]
    return np.array([*wrong[:n_wrong].tolist(), *spread, *rest], dtype=np.int64)


def _readable(manifest: Manifest, classifier: Classifier, part: Predictions, chosen: Ints) -> tuple[Ints, Pixels]:
    """The positions whose images can still be read, and their input."""
    spec = classifier.backbone.spec
    kept, images = [], []
    for position in chosen.tolist():
        try:
            data = manifest.read(int(part.sample_indices[position]))
            images.append(fit_to_input(decode(data, min_side=spec.min_side).pixels, spec))
            kept.append(position)
        except ImageError:
            continue  # gone since the scan: the page says so where it shows pictures
    return np.array(kept, dtype=np.int64), np.stack(images) if images else np.empty((0, 1, 1, 3), np.uint8)


# ---- learning curve and advice


def _curve(
    labels: Ints, parts: Split, groups: NDArray[Any], probe: Probe, features: Features, n_classes: int, seed: int
) -> LearningCurve | None:
    """Of the head that was chosen, on all training images that cross-validation used."""
    chosen = next(trial for trial in probe.trials if trial.chosen)
    rows = parts.train[probe.rows]
    if len(rows) < 30:
        return None
    columns = probe.head.transform.apply(features.blocks(probe.head.transform.blocks, rows))
    correct = probe.out_of_fold_logits.argmax(axis=1) == labels[rows]
    share = 1 - 1 / chosen.n_folds
    numbered = np.unique(groups[rows], return_inverse=True)[1]
    return learning_curve(columns, labels[rows], numbered, n_classes, chosen.penalty * share, correct, share, seed)


def _situation(
    manifest: Manifest,
    parts: Split,
    probe: Probe,
    labels: Ints,
    curve: LearningCurve | None,
    predictions: dict[str, Predictions],
    classifier: Classifier,
    suspects: Sequence[int],
    leaks: Mapping[str, Any],
    is_tuned: bool,
) -> Situation:
    n_classes = len(manifest.classes)
    rows = parts.train[probe.rows]
    right = probe.out_of_fold_logits.argmax(axis=1) == labels[rows]
    counts = (
        np.bincount(labels[parts.train], minlength=n_classes),
        np.bincount(labels[rows], minlength=n_classes),
        np.bincount(labels[rows][right], minlength=n_classes),
    )
    classes = tuple(ClassRecord(as_text(name), *(int(c[i]) for c in counts)) for i, name in enumerate(manifest.classes))
    judged = next((name for name in JUDGED if name in predictions and len(predictions[name].labeled())), None)
    part = predictions[judged].labeled() if judged else None
    accuracy = float(right.mean()) if len(right) else 0.0
    if is_tuned and part is not None:
        accuracy = float(part.correct.mean())
    return Situation(
        n_images=len(labels),
        n_train=len(parts.train),
        accuracy=accuracy,
        classes=classes,
        curve=curve,
        n_suspects=len(suspects),
        n_suspects_judged=len(set(suspects) & set(part.sample_indices.tolist())) if part is not None else 0,
        n_leaked=sum(found["n_leaked"] for found in leaks.values()),
        clean_accuracy=((leaks.get(judged or "") or {}).get("without") or {}).get("accuracy", {}).get("value"),
        judged=(judged, len(part), float(part.correct.mean())) if judged and part is not None else None,
        backbone=classifier.backbone.name,
        is_tuned=is_tuned,
    )


def advice_of(stored: dict[str, Any]) -> tuple[Advice, ...]:
    """The advice of an ``insights.json``."""
    return tuple(Advice(**item) for item in stored.get("advice", []))
