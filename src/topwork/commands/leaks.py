"""Figures of a part with and without the images that train has, too, where the user gave the split.

In: answers by part and the leaks that the split found. Out: plain values for ``evaluation.json``, and a note for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.data.split import Split
from topwork.evaluation.predictions import Bools
from topwork.progress import Reporter

KEPT = ("n", "accuracy", "balanced_accuracy", "mean_average_precision", "micro_f1")


class Answers(Protocol):
    """Answers for some rows of the manifest: ``Predictions`` or ``LabelPredictions``."""

    @property
    def sample_indices(self) -> NDArray[np.int64]:
        """(N,) rows of the manifest."""

    def take(self, chosen: Bools) -> Any:
        """The answers for some of the images."""


A = TypeVar("A", bound=Answers)


def judge_leaks(
    predictions: Mapping[str, A],
    manifest: Manifest,
    parts: Split,
    judge: Callable[[A], dict[str, Any]],
    reporter: Reporter,
) -> dict[str, Any]:
    """``leaks`` of ``evaluation.json``, or {} where there are none.

    Args:
        judge: gives the figures of a part.
    """
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
        judged = {key: judge(some) for key, some in both.items()}
        figures = {key: {k: values[k] for k in KEPT if k in values} for key, values in judged.items()}
        pairs = [(row, leaked[row]) for row in part.sample_indices[~clean].tolist()]
        paths = [[manifest.samples[a].path, manifest.samples[b].path] for a, b in pairs]
        found[name] = {"n_leaked": len(pairs), **figures, "pairs": paths}
        reporter.note(leak_note(name, len(pairs), figures))
    return {"leaks": found} if found else {}


def leak_note(name: str, n_leaked: int, figures: dict[str, Any]) -> str:
    """One sentence on the leaks of a part."""
    images = "1 image" if n_leaked == 1 else f"{n_leaked} images"
    text = f"{images} of {name} leaked: the same picture, or one of the same group, is in train."
    if "without" not in figures:
        return f"{text} Nothing is left of {name} without them: its figures mean little."
    accuracy, clean = figures["with"]["accuracy"]["value"], figures["without"]["accuracy"]["value"]
    if accuracy is None or clean is None:
        return text
    return f"{text} Accuracy {100 * accuracy:.1f} % with them, {100 * clean:.1f} % without."
