"""Heatmaps: the evidence for a class at each position of an image.

If the features of the head are means and maxima of maps, the heatmap is exact: each feature's contribution to the logit
is distributed over the positions in proportion to the feature's map, so that the cells sum to the logit. For a *plain*
head this is the class activation map of Zhou et al. 2016 (arXiv 1512.04150, eq. 2). Networks with more layers after the
last map (a norm, hidden layers, a class token) are explained by gradient times activation (HiResCAM, arXiv 2011.08891),
in torch. Without torch, the evidence of a cell is the decrease of the logit when the cell is covered (occlusion; Zeiler
& Fergus 2014, arXiv 1311.2901), which takes 49 passes (docs/decisions/0010-explanations.md).

Softmax does not change when a constant is added to all logits, so logits and maps are relative to the mean over the
classes: evidence for a class is evidence against the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from topwork.data.transforms import InputSpec, Pixels, resize
from topwork.evaluation.predictions import Ints
from topwork.features.engine import Engine
from topwork.features.feature_maps import Opened, OpenNetwork, open_network
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead, powered

GRID = 7  # cells per side for occlusion
OUTER = 0.1  # of each side: the border whose share of the evidence is reported
BORDER_AREA = 1 - (1 - 2 * OUTER) ** 2
_REACH = 0.5  # overlap of covers, in cells, so that objects on a boundary are covered, too
_STOPS = (
    np.array(  # dark violet, red, pale yellow: even lightness steps, readable in grayscale and for color-blind people
        [[43, 12, 85], [112, 25, 110], [181, 50, 84], [229, 92, 48], [250, 160, 35], [252, 236, 140]], np.float32
    )
)
_OPAQUE = 0.66  # opacity of the strongest evidence
_LEVELS = np.linspace(0, 1, 256)
_COLORS = np.stack(
    [np.interp(_LEVELS, np.linspace(0, 1, len(_STOPS)), channel) for channel in _STOPS.T], 1, dtype=np.float32
)
_ALPHA = (_OPAQUE * _LEVELS**0.8).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Maps of evidence for some classes on N images.

    Attributes:
        method: ``activation``: exact, the cells of a map sum to the logit up to a constant per class; ``gradient``:
            gradient times activation, summed over channels; ``occlusion``: decrease of the logit when the cell is
            covered.
        labels: (N, K) the explained classes.
        maps: (N, K, h, w) in logits, relative to the mean of the classes.
        logits: (N, C) of the whole images, relative to the mean of the classes.
    """

    method: Literal["activation", "gradient", "occlusion"]
    labels: Ints
    maps: NDArray[np.float32]
    logits: NDArray[np.float64]


def find_evidence(
    classifier: Classifier,
    images: Pixels,
    labels: ArrayLike,
    network: OpenNetwork | None = None,
    engine: Engine | None = None,
) -> Evidence:
    """Maps of evidence for the given classes.

    Args:
        images: uint8 (N, H, W, 3) of the input's size.
        labels: (N, K) classes to explain.
        network: the opened network; None opens it.
        engine: for occlusion; None uses the opened network.
    """
    network = network or open_network(classifier.backbone)
    wanted = np.asarray(labels, np.int64)
    opened = network.run(images)
    logits = _centered(classifier.head.logits(dict(opened.blocks)))
    exact = activation_maps(classifier.head, opened, wanted)
    if exact is not None:
        return Evidence("activation", wanted, exact, logits)
    gradients = network.gradient_maps(classifier.head, images, wanted)
    if gradients is not None:
        return Evidence("gradient", wanted, gradients, logits)

    def logits_of(pixels: Pixels) -> NDArray[np.float64]:
        blocks = engine.run(pixels) if engine else network.run(pixels).blocks
        return _centered(classifier.head.logits(dict(blocks)))

    maps = [_covering(image, own, some, logits_of) for image, own, some in zip(images, logits, wanted, strict=True)]
    return Evidence("occlusion", wanted, np.stack(maps), logits)


def activation_maps(head: LinearHead, opened: Opened, labels: Ints) -> NDArray[np.float32] | None:
    """(N, K, h, w) contributions of the positions to the centered logits of (N, K) labels, on the coarsest grid.

    The head says ``w_c · (g(f) - mean) / scale + b_c``. If f_d is the mean of a map over its P positions, position p
    contributes ``w_cd g(f_d) / f_d · map_pd / (P scale_d)``; if it is a maximum, its position contributes everything.
    The rest is a constant per class.

    Returns:
        None if a block of the head has no maps.
    """
    stages = opened.stage_maps if "stages" in head.transform.blocks else ()
    if stages is None or ("last" in head.transform.blocks and opened.maps is None):
        return None
    raw = np.concatenate([opened.blocks[name].astype(np.float64) for name in head.transform.blocks], 1)
    after = powered(dict(opened.blocks), head.transform.blocks, head.transform.power)
    ratio = np.divide(after, raw, out=np.zeros_like(raw), where=raw != 0)
    weight = head.weight.astype(np.float64) / head.transform.scale
    weight -= weight.mean(0)
    shares = weight[labels] * ratio[:, None]  # (N, K, D): contribution per unit of a feature
    pools: dict[str, list[tuple[NDArray[np.float32] | None, bool]]] = {
        "last": [(opened.maps, False)],
        "stages": [(one, is_max) for one in stages for is_max in (False, True)],
    }
    placed, start = [], 0
    for maps, is_max in (pool for name in head.transform.blocks for pool in pools[name]):
        assert maps is not None, "checked above"
        placed.append(_placed(maps, shares[:, :, start : start + maps.shape[1]], is_max))
        start += maps.shape[1]
    height, width = (min(one.shape[axis] for one in placed) for axis in (2, 3))
    return np.asarray(np.sum([_pooled(one, height, width) for one in placed], 0), np.float32)


def _placed(maps: NDArray[np.float32], shares: NDArray[np.float64], is_max: bool) -> NDArray[np.float64]:
    """(N, K, h, w) contributions of the positions to the means (or maxima) of (N, C, h, w), times (N, K, C)."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    if is_max:
        spread = np.zeros_like(flat)
        top = flat.argmax(2, keepdims=True)
        np.put_along_axis(spread, top, np.take_along_axis(flat, top, 2), 2)
    else:
        spread = flat / flat.shape[2]
    return np.asarray((shares @ spread).reshape(*shares.shape[:2], *maps.shape[2:]))


def _pooled(maps: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Maps on a coarser grid with the same sums."""
    rows, columns = (_overlaps(fine, coarse) for fine, coarse in ((maps.shape[2], height), (maps.shape[3], width)))
    return np.asarray(rows @ maps @ columns.T)


def _overlaps(fine: int, coarse: int) -> NDArray[np.float64]:
    """(coarse, fine): the share of each fine cell that lies in each coarse one."""
    edges = np.arange(fine + 1) * coarse / fine
    first = np.arange(coarse)[:, None]
    overlap = np.minimum(edges[1:], first + 1) - np.maximum(edges[:-1], first)
    return np.asarray(np.clip(overlap, 0, None) * fine / coarse)


def _covering(
    image: Pixels,
    own: NDArray[np.float64],
    labels: Ints,
    logits_of: Callable[[Pixels], NDArray[np.float64]],
) -> NDArray[np.float32]:
    """(K, GRID, GRID) decrease of the logits of one image when a cell is covered with its mean color."""

    def span(cell: int, side: int) -> slice:
        step = side / GRID
        return slice(max(0, round((cell - _REACH) * step)), round((cell + 1 + _REACH) * step))

    covered = np.repeat(image[None], GRID * GRID, axis=0)
    for number, copy in enumerate(covered):
        row, column = divmod(number, GRID)
        copy[span(row, image.shape[0]), span(column, image.shape[1])] = image.mean((0, 1)).astype(np.uint8)
    lost = own[labels][:, None] - logits_of(covered)[:, labels].T
    return np.asarray(lost.reshape(len(labels), GRID, GRID), np.float32)


def _centered(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits - logits.mean(axis=1, keepdims=True))


# ---- summaries of maps


def border_share(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N,) share of the positive evidence of (N, h, w) in the outer tenth of each side; ``BORDER_AREA`` if uniform."""
    positive = np.maximum(maps, 0).astype(np.float64)
    rows, columns = (np.diff(np.clip(np.arange(n + 1) / n, OUTER, 1 - OUTER)) * n for n in maps.shape[1:])
    total, inside = positive.sum((1, 2)), (positive * np.outer(rows, columns)).sum((1, 2))
    return np.asarray(1 - inside / np.where(total > 0, total, 1))


# ---- pictures


def overlay(picture: Pixels, evidence: NDArray[np.float32], spec: InputSpec, strongest: float) -> Pixels:
    """The upright image overlaid with the evidence for a class, without evidence against it.

    Args:
        picture: uint8 (h, w, 3), the whole image at any size.
        evidence: (h', w') map of the network's input.
        spec: the input spec: with ``crop``, the part outside the input is darker; with ``pad``, the bars are removed
            from the map.
        strongest: evidence shown at full strength; use the same for maps to compare.
    """
    height, width = picture.shape[:2]
    top, left, box_height, box_width = _seen(height, width, spec)
    strength = np.zeros((height, width), np.uint8)
    relative = np.asarray(np.maximum(evidence, 0) / max(strongest, 1e-9), np.float32)
    part = _cut_bars(relative, height, width, spec)
    strength[top : top + box_height, left : left + box_width] = _smooth(part, box_height, box_width)
    ground = picture.astype(np.float32)
    ground = 0.55 * ground + 0.45 * ground.mean(2, keepdims=True)
    seen = np.full((height, width, 1), 0.45, np.float32)
    seen[top : top + box_height, left : left + box_width] = 1
    level = strength[..., None]
    return np.asarray(ground * seen * (1 - _ALPHA[level]) + _COLORS[strength] * _ALPHA[level] + 0.5, np.uint8)


def _seen(height: int, width: int, spec: InputSpec) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of a picture in the network's input."""
    if spec.fit != "crop":
        return 0, 0, height, width
    scale = min(height / spec.height, width / spec.width) * spec.crop_fraction
    box_height, box_width = min(height, round(spec.height * scale)), min(width, round(spec.width * scale))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _cut_bars(evidence: NDArray[np.float32], height: int, width: int, spec: InputSpec) -> NDArray[np.float32]:
    """The part of the map on the picture, without padding."""
    if spec.fit != "pad":
        return evidence
    scale = min(spec.height / height, spec.width / width)
    inner = height * scale / spec.height, width * scale / spec.width
    fine = _smooth(evidence, 8 * evidence.shape[0], 8 * evidence.shape[1]) / np.float32(255)
    cut = [(round((1 - share) / 2 * n), max(1, round(share * n))) for share, n in zip(inner, fine.shape, strict=True)]
    (top, n_rows), (left, n_columns) = cut
    return np.asarray(fine[top : top + n_rows, left : left + n_columns], np.float32)


def _smooth(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.uint8]:
    """A small map, clipped to 0..1, resized as an image with values from 0 to 255."""
    gray = np.repeat(np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    return resize(gray, height, width, "bicubic")[..., 0]
