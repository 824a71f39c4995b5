"""Figures of a part with and without the images that train has, too, where the user gave the split.

In: answers by part and the leaks that the split found. Out: plain values for ``evaluation.json``, and a note for the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions
from topwork.progress import Reporter
from topwork.text import count, percent

KEPT = ("n", "accuracy", "balanced_accuracy", "mean_average_precision", "micro_f1")


def judge_leaks(
    predictions: Mapping[str, Predictions], manifest: Manifest, parts: Split, seed: int, reporter: Reporter
) -> dict[str, Any]:
    """``leaks`` of ``evaluation.json``, or {} where there are none."""
    leaked = dict(parts.leaks)
    found: dict[str, Any] = {}
    for name in ("valid", "test"):
        if name not in predictions or not leaked:
            continue
        part = predictions[name]
        clean = np.array([row not in leaked for row in part.sample_indices.tolist()], np.bool_)
        if clean.all():
            continue
        both = {"with": part, "without": part.take(clean)} if clean.any() else {"with": part}
        judged = {key: evaluate_part(some, seed=seed).as_dict() for key, some in both.items()}
        figures = {key: {k: values[k] for k in KEPT if k in values} for key, values in judged.items()}
        pairs = [(row, leaked[row]) for row in part.sample_indices[~clean].tolist()]
        paths = [[manifest.samples[a].path, manifest.samples[b].path] for a, b in pairs]
        found[name] = {"n_leaked": len(pairs), **figures, "pairs": paths}
        reporter.note(leak_note(name, len(pairs), figures))
    return {"leaks": found} if found else {}


def leak_note(name: str, n_leaked: int, figures: dict[str, Any]) -> str:
    """One sentence on the leaks of a part."""
    text = f"{count(n_leaked, 'image')} of {name} leaked: the same picture, or one of the same group, is in train."
    if "without" not in figures:
        return f"{text} Nothing is left of {name} without them: its figures mean little."
    accuracy, clean = figures["with"]["accuracy"]["value"], figures["without"]["accuracy"]["value"]
    if accuracy is None or clean is None:
        return text
    return f"{text} Accuracy {percent(accuracy)} with them, {percent(clean)} without."
