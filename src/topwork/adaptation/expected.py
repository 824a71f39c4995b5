"""Estimates the accuracy on a new domain without labels, and records both domains before and after an adaptation.

In: the choice, the predictions on the target before and after, the domains. Out: plain values for ``evaluation.json`` and
``domains.json``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import Domains, Ints, Rows, Shares, standardized
from topwork.adaptation.guards import DOUBTFUL_LEAD, Choice
from topwork.data.manifest import NO_LABEL, Manifest
from topwork.evaluation.intervals import wilson
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.text import escape, first_names, percent

MAX_POINTS = 400  # per domain in the map
MAX_CHANGED = 48
MODEL_ERROR = 0.07  # mean absolute error of the expected accuracy (docs/lab-log.md, 2026-11-25)


def expected_accuracy(predicted: Ints, choice: Choice, confidence: Shares) -> dict[str, float]:
    """Expected accuracy without labels, with a range: the mean of the methods' votes and of the confidence.

    The votes are too high if all methods make the same errors; the confidence is too low if a shift only makes the
    model less confident. Their mean was the most accurate (benchmarks/adapt.py). The range is two model errors on
    either side, and at least their disagreement.
    """
    votes = predicted_accuracy(predicted, choice.votes)
    value = (votes + float(confidence.mean())) / 2
    half = max(2 * MODEL_ERROR, abs(votes - value))
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def predicted_accuracy(predicted: Ints, votes: Shares) -> float:
    """Accuracy of (M,) predictions if the (M, C) votes were the class probabilities."""
    return float(votes[np.arange(len(predicted)), predicted].mean())


def expected_recall(predicted: Ints, votes: Shares, label: int) -> float | None:
    """The same for one class: the share of its votes on images predicted as this class; None without votes."""
    total = float(votes[:, label].sum())
    return float((votes[:, label] * (predicted == label)).sum() / total) if total > 0 else None


def target_figures(
    before: Predictions, after: Predictions, evaluation: dict[str, Any], source: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The part ``target`` of ``evaluation.json``, and both domains before and after under ``domains``; {} without labels.

    Args:
        evaluation, source: ``evaluation.json`` of the new run so far, and of the source's run.
    """
    if not (after.labels >= 0).any():
        return {}
    target = {name: evaluate_part(p, seed=seed) for name, p in (("before", before), ("after", after))}
    part = next((name for name in ("test", "valid") if name in evaluation and name in source), None)
    on_source = {"before": source.get(part or ""), "after": evaluation.get(part or "")}
    return {
        "target": target["after"],
        "domains": {
            "target": {name: _short(found) for name, found in target.items()},
            "source": {"part": part} | {name: _short(found) for name, found in on_source.items()},
        },
    }


def _short(part: dict[str, Any] | None) -> dict[str, Any] | None:
    return part and {key: part[key] for key in ("n", "accuracy", "balanced_accuracy", "cross_entropy", "ece")}


def domains_record(
    choice: Choice,
    manifest: Manifest,
    before: Predictions,
    after: Predictions,
    domains: Domains,
    rows: Ints,
    source: dict[str, Any],
) -> dict[str, Any]:
    """``domains.json``.

    Args:
        manifest: the target; ``before`` and ``after`` are predictions for all of its images.
        rows: rows of the target that ``domains`` and the votes contain.
        source: ``evaluation.json`` of the source's run.
    """
    expected = {
        name: expected_accuracy(p.predicted[rows], choice, p.confidence[rows])
        for name, p in (("before", before), ("after", after))
    }
    changed = np.flatnonzero(before.predicted != after.predicted)
    return {
        "choice": choice.as_dict(),
        "n_target": len(after),
        "n_known": int((domains.known >= 0).sum()),
        "n_changed": len(changed),
        "predicted": expected,
        "per_class": [_class_record(label, before, after, choice, rows, source) for label in range(len(after.classes))],
        "changed": _changed(changed, manifest, before, after),
        "map": class_map(domains, after.predicted[rows]),
        "notes": _notes(choice, manifest, after, expected["after"]),
    }


def _class_record(
    label: int, before: Predictions, after: Predictions, choice: Choice, rows: Ints, source: dict[str, Any]
) -> dict[str, Any]:
    """Recall on the source, expected recall, and, if there are labels, recall on the target."""
    part: dict[str, Any] = next((source[name] for name in ("test", "valid") if name in source), {"per_class": {}})
    own, name = after.labels == label, after.classes[label]
    found = {
        "name": escape(name),
        "n": int(own.sum()),
        "n_expected": float(choice.votes[:, label].sum() * len(after) / len(rows)),
        "source": (part["per_class"].get(name) or {}).get("recall"),
    }
    for key, predictions in (("before", before), ("after", after)):
        hit = predictions.predicted == label
        found[f"answered_{key}"] = int(hit.sum())
        found[f"expected_{key}"] = expected_recall(predictions.predicted[rows], choice.votes, label)
        found[key] = share_record(int((hit & own).sum()), int(own.sum()))
    return found


def share_record(n_right: int, n: int) -> dict[str, float] | None:
    """A share with its 95% interval; None for no images."""
    if not n:
        return None
    interval = wilson(n_right / n, n)
    return {"value": n_right / n, "low": interval.low, "high": interval.high}


def _changed(
    changed: NDArray[np.int64], manifest: Manifest, before: Predictions, after: Predictions
) -> list[dict[str, Any]]:
    """Images whose prediction changed, most confident first."""
    order = changed[np.argsort(-after.confidence[changed], kind="stable")][:MAX_CHANGED]
    names = after.classes
    return [
        {
            "row": row,
            "path": escape(manifest.samples[row].path),
            "before": escape(names[before.predicted[row]]),
            "after": escape(names[after.predicted[row]]),
            "probability": float(after.confidence[row]),
            "truth": escape(names[after.labels[row]]) if after.labels[row] >= 0 else None,
        }
        for row in order.tolist()
    ]


def class_map(domains: Domains, predicted: Ints) -> dict[str, list[list[float]]]:
    """Both domains, each centered separately, on the two main axes of the class means: points (x, y, class).

    The class of a point is the label on the source and the prediction on the target.
    """
    aligned = standardized(domains)
    rng = np.random.default_rng(19)
    present = np.unique(domains.labels)
    means = np.stack([aligned.source[domains.labels == label].mean(0) for label in present])
    axes = np.zeros((means.shape[1], 2))
    directions = np.linalg.svd(means - means.mean(0), full_matrices=False)[2][:2]
    axes[:, : len(directions)] = directions.T

    def points(rows: Rows, classes: Ints) -> list[list[float]]:
        some = np.sort(rng.permutation(len(rows))[:MAX_POINTS])
        return [
            [round(float(x), 3), round(float(y), 3), int(c)]
            for (x, y), c in zip(rows[some] @ axes, classes[some], strict=True)
        ]

    return {"source": points(aligned.source, domains.labels), "target": points(aligned.target, predicted)}


def _notes(choice: Choice, manifest: Manifest, after: Predictions, expected: dict[str, float]) -> list[str]:
    notes, has_labels = [], bool((after.labels >= 0).any())
    unknown = sorted({s.label for s in manifest.samples} - {*after.classes, NO_LABEL})
    if unknown and has_labels:
        notes.append(
            f"Target folders that are not classes of the model, excluded from its scores: {first_names(unknown, 8)}."
        )
    if choice.outcome == "adapted" and choice.checks.get("lead", 1.0) < DOUBTFUL_LEAD:
        notes.append(
            "The images barely resemble the model's classes: they look very different, or show other classes, which "
            "cannot be decided without labels. Look at the examples in the report before you use this model."
        )
    if choice.outcome != "refused" and not has_labels:
        low, high = (percent(expected[key], 0).rstrip("%") for key in ("low", "high"))
        notes.append(
            f"Expected accuracy on the target: {percent(expected['value'], 0)} (range {low}–{high}), estimated from how far "
            "the methods agree. Label some images to measure it."
        )
    return notes
