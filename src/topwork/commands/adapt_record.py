"""What an adapted run says about its two domains: figures before and after, by class, a map, and what changed.

In: the choice, both sets of answers on the target, the domains. Out: plain values for ``evaluation.json`` and
``domains.json``. Nothing is decided here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import Domains, standardized
from topwork.adaptation.guards import DOUBTFUL_LEAD, Choice, expected_recall, predicted_accuracy
from topwork.data.manifest import Manifest
from topwork.evaluation.intervals import wilson
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.text import escape

MAX_POINTS = 400  # of each domain in the map
MAX_CHANGED = 48
MODEL_ERROR = 0.07  # mean absolute error of the predicted accuracy (docs/lab-log.md, 2026-11-25)


def target_figures(
    before: Predictions, after: Predictions, evaluation: dict[str, Any], source: dict[str, Any], seed: int
) -> dict[str, Any]:
    """The part ``target`` of ``evaluation.json``, and both domains before and after under ``domains``."""
    if not (after.labels >= 0).any():
        return {}
    judged = {name: evaluate_part(p, seed=seed).as_dict() for name, p in (("before", before), ("after", after))}
    part = next((name for name in ("test", "valid") if name in evaluation and name in source), None)
    return {
        "target": judged["after"],
        "domains": {
            "target": {name: _short(found) for name, found in judged.items()},
            "source": {
                "part": part,
                "before": _short(source[part]) if part else None,
                "after": _short(evaluation[part]) if part else None,
            },
        },
    }


def _short(part: dict[str, Any]) -> dict[str, Any]:
    return {key: part[key] for key in ("n", "accuracy", "balanced_accuracy", "cross_entropy", "ece")}


def domains_record(
    choice: Choice,
    manifest: Manifest,
    before: Predictions,
    after: Predictions,
    domains: Domains,
    rows: NDArray[np.int64],
    evaluation: dict[str, Any],
    source: dict[str, Any],
) -> dict[str, Any]:
    """``domains.json``."""
    predicted = {
        name: expected(p.predicted[rows], choice, p.confidence[rows])
        for name, p in (("before", before), ("after", after))
    }
    changed = np.flatnonzero(before.predicted != after.predicted)
    return {
        "choice": choice.as_dict(),
        "n_target": len(after),
        "n_known": int((domains.known >= 0).sum()),
        "n_changed": len(changed),
        "predicted": predicted,
        "per_class": _per_class(before, after, choice, rows, source),
        "changed": _changed(changed, manifest, before, after),
        "map": embedding_map(domains, after.predicted[rows]),
        "notes": _notes(choice, manifest, before, after, predicted, evaluation),
    }


def expected(predicted: NDArray[np.int64], choice: Choice, confidence: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy to expect on the target without labels: the mean of the methods' votes and of the confidence.

    The votes say too much where all methods err alike, the confidence says too little where a shift only makes the
    model less sure; their mean was nearest to the truth (benchmarks/adapt.py). The range is two model errors wide on
    either side, and at least their disagreement.
    """
    votes = predicted_accuracy(predicted, choice.consensus)
    value = (votes + float(confidence.mean())) / 2
    half = max(2 * MODEL_ERROR, abs(votes - value))
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half)}


def _per_class(
    before: Predictions, after: Predictions, choice: Choice, rows: NDArray[np.int64], source: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each class: recall on the source, expected recall, and, where labels are, recall on the target."""
    part: dict[str, Any] = next((source[name] for name in ("test", "valid") if name in source), {"per_class": {}})
    found = []
    for label, name in enumerate(after.classes):
        own = after.labels == label
        n = int(own.sum())
        weight = choice.consensus[:, label]
        row: dict[str, Any] = {"name": escape(name), "n": n, "n_expected": float(weight.sum() * len(after) / len(rows))}
        row["source"] = (part["per_class"].get(name) or {}).get("recall")
        for key, answers in (("before", before), ("after", after)):
            hit = answers.predicted == label
            row[f"answered_{key}"] = int(hit.sum())
            row[f"expected_{key}"] = expected_recall(answers.predicted[rows], choice.consensus, label)
            row[key] = _share(int((hit & own).sum()), n)
        found.append(row)
    return found


def _share(n_right: int, n: int) -> dict[str, float] | None:
    if not n:
        return None
    interval = wilson(n_right / n, n)
    return {"value": n_right / n, "low": interval.low, "high": interval.high}


def _changed(
    changed: NDArray[np.int64], manifest: Manifest, before: Predictions, after: Predictions
) -> list[dict[str, Any]]:
    """Images answered differently, the surest new answers first; right or wrong where the label is known."""
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


def embedding_map(domains: Domains, predicted: NDArray[np.int64]) -> dict[str, Any]:
    """Two axes of both domains: as the network sees them, and after each was centered by itself.

    The first map has the direction that tells the domains apart, and the main axis of the rest; the second the two main
    axes of the class means. Points are (x, y, class); of the target the class is the answer.
    """
    aligned = standardized(domains)
    rng = np.random.default_rng(19)
    own = np.sort(rng.permutation(len(domains.source))[:MAX_POINTS])
    other = np.sort(rng.permutation(len(domains.target))[:MAX_POINTS])
    labels = {"source": domains.labels[own], "target": predicted[other]}

    def points(source: NDArray[Any], target: NDArray[Any], axes: NDArray[Any]) -> dict[str, Any]:
        return {
            name: [
                [round(float(x), 3), round(float(y), 3), int(c)]
                for (x, y), c in zip(z @ axes, labels[name], strict=True)
            ]
            for name, z in (("source", source[own]), ("target", target[other]))
        }

    joint = np.concatenate([domains.source, domains.target])
    scale = joint.std(0) + 0.1 * max(float(np.sqrt(joint.var(0).mean())), 1e-6)
    a, b = ((x - joint.mean(0)) / scale for x in (domains.source, domains.target))
    apart = b.mean(0) - a.mean(0)
    apart = apart / max(float(np.linalg.norm(apart)), 1e-9)
    rest = np.concatenate([a - a.mean(0), b - b.mean(0)])
    rest = rest - np.outer(rest @ apart, apart)
    before = np.stack([apart, _main_axes(rest, 1)[:, 0]], axis=1)
    present = np.unique(domains.labels)
    means = np.stack([aligned.source[domains.labels == label].mean(0) for label in present])
    main = _main_axes(means - means.mean(0), 2)
    return {"as_seen": points(a, b, before), "aligned": points(aligned.source, aligned.target, main)}


def _main_axes(rows: NDArray[Any], n: int) -> NDArray[Any]:
    """(D, n) principal directions; zeros where there are fewer."""
    _, _, directions = np.linalg.svd(rows[:2000], full_matrices=False)
    found = np.zeros((rows.shape[1], n))
    found[:, : min(n, len(directions))] = directions[:n].T
    return found


def _notes(
    choice: Choice,
    manifest: Manifest,
    before: Predictions,
    after: Predictions,
    predicted: dict[str, dict[str, float]],
    evaluation: dict[str, Any],
) -> list[str]:
    del before
    notes = []
    unknown = sorted({s.label for s in manifest.samples if s.label not in after.classes and s.label != "?"})
    if unknown and (after.labels >= 0).any():
        names = ", ".join(escape(name) for name in unknown[:8])
        notes.append(f"Folders of the target that are none of the model's classes, left out of the figures: {names}.")
    if choice.outcome == "adapted" and choice.checks.get("lead", 1.0) < DOUBTFUL_LEAD:
        notes.append(
            "The images resemble the model's classes only faintly: a hard change of look, or other classes, which cannot be "
            "told apart without labels. Look at the examples in the report before you use this model."
        )
    if choice.outcome != "refused" and "target" not in evaluation:
        found = predicted["after"]
        notes.append(
            f"Expected accuracy on the target: {100 * found['value']:.0f} % ({100 * found['low']:.0f} to "
            f"{100 * found['high']:.0f}), from the methods' agreement; label some images to know."
        )
    return notes
