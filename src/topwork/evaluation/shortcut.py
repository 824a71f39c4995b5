"""Shortcut check: can the label be predicted from metadata alone?

In: a manifest, its traits and its groups. Out: :class:`ShortcutCheck`: for each family of metadata (file size,
compression, border, ...), the cross-validated accuracy of a small classifier with a 95% confidence interval, compared
with chance; and which of them to warn about.

A warning is given if the skill, relative to chance and a perfect classifier, is above one half (lower end of the
interval), and, for facts about how an image was made rather than what it shows, also if they identify a single class.
Dimensions never lead to a warning about a single class, because the network sees all images at one size; they are
listed, like everything better than chance.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest
from topwork.data.traits import TraitTable
from topwork.evaluation.intervals import balanced_accuracy_interval, wilson
from topwork.text import first_names, percent

MIN_IMAGES = 10  # per class, without duplicates, to be included
MAX_IMAGES = 1200  # enough for intervals of a few points
MAX_CLASSES = 100
WARN_SKILL = 0.5  # relative to chance (0) and a perfect classifier (1)
WARN_CLASS = 0.7  # minimum recall and precision (lower ends) to identify a single class
N_FOLDS = 5
N_TREES = 16
# Facts about how an image was made, not about its content, so they should not depend on the class.
_MAKING = ("compression", "format", "camera", "border")


@dataclass(frozen=True)
class FamilyCheck:
    """How well one family of metadata predicts the label.

    Attributes:
        balanced_accuracy: cross-validated; ``low`` and ``high`` are its 95% confidence interval, ``chance`` that of
            guessing.
        given_away: classes that the metadata identifies.
    """

    family: str
    facts: str
    balanced_accuracy: float
    low: float
    high: float
    chance: float
    given_away: tuple[str, ...]
    warning: str | None


@dataclass(frozen=True)
class ShortcutCheck:
    """The check of all families, strongest first; ``reason`` says why there is none."""

    families: tuple[FamilyCheck, ...]
    n_images: int
    n_classes: int
    reason: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on shortcuts, for the scan."""
        return tuple(family.warning for family in self.families if family.warning)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"warnings": list(self.warnings)}


FACTS = {
    "file size": "bytes, and bytes per pixel",
    "dimensions": "width, height, aspect ratio",
    "format": "file format, color mode, stored as grayscale",
    "compression": "JPEG quantization, subsampling, progressive or not",
    "camera": "camera and orientation in EXIF",
    "mean color": "mean red, green, blue and contrast",
    "border": "color and uniformity of the outermost pixels",
    "background": "coarse colors of the outer half of the image",
}


def check_shortcuts(manifest: Manifest, traits: TraitTable, groups: Sequence[int], seed: int = 0) -> ShortcutCheck:
    """Cross-validates a small classifier on each family of metadata.

    Args:
        traits: of the manifest's samples.
        groups: (N,) group of each row; groups are never split across folds.
    """
    if manifest.multi_label:
        return ShortcutCheck((), 0, 0, "not checked for images with several labels")
    rows, folds = _chosen(manifest, np.asarray(groups), seed)
    labels, names = _labels(manifest, rows)
    if len(names) < 2:
        return ShortcutCheck(
            (), len(rows), len(names), f"needs two classes with at least {MIN_IMAGES} different images each"
        )
    columns = fact_columns(manifest, traits)
    checks = [_check(name, columns[name][rows], labels, names, folds, seed) for name in FACTS]
    checks.sort(key=lambda check: (check.warning is None, -check.low))
    return ShortcutCheck(tuple(checks), len(rows), len(names))


def fact_columns(manifest: Manifest, traits: TraitTable) -> dict[str, NDArray[np.float32]]:
    """(N, k) numbers of each family, in the order of FACTS."""
    samples = manifest.samples
    width, height, n_bytes = (
        np.array([getattr(s, key) for s in samples], float) for key in ("width", "height", "n_bytes")
    )
    column = traits.column
    outer = np.ones(traits.colors.shape[1:3], dtype=bool)
    outer[2:-2, 2:-2] = False
    colors = traits.colors.astype(np.float32)
    families = {
        "file size": [np.log(np.maximum(n_bytes, 1)), np.log(np.maximum(n_bytes, 1) / (width * height))],
        "dimensions": [width, height, width / height],
        "format": [
            _codes([s.format for s in samples]),
            _codes([s.mode for s in samples]),
            [s.is_gray for s in samples],
        ],
        "compression": [column("jpeg_level"), column("jpeg_subsampling"), column("jpeg_progressive")],
        "camera": [_codes(traits.cameras), [s.orientation for s in samples]],
        "mean color": [*colors.mean((1, 2)).T, column("contrast")],
        "border": [column(f"border_{name}") for name in ("red", "green", "blue", "spread")],
        "background": [*colors[:, outer].reshape(len(samples), -1).T],
    }
    return {name: np.stack([np.asarray(values, np.float32) for values in families[name]], 1) for name in FACTS}


def _check(
    family: str,
    columns: NDArray[np.float32],
    labels: NDArray[np.int64],
    names: Sequence[str],
    folds: NDArray[np.int64],
    seed: int,
) -> FamilyCheck:
    n = np.bincount(labels, minlength=len(names))
    predicted = _predicted(columns, labels, folds, seed)
    right = np.bincount(labels[predicted == labels], minlength=len(names))
    interval = balanced_accuracy_interval(right, n)
    chance = 1 / len(names)
    given = np.bincount(predicted, minlength=len(names))
    is_given_away = [
        wilson(r / a, a).low >= WARN_CLASS and wilson(r / g, g).low >= WARN_CLASS if g else False
        for r, a, g in zip(right, n, given, strict=True)
    ]
    away = tuple(name for name, given_away in zip(names, is_given_away, strict=True) if given_away)
    check = FamilyCheck(
        family, FACTS[family], float((right / n).mean()), interval.low, interval.high, chance, away, None
    )
    return replace(check, warning=_warning(check))


def _predicted(
    columns: NDArray[np.float32], labels: NDArray[np.int64], folds: NDArray[np.int64], seed: int
) -> NDArray[np.int64]:
    """(N,) cross-validated predictions; constant if the facts are the same for all images."""
    from sklearn.ensemble import ExtraTreesClassifier
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    if (columns == columns[0]).all():
        return np.zeros_like(labels)
    model = ExtraTreesClassifier(N_TREES, min_samples_leaf=2, class_weight="balanced", random_state=seed)
    return np.asarray(cross_val_predict(model, columns, labels, cv=PredefinedSplit(folds)), np.int64)


def _warning(check: FamilyCheck) -> str | None:
    skill = (check.low - check.chance) / (1 - check.chance)
    figures = (
        f"balanced accuracy {percent(check.balanced_accuracy, 0)} (95% CI {100 * check.low:.0f}–{100 * check.high:.0f}), "
        f"chance {percent(check.chance, 0)}"
    )
    if skill >= WARN_SKILL:
        return f"The label can be predicted from {check.family} alone ({check.facts}): {figures}."
    if check.given_away and check.family in _MAKING:
        return f"Recognizable from {check.family} alone ({check.facts}): {first_names(list(check.given_away))}."
    return None


# ---- which images


def _chosen(manifest: Manifest, groups: NDArray[Any], seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Selected rows of each large enough class, and their folds, with whole groups."""
    by_label: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, sample in enumerate(manifest.samples):
        by_label[sample.label][int(groups[row])].append(row)
    large = sorted(
        (label for label in by_label if len(by_label[label]) >= MIN_IMAGES), key=lambda x: (-len(by_label[x]), x)
    )
    large = large[:MAX_CLASSES]
    n_each = max(MIN_IMAGES, MAX_IMAGES // max(1, len(large)))
    rows, folds = [], []
    for label in large:
        members = sorted(by_label[label].values(), key=lambda some: _lot(manifest, some, seed))
        for number, some in enumerate(members[:n_each]):
            # One image per group, because copies have the same facts.
            rows.append(min(some, key=lambda row: manifest.samples[row].content_hash))
            folds.append(number % N_FOLDS)
    return np.array(rows, np.int64), np.array(folds, np.int64)


def _lot(manifest: Manifest, rows: list[int], seed: int) -> bytes:
    smallest = min(manifest.samples[row].content_hash for row in rows)
    return hashlib.sha256(f"{seed} {smallest}".encode()).digest()


def _labels(manifest: Manifest, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str]]:
    present = {manifest.samples[row].label for row in rows}
    names = [name for name in manifest.classes if name in present]
    index = {name: number for number, name in enumerate(names)}
    return np.array([index[manifest.samples[row].label] for row in rows], np.int64), names


def _codes(values: Sequence[str]) -> NDArray[np.int64]:
    return np.asarray(np.unique(np.array(values, dtype=str), return_inverse=True)[1])
