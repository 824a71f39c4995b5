"""Does a class depend on something that never moves? In go heatmaps, out come regions near the border, tested.

A watermark, a date stamp, a ruler, a frame: evidence that lies at one place in most images of a class moves with no
object. Candidates come from the mean map of each class; hiding the region, and copying it into images of other classes,
tells whether answers really depend on it, always against the mirrored regions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topwork.data.transforms import Pixels
from topwork.evaluation.perturb import hide_box
from topwork.evaluation.predictions import Ints
from topwork.features.engine import Engine
from topwork.models.classifier import Classifier
from topwork.text import percent

_LEAST_OF_CLASS = 10
_CONCENTRATED = 1.8  # a border cell with this many times its share of the evidence may be a fixed place; usual: 0.8
# A place counts when hiding it costs this share of the logit and the mirrored places less than half as much: an object that
# reaches the edge (faces and their collars: 0.31 against 0.19) is on both sides, a mark is not (0.12 to 0.57 against 0).
_LEAST_LOST, _MIRRORED_SHARE, _CLEAR_Z = 0.06, 0.5, 3.5


@dataclass(frozen=True)
class FixedPlace:
    """A place near the border that holds evidence in most images of a class.

    Attributes:
        box: top, bottom, left, right in input pixels.
        where: in words.
        concentration: evidence there, in multiples of an even spread.
        lost: share of the logit of the class that hiding the place takes away, and the mean over mirrored places.
        transplanted: share of images of other classes that become this class when the place is copied into them, and
            the same for the mirrored places.
        rows: positions of images to look at.
    """

    label: str
    box: tuple[int, int, int, int]
    where: str
    n: int
    concentration: float
    lost: float
    lost_elsewhere: float
    transplanted: float
    transplanted_elsewhere: float
    rows: tuple[int, ...]


def fixed_places(
    classifier: Classifier, engine: Engine, images: Pixels, labels: Ints, maps: NDArray[np.float32]
) -> tuple[FixedPlace, ...]:
    """Places near the border that decide about a class in most of its images: watermarks, stamps, rulers, frames.

    Found in the mean map of each class, and kept only if hiding the place costs the class clearly more than hiding the
    mirrored places does. Objects near the border move from image to image; such a place does not.

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
        on_border = np.ones(mean.shape, np.bool_)
        on_border[1:-1, 1:-1] = False
        peak = np.unravel_index(int(np.where(on_border, mean, -np.inf).argmax()), mean.shape)
        if mean[peak] >= _CONCENTRATED:
            place = _tested_place(
                classifier, engine, images, labels, int(label), rows, mean, (int(peak[0]), int(peak[1]))
            )
            found += [place] if place is not None else []
    return tuple(sorted(found, key=lambda place: -place.lost))


def _tested_place(
    classifier: Classifier,
    engine: Engine,
    images: Pixels,
    labels: Ints,
    label: int,
    rows: Ints,
    mean: NDArray[np.float32],
    peak: tuple[int, int],
) -> FixedPlace | None:
    """Hides the place and its mirror images, and copies them into images of other classes."""
    height, width = images.shape[1:3]
    box = _box(_grown(mean, peak), mean.shape, (height, width))
    mirrored = [b for b in _mirrored(box, height, width) if not _overlap(b, box)]

    def logit(pixels: Pixels) -> NDArray[np.float64]:
        logits = classifier.head.logits(dict(engine.run(pixels)))
        return np.asarray(logits[:, label] - logits.mean(1))

    chosen = images[rows]
    before = logit(chosen)
    lost = before - logit(hide_box(chosen, box))
    elsewhere = (
        np.mean([before - logit(hide_box(chosen, other)) for other in mirrored], axis=0) if mirrored else 0 * lost
    )
    extra = lost - elsewhere
    z = extra.mean() / (extra.std(ddof=1) / math.sqrt(len(extra)) + 1e-12)
    scale = float(np.abs(before).mean())
    is_special = elsewhere.mean() < _MIRRORED_SHARE * lost.mean() and lost.mean() > _LEAST_LOST * scale
    if not (is_special and z > _CLEAR_Z):
        return None
    others = np.flatnonzero(labels != label)[:64]

    def transplanted(place: tuple[int, int, int, int]) -> float:
        top, bottom, left, right = place
        changed = images[others].copy()
        donors = rows[np.arange(len(others)) % len(rows)]
        changed[:, top:bottom, left:right] = images[donors, top:bottom, left:right]
        answers = classifier.head.logits(dict(engine.run(changed))).argmax(1)
        return float((answers == label).mean())

    return FixedPlace(
        label=classifier.classes[label],
        box=box,
        where=_where(box, height, width),
        n=len(rows),
        concentration=float(mean[peak]),
        lost=float(lost.mean()) / scale,
        lost_elsewhere=float(elsewhere.mean()) / scale,
        transplanted=transplanted(box) if len(others) else 0.0,
        transplanted_elsewhere=float(np.mean([transplanted(b) for b in mirrored])) if len(others) and mirrored else 0.0,
        rows=tuple(int(row) for row in rows[:8]),
    )


def _grown(mean: NDArray[np.float32], peak: tuple[int, int]) -> tuple[int, int, int, int]:
    """The rectangle of cells around the peak in which the mean map stays high."""
    top, bottom, left, right = peak[0], peak[0], peak[1], peak[1]
    least = max(1.2, 0.3 * float(mean[peak]))
    n_rows, n_columns = mean.shape
    while True:
        sides = {
            (-1, 0, 0, 0): mean[top - 1, left : right + 1].mean() if top > 0 else 0,
            (0, 1, 0, 0): mean[bottom + 1, left : right + 1].mean() if bottom < n_rows - 1 else 0,
            (0, 0, -1, 0): mean[top : bottom + 1, left - 1].mean() if left > 0 else 0,
            (0, 0, 0, 1): mean[top : bottom + 1, right + 1].mean() if right < n_columns - 1 else 0,
        }
        step, value = max(sides.items(), key=lambda item: float(item[1]))
        grown = top + step[0], bottom + step[1], left + step[2], right + step[3]
        # Small, so that hiding it does not hide objects; marks are wider than high.
        if value < least or grown[1] - grown[0] >= n_rows / 4 or grown[3] - grown[2] >= n_columns / 2.5:
            return top, bottom, left, right
        top, bottom, left, right = grown


def _box(cells: tuple[int, int, int, int], grid: tuple[int, ...], shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """Cells as pixels, half a cell wider: the network sees more than its cell."""
    (top, bottom, left, right), (n_rows, n_columns), (height, width) = cells, grid, shape
    rows = max(0.0, top - 0.5), min(n_rows, bottom + 1.5)
    columns = max(0.0, left - 0.5), min(n_columns, right + 1.5)
    return (
        round(rows[0] * height / n_rows),
        round(rows[1] * height / n_rows),
        round(columns[0] * width / n_columns),
        round(columns[1] * width / n_columns),
    )


def _mirrored(box: tuple[int, int, int, int], height: int, width: int) -> list[tuple[int, int, int, int]]:
    top, bottom, left, right = box
    up, aside = (height - bottom, height - top), (width - right, width - left)
    return [(*up, left, right), (top, bottom, *aside), (*up, *aside)]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[2], b[2]))
    return shared > 0.25 * (a[1] - a[0]) * (a[3] - a[2])


def _where(box: tuple[int, int, int, int], height: int, width: int) -> str:
    middle = (box[0] + box[1]) / 2 / height, (box[2] + box[3]) / 2 / width
    row = "top" if middle[0] < 0.36 else "bottom" if middle[0] > 0.64 else ""
    column = "left" if middle[1] < 0.36 else "right" if middle[1] > 0.64 else ""
    if row and column:
        return f"the {row} {column} corner"
    return f"the {row or column} edge" if row or column else "one region"


# ---- words


def place_sentence(place: FixedPlace) -> str:
    """What a fixed place means."""
    moved = ""
    if place.transplanted > place.transplanted_elsewhere + 0.05:
        moved = (
            f" Copied into images of other classes, this region alone turns {percent(place.transplanted, 0)} of them into "
            f"“{place.label}” (the mirrored regions: {percent(place.transplanted_elsewhere, 0)})."
        )
    return (
        f"“{place.label}” seems to be recognized by something at {place.where}, in the same position in most of its "
        f"{place.n} images: the region holds {place.concentration:.1f} times its share of the evidence, and hiding it removes "
        f"{percent(min(1.0, place.lost), 0)} of the evidence for the class "
        f"(the mirrored regions: {percent(max(0.0, place.lost_elsewhere), 0)}).{moved} "
        "Objects move, marks do not: look for a watermark, a date stamp, a ruler, a frame, or a strip of background that is "
        "always there, and remove or cover it."
    )
