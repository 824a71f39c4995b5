"""Fixed regions near the border that a class depends on, such as watermarks, found from heatmaps and tested.

Watermarks, date stamps, rulers and frames are at the same place in most images of a class, unlike objects. Candidates
come from the mean heatmap of each class; hiding the region, and the mirrored regions, shows whether predictions depend
on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import Box, hide_box
from topwork.evaluation.predictions import Ints
from topwork.features.engine import Engine
from topwork.models.classifier import Classifier
from topwork.text import percent

_LEAST_OF_CLASS = 10
_CONCENTRATED = 1.8  # a border cell with this many times its share of the evidence is a candidate; 0.8 is typical
# A region counts if hiding it costs this share of the logit and the mirrored regions less than half as much: an object
# at the edge (faces and their collars: 0.31 and 0.19) is on both sides, a mark is not (0.12 to 0.57 and 0).
_LEAST_LOST, _MIRRORED_SHARE, _CLEAR_Z = 0.06, 0.5, 3.5


@dataclass(frozen=True)
class FixedPlace:
    """A region near the border with evidence in most images of a class.

    Attributes:
        box: top, bottom, left, right in input pixels.
        where: in words.
        concentration: evidence there, relative to a uniform distribution.
        lost: share of the logit of the class lost by hiding the region, and the mean over mirrored regions.
        rows: positions of example images.
    """

    label: str
    box: Box
    where: str
    n: int
    concentration: float
    lost: float
    lost_elsewhere: float
    rows: tuple[int, ...]


def fixed_places(
    classifier: Classifier, engine: Engine, images: Pixels, labels: Ints, maps: NDArray[np.float32]
) -> tuple[FixedPlace, ...]:
    """Regions near the border that a class depends on in most of its images: watermarks, stamps, rulers, frames.

    Found in the mean map of each class, and kept only if hiding the region costs clearly more than hiding the mirrored
    regions.

    Args:
        images: uint8 (N, H, W, 3).
        labels: (N,) true labels.
        maps: (N, h, w) evidence for the true class.
    """
    positive = np.maximum(maps, 0)
    total = positive.sum((1, 2), keepdims=True)
    shares = positive / np.where(total > 0, total, 1) * maps[0].size
    found = []
    for label in np.unique(labels):
        rows = np.flatnonzero((labels == label) & (total[:, 0, 0] > 0))
        if len(rows) < _LEAST_OF_CLASS:
            continue
        mean = shares[rows].mean(0)
        border = mean.copy()
        border[1:-1, 1:-1] = -np.inf
        row, column = np.unravel_index(int(border.argmax()), mean.shape)
        if mean[row, column] < _CONCENTRATED:
            continue
        box = _box(mean, int(row), int(column), images.shape[1:3])
        lost = _lost(classifier, engine, images[rows], int(label), box)
        if lost is not None:
            where, name = _where(box, *images.shape[1:3]), classifier.classes[label]
            shown = tuple(rows[:8].tolist())
            found.append(FixedPlace(name, box, where, len(rows), float(mean[row, column]), *lost, shown))
    return tuple(sorted(found, key=lambda place: -place.lost))


def _lost(classifier: Classifier, engine: Engine, images: Pixels, label: int, box: Box) -> tuple[float, float] | None:
    """Share of the logit lost by hiding the box, and its mirror images; None if they differ too little."""

    def logit(pixels: Pixels) -> NDArray[np.float64]:
        logits = classifier.head.logits(dict(engine.run(pixels)))
        return np.asarray(logits[:, label] - logits.mean(1))

    height, width = images.shape[1:3]
    top, bottom, left, right = box
    up, aside = (height - bottom, height - top), (width - right, width - left)
    mirrored = [b for b in ((*up, left, right), (top, bottom, *aside), (*up, *aside)) if not _overlap(b, box)]
    before = logit(images)
    lost = before - logit(hide_box(images, box))
    elsewhere = np.zeros_like(lost)
    for other in mirrored:
        elsewhere += (before - logit(hide_box(images, other))) / len(mirrored)
    extra, scale = lost - elsewhere, float(np.abs(before).mean())
    z = extra.mean() / (extra.std(ddof=1) / math.sqrt(len(extra)) + 1e-12)
    is_special = elsewhere.mean() < _MIRRORED_SHARE * lost.mean() and lost.mean() > _LEAST_LOST * scale
    return (float(lost.mean()) / scale, float(elsewhere.mean()) / scale) if is_special and z > _CLEAR_Z else None


def _box(mean: NDArray[np.float32], row: int, column: int, shape: tuple[int, ...]) -> Box:
    """The rectangle around a cell in which the mean map is high, in pixels, enlarged by half a cell."""
    (n_rows, n_columns), (height, width) = mean.shape, shape
    top, bottom, left, right = row, row + 1, column, column + 1
    least = max(1.2, 0.3 * float(mean[row, column]))
    while True:
        grown = [
            (mean[a:b, c:d].mean(), box)
            for a, b, c, d, box in (
                (top - 1, top, left, right, (top - 1, bottom, left, right)),
                (bottom, bottom + 1, left, right, (top, bottom + 1, left, right)),
                (top, bottom, left - 1, left, (top, bottom, left - 1, right)),
                (top, bottom, right, right + 1, (top, bottom, left, right + 1)),
            )
            if a >= 0 and c >= 0 and b <= n_rows and d <= n_columns
        ]
        value, (a, b, c, d) = max(grown)
        # Small, so that hiding it does not hide objects; marks are usually wide.
        if value < least or b - a - 1 >= n_rows / 4 or d - c - 1 >= n_columns / 2.5:
            break
        top, bottom, left, right = a, b, c, d
    rows, columns = (
        (max(0.0, top - 0.5), min(n_rows, bottom + 0.5)),
        (max(0.0, left - 0.5), min(n_columns, right + 0.5)),
    )
    (a, b), (c, d) = (round(v * height / n_rows) for v in rows), (round(v * width / n_columns) for v in columns)
    return a, b, c, d


def _overlap(a: Box, b: Box) -> bool:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[2], b[2]))
    return shared > 0.25 * (a[1] - a[0]) * (a[3] - a[2])


def _where(box: Box, height: int, width: int) -> str:
    middle = (box[0] + box[1]) / 2 / height, (box[2] + box[3]) / 2 / width
    row = "top" if middle[0] < 0.36 else "bottom" if middle[0] > 0.64 else ""
    column = "left" if middle[1] < 0.36 else "right" if middle[1] > 0.64 else ""
    if row and column:
        return f"the {row} {column} corner"
    return f"the {row or column} edge" if row or column else "one region"


def place_sentence(place: FixedPlace) -> str:
    """A sentence about a fixed region."""
    return (
        f"“{place.label}” seems to be recognized by something in {place.where}: in most of its {place.n} images the region holds "
        f"{place.concentration:.1f} times its share of the evidence, and hiding it removes {percent(min(1.0, place.lost), 0)} "
        f"of the evidence for the class (the mirrored regions: {percent(max(0.0, place.lost_elsewhere), 0)}). Look for a "
        "watermark, a date stamp, a ruler, a frame, or a strip of background that is always there, and remove or cover it."
    )
